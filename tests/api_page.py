"""Writes hf_dualmoe/API.md, the list of all public names, from the source files; nothing is imported.

python tests/api_page.py
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1] / "hf_dualmoe"
PAGE = PACKAGE / "API.md"
INNER = "Inner parts"
LONGEST_VALUE = 100  # characters of a constant that are shown
GROUPS = {  # what people do -> modules, in reading order; a module that is named nowhere is an inner part
    "Models": [
        "models.configuration_dualmoe",
        "models.moe_dualmoe",
        "models.modeling_dualmoe",
        "models.routing_dualmoe",
        "models.mixing_dualmoe",
        "models.loading",
        "models.joining",
        "models.converting",
    ],
    "Data": ["data.datasets"],
    "Attacks": [
        "attacks.pgd",
        "attacks.adaptive_union",
        "attacks.auto_attack",
        "attacks.components",
        "attacks.apgd",
        "attacks.fab",
        "attacks.square",
        "attacks.nfgsm",
    ],
    "Evaluation and the dial": [
        "evaluation.evaluation",
        "evaluation.report",
        "evaluation.outcomes",
        "evaluation.dial",
        "evaluation.calibration",
        "evaluation.sanity",
        "evaluation.plots",
        "evaluation.metrics",
    ],
    "Certificates": [
        "certification.certifier",
        "certification.theorems",
        "certification.report",
        "certification.smoothing",
        "certification.lipschitz",
        "certification.route_radii",
        "certification.margin_floors",
    ],
    "Losses": ["losses.adversarial", "losses.certified"],
    "Training": ["trainer.arguments", "trainer.trainer", "trainer.validation", "trainer.time_estimate"],
    "The Hub, model cards, export": ["hub.publish", "hub.upload_plan", "hub.model_card", "hub.onnx"],
    "Command line and demo page": ["cli.main", "cli.arguments", "demo.scene", "demo.page", "demo.space"],
    INNER: [],
}
HEAD = """# Public names of hf_dualmoe

Made from the docstrings by `python tests/api_page.py`; a test fails when this page is old. Do not edit it by hand.

