"""The benchmark scripts: their tables say what the result files say, and they run on tiny models."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from hf_dualmoe import DualMoEConfig, DualMoEForImageClassification, MoEConfig
from hf_dualmoe.attacks.auto_attack import autoattack
from hf_dualmoe.evaluation.calibration import calibrate_robust_logits

BENCHMARKS = Path(__file__).parents[2] / "training" / "benchmarks"
SCRIPTS = {"autoattack_parity": "parity.parity", "calibrated_mixing": "study.calibrated_mixing"}
DIGITS = {"num_labels": 10, "image_size": 8, "num_channels": 1, "num_experts": 2, "width": [8, 8, 8, 16]}


def load(name):
    return importlib.import_module(f"training.benchmarks.{SCRIPTS[name]}")


@pytest.fixture
def parity():
    return load("autoattack_parity")


@pytest.fixture
def mixing():
    return load("calibrated_mixing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved dual model without training."""
    torch.manual_seed(0)
    names = {"id2label": {i: str(i) for i in range(10)}, "label2id": {str(i): i for i in range(10)}}
    config = DualMoEConfig(standard=MoEConfig(**DIGITS), robust=MoEConfig(**DIGITS), alpha=0.6, **names)
    path = tmp_path_factory.mktemp("models") / "tiny"
    DualMoEForImageClassification(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", SCRIPTS)
def test_readme_shows_the_table_of_the_results(name):
    script = load(name)
    results = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())
    table = script.render_table(results)
    assert f"<!-- {name}: begin, made by --render -->\n\n{table}\n\n<!-- {name}: end -->" in (
        (BENCHMARKS / "README.md").read_text()
    )
    assert not [text for text in ("/work", "/tmp", "/home") if text in json.dumps(results)]


def row(attack, ours, theirs, seconds=(1.0, 2.0)):
    sides = zip(("hf_dualmoe", "torchattacks"), (ours, theirs), seconds, strict=True)
    return {"attack": attack, "seeds": list(range(max(len(ours), len(theirs))))} | {
        backend: {"standing": standing, "costs": [{"cpu_seconds": s} for _ in standing]}
        for backend, standing, s in sides
    }


def test_parity_table_by_hand(parity):
    rows = [
        row("apgd-ce", ["1100", "1110"], ["1111", "1101"]),
        row("apgd-t", ["1110", "0111"], ["1111", "0011"]),
        row("square", ["0111", "1111"], ["1000", "0001"]),
    ]
    run = {"model": "tiny", "settings": {"version": "fast"}, "num_images": 10, "clean_correct": 4, "rows": rows}
    found = [parity.cells(run, r) for r in parity.all_rows(run)]
    assert found[0] == [
        *("tiny, 10, fast", "40.00", "apgd-ce", "25.00 (20.0 to 30.0)", "35.00 (30.0 to 40.0)", "-10.00", "0.50 x")
    ]
    # pointwise, ours: 0100 and 0110; theirs: 1000 and 0001
    assert found[3][2:] == ["pointwise", "15.00 (10.0 to 20.0)", "10.00 (10.0 to 10.0)", "+5.00", "-"]
    assert [parity.summary(run, r)["holds"] for r in parity.all_rows(run)] == [True, True, False, False]
    assert parity.render_table({"runs": [run]}).splitlines()[2].startswith("| tiny, 10, fast | 40.00 | apgd-ce | ")
    run["rows"] = rows[:2]
    assert len(parity.all_rows(run)) == 2  # not all attacks: no pointwise row
    once = [row("apgd-ce", ["11"], ["10"]), row("apgd-t", ["11"], ["11"]), row("square", ["10", "01"], ["11", "11"])]
    assert parity.pointwise(once)["hf_dualmoe"]["standing"] == ["10", "01"]  # a single seed counts for all
    assert parity.pointwise(once)["torchattacks"]["standing"] == ["10", "10"]


def test_parity_results_are_merged(parity, tmp_path):
    path, settings = tmp_path / "new" / "results.json", {"version": "fast"}
    first = {"settings": settings, "num_images": 1, "rows": [row("square", ["1"], ["1"]), row("union", ["1"], ["0"])]}
    other = {"settings": {"version": "standard"}, "num_images": 1, "rows": []}
    again = {"settings": settings, "num_images": 1, "rows": [row("square", ["0"], ["0"])]}
    for run in (first, other, again):
        parity.store(run, path)
    runs = json.loads(path.read_text())["runs"]
    assert [run["settings"] for run in runs] == [other["settings"], settings]
    assert runs[1]["rows"] == [first["rows"][1], again["rows"][0]]


