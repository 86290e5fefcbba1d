"""The READMEs: their numbers are those of results.json, their links lead somewhere, and every code block works.

Python blocks run in order, one namespace per section, in a folder with a tiny trained model where the pages have it.
Every command line of a bash block goes through the parser of the real script; slow tests run them with small settings,
those about the Hub against one. A block or a command that no rule covers fails.
"""

import ast
import copy
import functools
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_dualmoe import DualMoEForImageClassification
from hf_dualmoe.cli import main as cli
from hf_dualmoe.cli.arguments import RecipeParser
from hf_dualmoe.data.datasets import load_digits_splits
from hf_dualmoe.evaluation.environment import pixel_radius
from hf_dualmoe.evaluation.evaluation import RobustnessReport, evaluate_robustness
from hf_dualmoe.models.loading import MARKER

ROOT = Path(__file__).parents[1]
FOLDERS = (".", "training", "model_cards", "hf_dualmoe")  # of the pages that people write
PAGES = {folder: (ROOT / folder / "README.md").read_text(encoding="utf-8") for folder in FOLDERS}
README = PAGES["."]
RECIPES = (ROOT / "training" / "recipes" / "README.md").read_text(encoding="utf-8")  # its runs need data and hours
PROJECT = (ROOT / "pyproject.toml").read_text()
EXTRAS = PROJECT.split("[project.optional-dependencies]\n")[1].split("\n\n")[0]
CHECKOUT = ("training", "tests", "model_cards")  # folders whose files the README's commands name
SCRIPTS = {command.target: name for name, command in cli.COMMANDS.items()}
TOOLS = {"foolbox", "onnxruntime", "robustbench", "torchattacks"}  # blocks that need them run where they are installed
SMALLER = {"steps=20": "steps=2", '("digits").validation': '("digits").validation.take(12)'}  # in Python blocks
SMALL = {  # appended to command lines that run
    "train": "--max_train_samples 40 --max_validation_samples 10 --max_test_samples 12 --num_train_epochs 1 "
    "--attack_steps 1 --eval_attack_steps 1 --per_device_train_batch_size 20 --report none --disable_tqdm true",
    "evaluate": "--max_test_samples 12 --steps 2 --level quick --sanity_images 8 --alphas 0 1 --disable_tqdm",
    "join": "--max_test_samples 12 --steps 2 --level quick --sanity_images 8 --alphas 0 1 --disable_tqdm --min_sa 0",
    "certify": "--max_test_samples 4 --n0 10 --n 50 --disable_tqdm",
    "publish": "--dry_run",
    "demo": "--export exported",
}
TINY = "--num_experts 2 --router_top_k 1 --width 8,8,8,8"  # of a new network
TOKEN = "hf_" + "n0tReal" * 5


class Block(NamedTuple):
    section: str  # "folder: title"
    language: str
    text: str


def read_blocks() -> list[Block]:
    """All fenced blocks of all pages, in order."""
    found = []
    for folder, page in PAGES.items():
        for section in re.split(r"^## ", f"\n{page}", flags=re.M):
            title = f"{folder}: {section.splitlines()[0]}"
            fenced = re.findall(r"^```(\w*)\n(.*?)^```$", section, flags=re.M | re.S)
            found += [Block(title, language, text) for language, text in fenced]
    return found


def read_commands(block: Block) -> list[str]:
    """The single commands of a bash block, without comments."""
    lines = (shlex.join(shlex.split(line, comments=True)) for line in block.text.replace("\\\n", " ").splitlines())
    return [part.strip() for line in lines if line for part in line.split("'&&'")]


BLOCKS = read_blocks()
COMMANDS = [
    (block.section, command) for block in BLOCKS if block.language == "bash" for command in read_commands(block)
]
PYTHON_SECTIONS = list(dict.fromkeys(block.section for block in BLOCKS if block.language == "python"))
START, MAIN_JOB, DIAL = ".: Thirty seconds", "training: The main job", ".: The dial"
TUTORIAL, ON_A_HUB, OTHER_TOOLS = "training: Your own images", "training: The Hub", "hf_dualmoe: Other tools"


def python_blocks(section: str) -> list[str]:
    return [block.text for block in BLOCKS if block.language == "python" and block.section == section]


