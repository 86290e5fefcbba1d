"""Text files are UTF-8 wherever the code runs: Windows and a C locale have another default."""

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_dualmoe.evaluation.report import RobustnessReport
from hf_dualmoe.hub.model_card import write_model_card
from hf_dualmoe.hub.upload_plan import plan_upload

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "hf_dualmoe").rglob("*.py"), *(ROOT / "training").rglob("*.py")])
PROCESSES = ("run", "Popen", "check_output", "check_call")


def opens_text(call: ast.Call) -> bool:
    """Whether a call opens or pipes text."""
    name = getattr(call.func, "attr", None) or getattr(call.func, "id", None)
    if name in ("read_text", "write_text"):
        return isinstance(call.func, ast.Attribute)
    if name in PROCESSES:
        return any(word.arg in ("text", "universal_newlines") for word in call.keywords)
    if name in ("open", "fdopen"):
        owner = getattr(getattr(call.func, "value", None), "id", None)
        modes = [word.value for word in call.keywords if word.arg == "mode"] + call.args[:2]
        binary = any(isinstance(mode, ast.Constant) and "b" in str(mode.value)[:3] for mode in modes)
        return not binary and not (name == "open" and owner in ("Image", "os", "webbrowser"))
    return False


def without_encoding(source: str) -> list[int]:
    """Lines of a source that open text without saying in which encoding."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and opens_text(node)]
    return [call.lineno for call in calls if "encoding" not in {word.arg for word in call.keywords}]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_files_name_their_encoding(path):
    assert without_encoding(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("path.read_text()", [1]),
        ("path.write_text(text)", [1]),
        ("open(path)", [1]),
        ("path.open('a')", [1]),
        ("subprocess.run(command, text=True)", [1]),
        ("write_text(path, text)", []),  # our own, which is UTF-8
        ("path.read_text(encoding='utf-8')", []),
        ("open(path, 'rb')\npath.open('wb')\nImage.open(path)\nos.open(path, flags)", []),
    ],
)
def test_the_check_finds(source, expected):
    assert without_encoding(source) == expected


@pytest.fixture
def folder(make_moe, tmp_path):
    """A saved model with label names and results that no code page holds."""
    model = make_moe("resnet")
    model.config.id2label = {**model.config.id2label, 0: "Küken 鸡"}
    model.config.label2id = {name: i for i, name in model.config.id2label.items()}
    model.save_pretrained(tmp_path)
    report = RobustnessReport(
        model={"kind": "mixture of experts"},
        dataset={"name": "Küken 鸡", "num_images": 20},
        threat={"norm": "linf", "eps": 8 / 255},
        metrics={"sa": 75.0, "ra_pgd20": 40.0},
    )
    (tmp_path / "results.json").write_text(json.dumps(report.__dict__, ensure_ascii=False), encoding="utf-8")
    return tmp_path


def test_card_and_publication_where_the_default_is_ascii(folder, monkeypatch):
    def ascii_by_default(encoding, stacklevel=2):
        return encoding or "ascii"

    monkeypatch.setattr(io, "text_encoding", ascii_by_default)  # what pathlib asks
    write_model_card(folder)
    card = plan_upload(folder, "user/name").card
    assert "Küken 鸡" in card and "L∞ 8/255" in card
    report = RobustnessReport.load(folder / "results.json")
    report.save(folder / "results.json")
    assert RobustnessReport.load(folder / "results.json") == report


@pytest.mark.slow
def test_publishing_in_a_c_locale(folder):
    """Nothing of ours, nor of the libraries on the way, may need another encoding."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LANG": "C"}
    command = [sys.executable, "-X", "warn_default_encoding", str(ROOT / "training" / "publish.py")]
    arguments = ["--model", str(folder), "--repo_id", "user/name", "--dry_run"]
    done = subprocess.run([*command, *arguments], capture_output=True, env=environment)
    text = (done.stdout + done.stderr).decode("utf-8", errors="replace")
    assert done.returncode == 0, text
    assert not [line for line in text.splitlines() if "EncodingWarning" in line and str(ROOT) in line]
