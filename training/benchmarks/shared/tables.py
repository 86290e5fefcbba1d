"""Where the benchmarks keep their results, and how their tables get into the README beside them."""

from pathlib import Path

HERE = Path(__file__).parents[1]
RESULTS = HERE / "results"
README = HERE / "README.md"


def section(name: str, table: str) -> str:
    """A table between the comments that mark it in the README."""
    begin, end = marks(name)
    return f"{begin}\n\n{table}\n\n{end}"


def marks(name: str) -> tuple[str, str]:
    """The comments before and after a table."""
    return f"<!-- {name}: begin, made by --render -->", f"<!-- {name}: end -->"


def replace_section(name: str, table: str, readme: Path = README) -> None:
    """Put a table in the place of the one of that name.

    Raises:
        ValueError: The README has no such place.
    """
    text, (begin, end) = readme.read_text(encoding="utf-8"), marks(name)
    if begin not in text or end not in text:
        raise ValueError(f"{readme} has no section {name!r}; expected {begin!r} and {end!r} in it.")
    before, after = text.split(begin)[0], text.split(end)[1]
    readme.write_text(before + section(name, table) + after, encoding="utf-8")


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