# --- numbers, links, words -------------------------------------------------------------------------------------------


def card(name: str) -> RobustnessReport:
    return RobustnessReport.load(ROOT / "model_cards" / name / "results.json")


def test_the_table_to_read_is_rendered_from_results():
    assert card("digits_dual").table() in PAGES["model_cards"]


def test_the_three_numbers_are_those_of_the_card():
    report = card("cifar10_dual")
    names = ("sa", "ra_pgd20", "ra_worst_case")
    clean, pgd, worst = (f"{report.metrics[name]:.1f} %" for name in names)
    assert f"| {clean} | {pgd} | **{worst}** |" in README
    assert "ra_autoattack" in report.metrics and report.dataset["num_images"] == 1000


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 300


@pytest.mark.parametrize("folder", FOLDERS)
def test_local_links_exist(folder):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGES[folder])
    assert links
    assert not [link for link in links if not (ROOT / folder / link).exists()]


def anchors(page: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page, flags=re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("folder", FOLDERS)
def test_links_to_headings_lead_to_one(folder):
    for page, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", PAGES[folder]):
        text = (ROOT / folder / page).read_text(encoding="utf-8") if page else PAGES[folder]
        assert anchor in anchors(text), f"{page}#{anchor}"


def test_the_two_commands():
    assert [block.text.strip() for block in BLOCKS if block.section == ".: Install and run"] == [
        "pip install -e . && accelerate launch training/run.py",
        'pip install -e ".[test]" && pytest',
    ]


def test_every_model_of_the_repository_is_listed_with_its_saved_alpha():
    folders = {path.parent.name for path in (ROOT / "model_cards").glob("*/config.json")}
    rows = re.findall(r"^\| \[`(\w+)`\]\(\1/README.md\) \|.* ([\d.]+) \|$", PAGES["model_cards"], flags=re.M)
    saved = {name: json.loads((ROOT / "model_cards" / name / "config.json").read_text())["alpha"] for name in folders}
    assert {name: float(alpha) for name, alpha in rows} == saved


@pytest.mark.parametrize("name", ["cifar10_dual", "digits_dual"])
def test_one_alpha_is_saved_recommended_and_drawn(name):
    report = card(name)
    config = json.loads((ROOT / "model_cards" / name / "config.json").read_text())
    assert config["alpha"] == report.model["alpha"] == report.alpha_choice["alpha"]


def test_quoted_messages_are_in_the_code():
    texts = []
    for path in [*(ROOT / "hf_dualmoe").rglob("*.py"), *(ROOT / "training").glob("*.py")]:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        texts += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    section = PAGES["training"].split("## Troubleshooting")[1].split("\n## ")[0]
    quoted = re.findall(r"\*\*`([^`]+)`\*\*", section)
    assert len(quoted) > 5
    assert not [text for text in quoted if not any(text in known for known in texts)]


def test_flags_in_the_text_exist():
    """`--flag` in running text is one of our scripts'."""
    parsers = [RecipeParser(ROOT / "training" / "recipes", ""), *(create_parser(name) for name in cli.COMMANDS)]
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    prose = re.sub(r"^```.*?^```$", "", "\n".join(PAGES.values()), flags=re.M | re.S)
    asked = {flag for code in re.findall(r"`([^`]+)`", prose) for flag in re.findall(r"--\w+", code)}
    of_accelerate = {"--cpu", "--num_processes"}
    assert asked and not asked - known - of_accelerate


def test_every_block_has_a_rule():
    assert sum(page.count("```") for page in PAGES.values()) == 2 * len(BLOCKS)
    assert {block.language for block in BLOCKS} <= {"python", "bash", "text", "bibtex"}
    assert all(compile(block.text, block.section, "exec") for block in BLOCKS if block.language == "python")
    assert not [name for name in SMALLER if not any(name in block.text for block in BLOCKS)]


# --- Python ----------------------------------------------------------------------------------------------------------


def save_classifier(folder: Path) -> None:
    """A model that transformers knows, with its image processor, as somebody else would save it."""
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    names = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    ViTForImageClassification(ViTConfig(**sizes, intermediate_size=16, **names)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


@pytest.fixture(scope="module")
def workplace(_trained_digits, tmp_path_factory):
    """A folder with the models, results and images that the README names."""
    folder = tmp_path_factory.mktemp("readme")
    model, names = copy.deepcopy(_trained_digits.model), {i: str(i) for i in range(10)}
    model.config.id2label, model.config.label2id = names, {name: i for i, name in names.items()}
    dual = DualMoEForImageClassification.from_models(model, model, alpha=0.9)
    saved = folder / "outputs" / "digits-jtdmoe" / "model"
    dual.save_pretrained(saved)
    settings = {"eps": 0.15, "steps": 2, "num_images": 12, "sanity_images": 8, "alphas": [0.5, 1.0]}
    report = evaluate_robustness(dual, load_digits_splits().test, **settings, dataset_name="digits", progress=False)
    report.save(saved / "results.json")
    shutil.copytree(saved, folder / "outputs" / "own_images-jtdmoe" / "model")
    save_classifier(hardened := folder / "outputs" / "hardened" / "model")
    (hardened / "README.md").write_text(MARKER)  # made by an earlier run of ours, so another may take its place
    images = tmp_path_factory.mktemp("images")
    for i in range(140):
        path = images / "to" / "images" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30 + i, 35), (i, 90, 250 - i)).save(path)
    (folder / "path").symlink_to(images)
    save_classifier(images / "to" / "classifier")
    Image.new("L", (8, 8), 200).convert("RGB").save(folder / "digit.png")
    for name in CHECKOUT:
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture
def beside(workplace, monkeypatch):
    """Working directory: `workplace` itself, for what writes nothing."""
    monkeypatch.chdir(workplace)


