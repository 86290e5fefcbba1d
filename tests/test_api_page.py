"""The API page is what its generator makes of the source, and says what the modules really offer."""

import ast
import importlib
import importlib.util

import api_page
import pytest


def test_page_is_up_to_date():
    page = api_page.PAGE.read_text(encoding="utf-8")
    assert page == api_page.render(), "run: python tests/api_page.py"


def test_public_functions_and_classes_have_docstrings():
    assert api_page.undocumented() == []


def test_grouped_modules_exist():
    names = [name for group in api_page.GROUPS.values() for name in group]
    assert len(names) == len(set(names))
    assert not [name for name in names if importlib.util.find_spec(f"hf_dualmoe.{name}") is None]


def test_every_public_name_is_on_the_page_once():
    modules, shown = api_page.public_modules(), set()
    entries = [entry.name for name in modules for entry in api_page.new_entries(name, modules, shown)]
    listed = {name for tree in modules.values() for name in api_page.public_names(tree)}
    assert set(entries) == listed
    page = api_page.PAGE.read_text(encoding="utf-8")
    assert page.count("\n- `") == len(entries)
    for name in ("PGD", "worst_case", "evaluate_robustness", "rt_er_loss", "certify", "push_model", "export_onnx"):
        assert page.count(f"\n- `{name}(") == 1


def test_names_read_from_the_source_are_those_of_the_modules():
    for name, tree in api_page.public_modules().items():
        if not name.startswith("demo"):  # needs Gradio
            module = importlib.import_module(f"hf_dualmoe.{name}")
            assert module.__all__ == api_page.public_names(tree)
            assert not [public for public in module.__all__ if not hasattr(module, public)]


FIELDS = """class A:
    '''One
    line.'''
    x: int = field(default=3)
    _y: int = 1
    z: list = field(default_factory=list)
"""


@pytest.mark.parametrize(
    ("source", "signature", "summary"),
    [
        (
            "def f(a, b: int = 2, *, c='x', **d) -> bool:\n 'Do. It.'",
            "f(a, b: int = 2, *, c = 'x', **d) -> bool",
            "Do.",
        ),
        ("def f(*rest: int) -> None:\n 'See e.g. `g` for (a). More.'", "f(*rest)", "See e.g. `g` for (a)."),
        (FIELDS, "A(x: int = 3, z: list = list())", "One line."),
        ("@dataclass(kw_only=True)\nclass A:\n 'K.'\n x: float = 8 / 255", "A(*, x: float = 8 / 255)", "K."),
        ("class A:\n 'I.'\n def __init__(self, a: int):\n  pass", "A(a: int)", "I."),
        ("LIMIT = 3", "LIMIT = 3", ""),
    ],
    ids=["function", "star", "fields", "by name", "init", "constant"],
)
def test_entries(source, signature, summary):
    node = ast.parse(source).body[0]
    name = node.targets[0].id if isinstance(node, ast.Assign) else node.name
    entry = api_page.describe(name, node)
    assert (entry.signature, entry.summary) == (signature, summary)


def test_properties_have_no_arguments():
    node = ast.parse("class A:\n 'I.'\n @property\n def n(self) -> int:\n  'Count.'\n def hidden(self):\n  pass").body[
        0
    ]
    assert [method.signature for method in api_page.describe("A", node).methods] == ["n: int"]


def test_a_name_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="'Nothing'"):
        api_page.definition("losses", "Nothing", api_page.public_modules())
