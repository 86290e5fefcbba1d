"""The fuzzer finds nothing at a size for every day, and would find what it looks for."""

import inspect
import json
import socket
import subprocess
import sys
import time

import pytest
from hypothesis import strategies as st

from training.benchmarks.reliability import fuzz
from training.benchmarks.reliability import fuzz_cases as cases

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the deadline of a case needs SIGALRM")


def test_nonsense_works_or_is_refused():
    result = fuzz.summary(fuzz.fuzz(40, seed=2024))
    assert result["cases"] == 40 and result["faults"] == []
    assert set(result["outcomes"]) >= {"works", "refused"} and len(result["by_target"]) >= 6


def test_the_same_seed_draws_the_same_cases():
    targets = [target for target in fuzz.TARGETS if target.name in ("FGSM", "image file", "load_splits")]
    first, second, third = (fuzz.fuzz(8, seed, targets) for seed in (5, 5, 6))
    assert [record["drawn"] for record in first] == [record["drawn"] for record in second]
    assert [record["drawn"] for record in first] != [record["drawn"] for record in third]


def outcome(run, drawn=None, seconds=5, errors=(ValueError,)):
    target = fuzz.Target("made up", st.none(), run, errors)
    return fuzz.run_case(target, {"speed": 1} if drawn is None else drawn, seconds)


def fails(error):
    def run(drawn, folder):
        raise error

    return run


def test_outcomes_by_hand(tmp_path):
    assert outcome(lambda drawn, folder: (folder / "a").write_text("x")) == ("works", "")
    assert outcome(fails(ValueError("speed=1 is too fast"))) == ("refused", "ValueError: speed=1 is too fast")
    assert outcome(fails(ValueError("too fast"))) == ("fault", "names no argument: ValueError: too fast")
    assert outcome(fails(ValueError("damaged")), drawn=(1, 2))[0] == "refused"
    assert outcome(fails(KeyError("speed")))[0] == "fault"
    assert outcome(fails(RecursionError()))[0] == "fault"
    assert outcome(fails(OSError("speed")), errors=(OSError,))[0] == "refused"


@pytest.mark.parametrize("what", ["file", "folder", "removal", "program", "connection"])
def test_leaving_the_folder_is_a_fault(tmp_path, what):
    inside = tmp_path / "there"
    inside.write_text("x")

    def connect(drawn, folder):
        with socket.socket() as made:
            made.settimeout(1)
            made.connect_ex(("127.0.0.1", 9))

    leave = {
        "file": lambda drawn, folder: (tmp_path / "new").write_text("x"),
        "folder": lambda drawn, folder: (tmp_path / "new").mkdir(),
        "removal": lambda drawn, folder: inside.unlink(),
        "program": lambda drawn, folder: subprocess.run(["true"], check=True),
        "connection": connect,
    }[what]
    found, message = outcome(leave)
    assert found == "fault" and message.startswith("outside its folder")
    assert outcome(lambda drawn, folder: inside.exists())[0] == "works"  # reading is allowed


def test_a_case_that_hangs_is_stopped():
    started = time.perf_counter()
    found, message = outcome(lambda drawn, folder: time.sleep(60), seconds=1)
    assert (found, message) == ("fault", "more than 1 s") and time.perf_counter() - started < 30


def test_the_script_writes_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--cases", "12", "--seed", "3", "--output", str(tmp_path / "f.json")])
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)  # put back
    monkeypatch.setattr(fuzz, "quiet", lambda: None)
    with pytest.raises(SystemExit) as end:
        fuzz.main()
    result = json.loads((tmp_path / "f.json").read_text())
    assert end.value.code == 0 and result["cases"] == sum(result["outcomes"].values()) == 12
    assert result["seeds"] == [3] and result["environment"]["packages"]["torch"]
    assert result["environment"]["hypothesis"]


def test_every_name_that_is_drawn_exists():
    """A misspelt argument would be refused, and so seem to be checked."""
    drawn = {**cases.ATTACKS, cases.MoEConfig: cases.MOE, cases.DualMoEConfig: cases.DUAL}
    for kind, choices in {**drawn, cases.RobustTrainingArguments: cases.TRAINING}.items():
        assert set(choices) - {"num_labels"} <= set(kind.__dataclass_fields__), kind
    calls = {cases.evaluate_robustness: cases.EVALUATION, cases.load_splits: cases.SPLITS}
    for function, choices in {**calls, cases.DualMoEForImageClassification.forward: cases.FORWARD}.items():
        assert set(choices) <= set(inspect.signature(function).parameters), function