@pytest.fixture
def inside(workplace, tmp_path, monkeypatch):
    """Working directory: a copy of `workplace`."""
    folder = shutil.copytree(workplace, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def missing_tools(code: str) -> set[str]:
    """Other people's tools that a block imports and that are not installed."""
    modules = {name.split(".")[0] for name in re.findall(r"^(?:from|import) ([\w.]+)", code, flags=re.M)}
    return {name for name in modules & TOOLS if importlib.util.find_spec(name) is None}


def run_python(section: str) -> tuple[dict, set[str]]:
    """Run the Python blocks of a section; the names they leave, and the tools that were missing for some of them."""
    namespace, missing = {}, set()
    for number, code in enumerate(python_blocks(section)):
        for name, smaller in SMALLER.items():
            code = code.replace(name, smaller)
        compiled = compile(code, f"{section}, Python block {number + 1}", "exec")
        if tools := missing_tools(code):
            missing |= tools
        else:
            exec(compiled, namespace)
    return namespace, missing


def check_alpha(names: dict, printed: str) -> None:
    choice = names["choice"]
    assert names["model"].config.alpha == choice.alpha and 0 <= choice.alpha <= 1
    assert (names["dual"].config.mixing, names["dual"].config.alpha) == ("weights", 0.5)
    assert not hasattr(names["one"], "standard") and Path("outputs", "one-network", "config.json").is_file()
    assert printed.strip() == f"{choice.alpha} {choice.sa} {choice.ra} {choice.rule}"


def check_certificates(names: dict, printed: str) -> None:
    proofs, votes = names["proofs"], names["votes"]
    assert len(proofs.status) == len(votes.status) == 8 and set(votes.status) <= {"certified", "abstain"}
    assert printed.startswith(str(proofs.status)) and proofs.confidence == 1 and votes.confidence == 0.999
    shares = votes.certified_accuracy(names["labels"], radii=[0.1, 0.25])
    assert 100 >= shares[0] >= shares[1] >= 0 and printed.strip().endswith(str(shares))


def check_tools(names: dict, printed: str) -> None:
    """What ran of it: some of the blocks need tools of other people."""
    images, model = names["images"], names["model"]
    with torch.no_grad():
        torch.testing.assert_close(names["plain"](images), model(images).logits)
    if "attacked" in names:
        assert 0 < (names["attacked"] - images).abs().max() <= 0.15 + 1e-6
    if "logits" in names:
        with torch.no_grad():
            expected = model(images, alpha=0.9).logits
        torch.testing.assert_close(torch.tensor(names["logits"]), expected, atol=1e-3, rtol=1e-3)


def check_parts(names: dict, printed: str) -> None:
    assert 0 < (names["attacked"] - names["images"]).abs().max() <= 8 / 255 + 1e-6
    assert names["loss"].item() > 0 and all(p.grad.abs().sum() > 0 for p in names["model"].parameters())
    accuracy, table = printed.split("\n", 1)
    assert 0 <= float(accuracy) <= 100 and "SA %" in table and "RA PGD20 %" in table


def check_quick_start(names: dict, printed: str) -> None:
    """The shipped digits model falls at alpha 0 and stands at its own, as the text says."""
    assert names["classify"]("digit.png")[0]["label"] in "0123456789"
    lines = [line for line in printed.splitlines() if line.startswith("alpha")]
    shares = [[int(share) for share in re.findall(r"(\d+)%", line)] for line in lines]
    (clean, attacked), (dual_clean, dual_attacked) = shares
    assert min(clean, dual_clean) > 90 and attacked + 5 < dual_attacked


def check_dial(names: dict, printed: str) -> None:
    one = AutoModelForImageClassification.from_pretrained("outputs/one-network")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(one(images).logits, names["dual"](images, alpha=0.25).logits, rtol=1e-4, atol=1e-4)
    assert names["dual"].config.alpha == 0.75


def check_shipped(names: dict, printed: str) -> None:
    assert names["model"].config.mixing == "weights" and not names["model"].training


OUTCOMES = {
    START: check_quick_start,
    DIAL: check_dial,
    "model_cards: ": check_shipped,
    "model_cards: Choosing alpha": check_alpha,
    "hf_dualmoe: Certificates": check_certificates,
    OTHER_TOOLS: check_tools,
    "hf_dualmoe: The parts alone": check_parts,
}


@pytest.mark.parametrize(
    "section",
    [
        pytest.param(section, marks=[pytest.mark.slow] * (section == OTHER_TOOLS))  # tests/hub has these tools, too
        for section in PYTHON_SECTIONS
        if section not in (ON_A_HUB, MAIN_JOB, TUTORIAL)
    ],
)
def test_python_blocks_run(section, inside, capsys):
    """They raise nothing, and leave and print what the text around them says."""
    names, missing = run_python(section)
    assert section in OUTCOMES, f"no rule for what the Python of {section!r} should lead to"
    OUTCOMES[section](names, capsys.readouterr().out)
    if missing:
        pytest.skip(f"ran all but the blocks that need {', '.join(sorted(missing))}")


def test_the_main_job_predicts_and_turns_the_dial(inside, capsys):
    names, _ = run_python(MAIN_JOB)
    assert capsys.readouterr().out.strip() == "0"
    assert names["model"].config.alpha == 0.9
    standard, robust = (names["output"][f"{name}_logits"].softmax(dim=1) for name in ("standard", "robust"))
    assert (names["output"].logits.exp() - 0.4 * standard - 0.6 * robust).abs().max() < 1e-5


# --- command lines ---------------------------------------------------------------------------------------------------


@functools.cache
def load_script(name: str):
    """A script of training/ as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_of_readme", ROOT / "training" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def create_parser(command: str):
    """The parser of one of `cli.COMMANDS`."""
    target = cli.COMMANDS[command].target
    if command == "train":
        return RecipeParser(ROOT / "training" / "recipes", "")
    return (load_script(target) if target.endswith(".py") else importlib.import_module(target)).create_parser()


def split_script(words: list[str]) -> tuple[str, list[str]]:
    """(command of `cli.COMMANDS`, its arguments) of what stands after python, accelerate launch or hf-dualmoe."""
    if words[0] == "-m":
        module, *words = words[1:]
        return ("demo", words) if module == "hf_dualmoe.demo" else (words[0], words[1:])
    assert words[0].startswith("training/"), f"no rule for the script {words[0]}"
    return SCRIPTS[words[0].removeprefix("training/")], words[1:]


def find_script(command: str) -> tuple[str, list[str]] | None:
    """As `split_script`, from a whole command line; None where it runs none of our scripts."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    if words[0] == "hf-dualmoe":
        return words[1], words[2:]
    if words[0] == "python" and words[1:] != ["tests/api_page.py"]:
        return split_script(words[1:])
    if words[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(words[2:])
        assert launch.config_file is None or (ROOT / launch.config_file).is_file()
        script = ["-m", launch.training_script] if launch.module else [launch.training_script]
        return split_script(script + launch.training_script_args)
    return None


def check_script(command: str, arguments: list[str]) -> dict:
    """What the real parser reads from the arguments; local models and data that they name must be there."""
    parser = create_parser(command)
    if command == "train":
        data, model, args, run = parser.parse(arguments)
        load_script("run.py").check_dial_request(args.method, run)
        assert data.dataset_name == "digits" or Path(data.dataset_name).is_dir()
        return {name: value for part in (data, model, args, run) for name, value in vars(part).items()}
    args = parser.parse_args(arguments)
    for model in [args.standard, args.robust] if command == "join" else [args.model]:
        assert Path(model, "config.json").is_file()
    assert getattr(args, "dataset_name", "digits") == "digits" or Path(args.dataset_name).is_dir()
    if command == "evaluate":
        load_script("evaluate.py").check_request(args)
    return vars(args)


def check_pip(words: list[str]) -> dict:
    """`pip install -e ".[extras]"` with extras that pyproject has."""
    assert words[:2] == ["install", "-e"] and len(words) == 3
    if words[2] == ".":
        return {"extras": "none"}
    extras = re.fullmatch(r"\.\[([\w,]+)\]", words[2])[1].split(",")
    assert set(extras) <= set(re.findall(r"^(\w+) = ", EXTRAS, flags=re.M))
    return {"extras": extras}


def check_tool(words: list[str]) -> dict:
    """A tool for contributors: among the extras, and configured."""
    assert words[0] in EXTRAS
    if words[0] == "ruff":
        assert shlex.join(words) in (ROOT / ".ci" / "run").read_text()
    if words[0] == "mypy":
        assert words == ["mypy"] and "\nmypy" in (ROOT / ".ci" / "run").read_text() and "[tool.mypy]" in PROJECT
    if words[0] == "pre-commit":
        assert words[1:] == ["install"] and (ROOT / ".pre-commit-config.yaml").is_file()
    if words[0] == "pytest":
        assert words[1:] in ([], ["-m", "slow"], ["--cov=hf_dualmoe"])
        assert "pytest-cov" in EXTRAS and '["slow: ' in PROJECT
    return {"tool": words[0]}


def check_command(command: str) -> dict:
    """Check one command line by the rule for its first word, and return what was read; one without a rule fails."""
    words = shlex.split(command)
    while re.fullmatch(r"(HF_HUB_OFFLINE|OMP_NUM_THREADS)=1", words[0]):
        del words[0]
    if found := find_script(command):
        return check_script(*found)
    if words[0] == "pip":
        return check_pip(words[1:])
    if words == ["hf", "auth", "login"]:
        code = "import sys; from huggingface_hub.cli.hf import main; sys.argv[0] = 'hf'; main()"
        command = [sys.executable, "-c", code, *words[1:], "--help"]
        return {"help": subprocess.run(command, check=True, capture_output=True, text=True).stdout}
    if words == ["python", "tests/api_page.py"]:
        assert (ROOT / words[1]).is_file()  # what it writes: test_api_page.py
        return {"tool": words[1]}
    if words[0] in ("ruff", "mypy", "pytest", "pre-commit"):
        return check_tool(words)
    return pytest.fail(f"no rule for {command!r}")


@pytest.mark.parametrize("command", re.findall(r"^((?:accelerate|hf-dualmoe) .*?)(?: +#.*)?$", RECIPES, flags=re.M))
def test_commands_of_the_recipes_parse(command):
    name, arguments = find_script(command)
    if name == "train":  # a parser of its own: a recipe becomes the parser's defaults
        parts = RecipeParser(ROOT / "training" / "recipes", "").parse(arguments)
    else:
        parts = [create_parser(name).parse_args(arguments)]
    read = {key: str(value) for part in parts for key, value in vars(part).items()}
    given = {word[2:]: after for word, after in pairwise([*arguments, ""]) if word.startswith("--")}
    texts = ("output_dir", "init_experts_from", "dataset_name", "mixing", "model_name_or_path", "method")
    assert given.keys() <= read.keys() | {"recipe"}
    assert all(read[key] == given[key] for key in texts if key in given)


@pytest.mark.parametrize("command", dict.fromkeys(command for _, command in COMMANDS))
def test_commands_parse(command, beside):
    """Nothing is refused, and each `--flag value` of our scripts arrives under its name."""
    read = check_command(command)
    assert any(read.values())
    _, arguments = find_script(command) or ("", [])
    given = {word[2:]: after for word, after in pairwise([*arguments, ""]) if word.startswith("--")}
    for name, value in given.items():
        arrived = read[name][0] if isinstance(read[name], list) else read[name]
        expected = True if value.startswith("--") or not value else value
        if expected is True and isinstance(arrived, str):  # an option with a word of its own for no value
            continue
        assert arrived == expected or float(arrived) == pixel_radius(value), name


def run_command(command: str, arguments: list[str]) -> int | str:
    """Run a command with small settings appended, in this process; its exit status, or what it says as it fails."""
    tiny = TINY if command == "train" and "--model_name_or_path" not in arguments else ""
    try:
        cli.main([command, *arguments, *SMALL[command].split(), *tiny.split()])
    except SystemExit as end:
        return end.code or 0
    return 0


def test_dry_runs_send_nothing(inside, capsys):
    for _, line in COMMANDS:
        if "--dry_run" in line:
            assert run_command(*find_script(line)) == 0
            assert "Dry run: nothing was sent." in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("section", dict.fromkeys(name for name, line in COMMANDS if "--model" in line))
def test_commands_run(section, inside, monkeypatch):
    """All commands of a section in order, but those that install, log in or need two processes."""
    statuses = {}
    if section == TUTORIAL:
        shutil.rmtree("outputs")
    for block in (block for block in BLOCKS if block.section == section):
        if block.language == "python" and section == TUTORIAL:
            exec(block.text, {})
        for line in read_commands(block) if block.language == "bash" else []:
            found = find_script(line)
            if found is None or "--config_file" in line:
                continue
            if found[0] == "demo":
                pytest.importorskip("gradio")
                monkeypatch.setitem(SMALL, "demo", f"--export space_{len(line)}")
            statuses[line] = run_command(*found)
    assert statuses and set(statuses.values()) == {0}, statuses


# --- the Hub ---------------------------------------------------------------------------------------------------------

CLIENT = """
import json, runpy, sys
import torch
torch.set_num_threads(1)
namespace = {}
for kind, content in json.loads(sys.argv[1]):
    if kind == "python":
        exec(content, namespace)
    else:
        sys.argv = content
        try:
            runpy.run_path(content[0], run_name="__main__")
        except SystemExit as end:
            assert not end.code, end.code
"""


@pytest.mark.slow  # tests/hub/test_hub.py publishes and loads over HTTP
def test_blocks_about_the_hub_run_against_one(inside):
    steps = []
    for block in (block for block in BLOCKS if block.section == ON_A_HUB):
        if block.language == "python":
            steps.append(("python", block.text))
        else:
            lines = [shlex.split(line)[1:] for line in read_commands(block)]
            steps += [("command", words) for words in lines if words[0] == "training/publish.py"]
    assert [kind for kind, _ in steps] == ["command", "command", "python"]
    server = [sys.executable, str(ROOT / "tests" / "hub_server.py"), TOKEN]
    with subprocess.Popen(server, stdout=subprocess.PIPE, text=True) as hub:
        try:
            url = hub.stdout.readline().strip()
            variables = {
                "HF_ENDPOINT": url,
                "HF_TOKEN": TOKEN,
                "HF_HOME": str(inside / "home"),
                "HF_HUB_DISABLE_XET": "1",
                "OMP_NUM_THREADS": "1",
            }
            variables = {**os.environ, **variables, "HF_HUB_OFFLINE": "0"}
            command = [sys.executable, "-c", CLIENT, json.dumps(steps)]
            result = subprocess.run(command, env=variables, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr[-3000:]
            log = json.loads(urllib.request.urlopen(f"{url}/_log").read())
        finally:
            hub.terminate()
    commits = [path for _, path, status in log if "/commit/" in path and status == 200]
    assert [path.split("/")[3:5] for path in commits] == [["user", "my-robust-model"], ["user", "my-other-model"]]