Images are floats (B, C, H, W) in [0, 1]. Radii (`eps`) count in the same pixel units. Accuracies are in %.
`import hf_dualmoe` gives the models and their configurations and registers them with the Auto classes of transformers.
Arguments after `*` go by name. `help(name)` has the rest: shapes, ranges and errors.
"""
INNER_TEXT = "What the modules above are made of. These names may change in any version."

Definition = ast.FunctionDef | ast.ClassDef


class Entry(NamedTuple):
    """A public name: its signature as written, the first sentence about it, and the public methods of a class."""

    name: str
    signature: str
    summary: str
    methods: list["Entry"]


def render() -> str:
    """The whole page."""
    modules, shown = public_modules(), set()
    listed = {name: group for group, names in GROUPS.items() for name in names}
    order = {name: i for i, name in enumerate(listed)}
    lines = [HEAD]
    for group in GROUPS:
        lines += [f"## {group}\n", *([INNER_TEXT + "\n"] if group == INNER else [])]
        for name in sorted(modules, key=lambda name: (order.get(name, len(order)), name)):
            if listed.get(name, INNER) == group:
                entries = list(new_entries(name, modules, shown))
                lines += module_lines(name, modules[name], entries, with_methods=group != INNER)
    return "\n".join(lines)


def module_lines(name: str, tree: ast.Module, entries: list[Entry], with_methods: bool) -> list[str]:
    """The part of the page on one module; nothing where all its names were shown before."""
    if not entries:
        return []
    lines = [f"### `hf_dualmoe.{name}`\n", first_sentence(tree) + "\n"]
    for entry in entries:
        lines.append(entry_line(entry))
        lines += ["  " + entry_line(method) for method in entry.methods if with_methods]
    return [*lines, ""]


def entry_line(entry: Entry) -> str:
    return f"- `{entry.signature}`" + (f": {entry.summary}" if entry.summary else "")


# --- reading the source ----------------------------------------------------------------------------------------------


def public_modules() -> dict[str, ast.Module]:
    """Name below hf_dualmoe -> syntax tree, of the modules that say what is public; rooms only pass names on."""
    found = {}
    for path in sorted(set(PACKAGE.rglob("*.py")) - set(PACKAGE.glob("*/__init__.py")) - {PACKAGE / "__init__.py"}):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if public_names(tree):
            found[name] = tree
    return found


def public_names(tree: ast.Module) -> list[str]:
    """Content of `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return ast.literal_eval(node.value)
    return []


def new_entries(name: str, modules: dict[str, ast.Module], shown: set[tuple[str, str]]) -> Iterator[Entry]:
    """Public names of a module that are not `shown` yet, under another module that has them too."""
    for public in public_names(modules[name]):
        home, node = definition(name, public, modules)
        if (home, public) not in shown:
            shown.add((home, public))
            yield describe(public, node)


def definition(module: str, name: str, modules: dict[str, ast.Module]) -> tuple[str, ast.stmt]:
    """Module and statement that define a name, followed through the imports inside the package.

    Raises:
        ValueError: Nothing in the module defines or imports the name.
    """
    path = PACKAGE.joinpath(*module.split("."))
    is_package = path.is_dir()
    tree = modules.get(module) or ast.parse(
        (path / "__init__.py" if is_package else path.with_suffix(".py")).read_text()
    )
    for node in tree.body:
        if isinstance(node, Definition) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and name in [getattr(target, "id", None) for target in node.targets]:
            return module, node
        if isinstance(node, ast.ImportFrom) and node.level and name in [alias.name for alias in node.names]:
            parents = module.split(".") if is_package else module.split(".")[:-1]
            parents = parents[: len(parents) - node.level + 1]
            return definition(".".join([*parents, node.module]), name, modules)
    raise ValueError(f"hf_dualmoe.{module} lists {name!r} in __all__, but does not define it.")


def describe(name: str, node: ast.stmt) -> Entry:
    """One entry of the page."""
    if isinstance(node, ast.Assign):
        value = ast.unparse(node.value)
        return Entry(name, f"{name} = {value}" if len(value) <= LONGEST_VALUE else name, "", [])
    if isinstance(node, ast.FunctionDef):
        return Entry(name, name + arguments(node), first_sentence(node), [])
    methods = [
        describe(method.name, method)
        for method in node.body
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and ast.get_docstring(method)
    ]
    return Entry(name, name + class_arguments(node), first_sentence(node), methods)


def class_arguments(node: ast.ClassDef) -> str:
    """Arguments of `__init__`, or the public fields that the class itself declares."""
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            return arguments(method)
    fields = [field for field in node.body if isinstance(field, ast.AnnAssign) and not field.target.id.startswith("_")]
    by_name = any(ast.unparse(decorator).endswith("kw_only=True)") for decorator in node.decorator_list)
    return f"({', '.join([*(['*'] if by_name else []), *map(field_text, fields)])})" if fields else ""


def field_text(field: ast.AnnAssign) -> str:
    """A field of a dataclass as an argument; `field(default=...)` shows its default only."""
    value = field.value
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        factory = given.get("default_factory")
        value = given.get("default", factory.body if isinstance(factory, ast.Lambda) else factory)
        if value is factory and isinstance(factory, ast.Name):
            value = ast.Call(factory, [], [])
    text = f"{field.target.id}: {ast.unparse(field.annotation)}"
    return text if value is None else f"{text} = {ast.unparse(value)}"


def arguments(node: ast.FunctionDef) -> str:
    """(arguments) -> result of a function, without self; nothing of a property but its type."""
    returned = f" -> {ast.unparse(node.returns)}" if node.returns and ast.unparse(node.returns) != "None" else ""
    if any(getattr(decorator, "id", None) == "property" for decorator in node.decorator_list):
        return returned.replace(" -> ", ": ")
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + args.defaults
    texts = [argument_text(arg, default) for arg, default in zip(positional, defaults, strict=True)]
    if texts and texts[0] in ("self", "cls"):
        del texts[0]
    texts += [f"*{args.vararg.arg}"] if args.vararg else ["*"] if args.kwonlyargs else []
    texts += [argument_text(arg, default) for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    texts += [f"**{args.kwarg.arg}"] if args.kwarg else []
    return f"({', '.join(texts)}){returned}"


def argument_text(arg: ast.arg, default: ast.expr | None) -> str:
    text = f"{arg.arg}: {ast.unparse(arg.annotation)}" if arg.annotation else arg.arg
    return text if default is None else f"{text} = {ast.unparse(default)}"


def first_sentence(node: Definition | ast.Module) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[\w)`\]'\"][.])(?<!e\.g\.)(?<!i\.e\.) (?=[A-Z`*])", paragraph)[0]


def undocumented() -> list[str]:
    """Public functions and classes without a docstring."""
    modules = public_modules()
    found = []
    for module in modules:
        for name in public_names(modules[module]):
            home, node = definition(module, name, modules)
            if isinstance(node, Definition) and not ast.get_docstring(node):
                found.append(f"hf_dualmoe.{home}.{name}")
    return sorted(set(found))


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