def test_parity_measures_both_sides(parity, folder, tmp_path, monkeypatch, capsys):
    """torchattacks is not installed here: our own attacks stand in for its, so both sides must agree."""
    version = {"apgd-ce": {"steps": 2}, "square": {"queries": 3}}
    monkeypatch.setitem(parity.VERSIONS, "fast", version)
    make = parity.make_attack
    monkeypatch.setattr(parity, "make_attack", lambda *args, backend, **kwargs: make(*args, **kwargs))
    monkeypatch.setattr(parity, "autoattack", lambda *args, backend, **kwargs: autoattack(*args, **kwargs))
    monkeypatch.setattr(parity, "environment", lambda device: {"device": device})
    output = tmp_path / "results.json"
    command = f"--model {folder} --num_images 30 --eps 12/255 --version fast --seeds 0 1 --output {output}".split()
    parity.main([*command, "--batch_size", "7", "--device", "cpu"])
    (run,) = json.loads(output.read_text())["runs"]
    assert run["model"] == "tiny" and run["settings"]["eps"] == pytest.approx(12 / 255)
    assert [r["attack"] for r in run["rows"]] == ["apgd-ce", "square", "union"]
    for found in run["rows"]:
        ours, theirs = found["hf_dualmoe"], found["torchattacks"]
        assert ours["standing"] == theirs["standing"] and len(ours["standing"]) == 2
        assert {len(standing) for standing in ours["standing"]} == {run["clean_correct"]}
    assert parity.pointwise(run["rows"][:2])["hf_dualmoe"]["standing"] == run["rows"][2]["hf_dualmoe"]["standing"]
    assert "tiny, 30, fast" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("autoattack_parity", [], "--model is missing"),
        ("autoattack_parity", ["--model", "x", "--version", "fast", "--attacks", "fab-t"], "--attacks has fab-t"),
        ("calibrated_mixing", [], "give --model, or both --standard and --robust"),
        ("calibrated_mixing", ["--model", "x", "--standard", "y", "--robust", "z"], "give --model, or both"),
    ],
)
def test_bad_requests_are_refused(script, arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        load(script).main(arguments)
    assert message in capsys.readouterr().err


def test_mixing_compares_at_the_chosen_points(mixing, folder, tmp_path, monkeypatch, capsys):
    small = {"scales": [4.0], "clamps": [None], "powers": [1.0], "ra_share": 1e-6}
    monkeypatch.setattr(mixing, "calibrate_robust_logits", lambda *a, **k: calibrate_robust_logits(*a, **k, **small))
    output = tmp_path / "results.json"
    command = f"--model {folder} --num_images 20 --held_out_images 20 --steps 2 --alphas 0.9 --eps 0.05".split()
    mixing.main([*command, "--output", str(output), "--device", "cpu"])
    (run,) = json.loads(output.read_text())["runs"]
    chosen = {point["mixing"]: point for point in run["points"] if point["chosen"]}
    assert chosen["plain"]["alpha"] == run["calibration"]["before"]["alpha"]
    assert chosen["calibrated"]["map"] == run["calibration"]["after"]["robust_logit_map"]
    for point in run["points"]:
        assert point["ra_worst_case"] <= min(point["ra_pgd"], point["ra_adaptive_union"]) <= point["sa"]
    change = mixing.gains(run)
    assert change["sa"] == chosen["calibrated"]["sa"] - chosen["plain"]["sa"]
    assert f"SA {change['sa']:+.2f} points" in capsys.readouterr().out


def test_a_masked_mixture_is_judged_on_what_others_found(mixing):
    """One model gives no gradient; the images attacked on the other bring it down all the same."""
    labels = torch.tensor([0, 0, 1])
    images = torch.tensor([0.2, 0.4, 0.9])[:, None, None, None]

    class Step(torch.nn.Module):
        config = type("Config", (), {"alpha": 0.5})()

        def forward(self, x, alpha):
            score = (x.flatten(1) > 0.5).float()
            return type("Output", (), {"logits": torch.cat([1 - score, score], dim=1)})()

    moved = torch.tensor([0.2, 0.6, 0.9])[:, None, None, None]
    found = mixing.judge(Step(), images, labels, {"ra_pgd": images}, [images, moved], 2)
    assert (found["sa"], found["ra_pgd"]) == (100, 100)
    assert found["ra_worst_case"] == pytest.approx(200 / 3, abs=1e-4)


def test_a_table_takes_the_place_of_the_old_one(monkeypatch, tmp_path):
    tables = importlib.import_module("training.benchmarks.shared.tables")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{tables.section('a', 'old')}\nbetween\n{tables.section('b', 'kept')}\nafter\n")
    tables.replace_section("a", "new", readme)
    assert readme.read_text() == (
        f"before\n{tables.section('a', 'new')}\nbetween\n{tables.section('b', 'kept')}\nafter\n"
    )
    with pytest.raises(ValueError, match="no section 'c'"):
        tables.replace_section("c", "new", readme)
