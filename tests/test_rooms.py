"""The rooms of the package: each says which others it calls, none calls against that, and none of them in a circle."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_imports

import hf_dualmoe

PACKAGE = Path(hf_dualmoe.__file__).parent
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
TRAVELS = sorted(path.stem for path in (PACKAGE / "models").glob("*_dualmoe.py"))
OF_THE_HUB_CODE = {"torch", "timm", "transformers"}


def allowed(room: str) -> set[str]:
    """The rooms that a room says it calls, in the last line of its docstring."""
    docstring = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
    last = docstring.splitlines()[-1]
    assert re.fullmatch(r"Calls: (no other room|\w+(, \w+)*)\.", last), f"{room} does not say which rooms it calls"
    return set() if "no other" in last else set(last.removeprefix("Calls: ").rstrip(".").split(", "))


def called(path: Path) -> set[str]:
    """The rooms whose modules a file of another room imports, anywhere in it."""
    room, depth, found = path.relative_to(PACKAGE).parts[0], len(path.relative_to(PACKAGE).parts), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level == depth:  # relative to the package
                found |= {(node.module or alias.name).split(".")[0] for alias in node.names}
            elif node.level == 0 and (node.module or "").split(".")[0] == "hf_dualmoe":
                found |= {(node.module.split(".") + [alias.name])[1] for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("hf_dualmoe.")}
    return found & set(ROOMS) - {room}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_calls_those_that_it_names_and_all_of_those(room):
    found = {other: path.name for path in sorted((PACKAGE / room).rglob("*.py")) for other in called(path)}
    assert set(found) == allowed(room), found


def test_no_rooms_call_each_other_in_a_circle():
    left = {room: allowed(room) for room in ROOMS}
    while left:
        ready = {room for room, others in left.items() if not others & set(left)}
        assert ready, f"in a circle: {left}"
        left = {room: others for room, others in left.items() if room not in ready}


def test_every_module_is_in_a_room():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
    assert set(ROOMS) <= {path.name for path in (Path(__file__).parent).iterdir()}, "tests mirror the rooms"


@pytest.mark.parametrize("name", TRAVELS)
def test_the_code_that_travels_imports_what_every_machine_with_transformers_has(name):
    path = PACKAGE / "models" / f"{name}.py"
    names = set(imported(ast.parse(path.read_text(encoding="utf-8"))))
    relative = {name.removeprefix(".") for name in names if name.startswith(".")}
    assert relative <= set(TRAVELS)
    assert relative == set(get_relative_imports(path)), (
        "transformers reads imports by pattern and copies what it finds"
    )
    others = {name.split(".")[0] for name in names if not name.startswith(".")}
    assert others - set(sys.stdlib_module_names) <= OF_THE_HUB_CODE


def imported(tree: ast.Module) -> Iterator[str]:
    """Modules that code cannot do without: those in a `try` that an ImportError ends are left out."""
    optional = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any(getattr(h.type, "id", "") == "ImportError" for h in node.handlers):
            optional |= {inner for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in optional:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node not in optional:
            yield "." * node.level + (node.module or "")


@pytest.mark.parametrize("name", hf_dualmoe.__all__)
def test_names_of_the_package_are_those_of_their_rooms(name):
    homes = [room for room in ROOMS if hasattr(getattr(hf_dualmoe, room, None), name)]
    assert getattr(hf_dualmoe, name).__module__.startswith("hf_dualmoe.")
    assert not homes or getattr(getattr(hf_dualmoe, homes[0]), name) is getattr(hf_dualmoe, name)
    assert name in dir(hf_dualmoe)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'PDG'"):
        _ = hf_dualmoe.PDG
