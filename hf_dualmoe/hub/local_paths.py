"""Keep paths of somebody's machine out of published files: shorten, leave out or refuse them."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..models.configuration_dualmoe import without_origin
from .model_card import CONFIG_NAME, RESULTS_NAME, read_json

PROCESSOR_NAME = "preprocessor_config.json"
JSON_FILES = {CONFIG_NAME, PROCESSOR_NAME, RESULTS_NAME}
LABEL_NAMES = ("id2label", "label2id", "class_names")  # OpenImages has classes such as /m/07v9_z
# An absolute path with at least two parts, also on a file server or behind file:; not the end of another address, a
# fraction or a tag.
LOCAL_PATH = re.compile(
    r"""(?<![\w.:/\\<~])(?:[Ff][Ii][Ll][Ee]:[/\\]+|(?:~|[A-Za-z]:)?[/\\]|[/\\]{2})(?:[^\s/\\"'<>|]+[/\\])+[^\s/\\"'<>|,;:()]*"""
)


def shorten_paths(text: str) -> str:
    """The text with each absolute path replaced by its last part."""
    return LOCAL_PATH.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], text)


def is_private(path: str, folder: Path) -> bool:
    """Whether an absolute path leads into the home folder, the current one, or where the published folder lies."""
    # "/app" begins too many paths that tell nothing of anybody; a home folder may be as short as /root
    places = [Path.home(), *(place for place in (Path.cwd(), folder.resolve().parent) if len(place.parts) > 2)]
    inside = [str(place) for place in places if len(place.parts) > 1]
    plain = re.sub(r"(?i)^file:(?://[^/]*)?", "", path)
    return plain.startswith("~") or any(
        plain == place or plain.startswith((f"{place}/", f"{place}\\")) for place in inside
    )


def check_no_path(name: str, paths: Sequence[str]) -> None:
    """Raise a ValueError where paths were found in a file."""
    if paths:
        raise ValueError(f"{name} holds a path of somebody's machine, {paths[0]!r}, for all to read; remove it.")


def cleaned_texts(files: dict[str, Path]) -> dict[str, str]:
    """JSON files that hold paths of somebody's machine, without them: name -> text.

    The results say on which data; of a folder its name is enough. Configs of earlier versions of this package say from
    which folders their parts came, which nobody else can use.

    Raises:
        ValueError: Another field of a config holds a path: what it is for is not known.
    """
    cleaned = {}
    for name in JSON_FILES & set(files):
        content = read_json(files[name])
        if name == RESULTS_NAME:
            new = with_texts(content, shorten_paths)
        else:
            new = without_origin(content)
            check_no_path(name, LOCAL_PATH.findall("\n".join(texts_in(new))))
        if new != content:
            cleaned[name] = json.dumps(new, indent=2) + "\n"
    return cleaned


def texts_in(value: Any) -> Iterator[str]:
    """Each text of a value read from JSON, without the keys and the names of classes."""
    if isinstance(value, dict):
        value = [item for key, item in value.items() if key not in LABEL_NAMES]
    if isinstance(value, list):
        for item in value:
            yield from texts_in(item)
    elif isinstance(value, str):
        yield value


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A value read from JSON with each of its texts changed, keys among them, but for the names of classes."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key in LABEL_NAMES}
        return {change(key): kept.get(key) or with_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [with_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value
