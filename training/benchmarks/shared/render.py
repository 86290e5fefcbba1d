"""Markdown tables, and the sections of a README that they are rendered into."""

from pathlib import Path
from statistics import mean


def marks(name: str) -> tuple[str, str]:
    """The comments before and after a rendered section."""
    return f"<!-- {name}: begin, made by --render -->", f"<!-- {name}: end -->"


def section(name: str, text: str) -> str:
    """A text between its marks."""
    begin, end = marks(name)
    return f"{begin}\n\n{text}\n\n{end}"


def replace_section(name: str, text: str, readme: Path) -> None:
    """Put a text in the place of the one between its marks.

    Raises:
        ValueError: The README has no such marks.
    """
    page, (begin, end) = readme.read_text(encoding="utf-8"), marks(name)
    if begin not in page or end not in page:
        raise ValueError(f"{readme} has no section {name!r}; expected {begin!r} and {end!r} in it.")
    before, after = page.split(begin)[0], page.split(end)[1]
    readme.write_text(before + section(name, text) + after, encoding="utf-8")


def markdown_table(header: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    """A Markdown table; the first `text_columns` columns are text, the others are numbers."""
    alignment = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, alignment, *rows])


def folded(title: str, text: str) -> str:
    """Markdown that a reader may open."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def mean_and_range(values: list[float], form: str = ".1f") -> str:
    """The mean and, where the values differ, their range in brackets."""
    text = f"{mean(values):{form}}"
    return text if min(values) == max(values) else f"{text} ({min(values):{form}} to {max(values):{form}})"
