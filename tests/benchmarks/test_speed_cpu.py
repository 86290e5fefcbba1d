"""The speed benchmarks on a CPU: how they time, what they compare, and the command that runs all of them."""

import json

import pytest

from training.benchmarks.shared.files import CHECKOUT
from training.benchmarks.speed import cpu, timing

TINY = ["--device", "cpu", "--repeats", "1", "--width", "0.125", "--image_size", "8", "--batch_size", "6"]


# --- timing ----------------------------------------------------------------------------------------------------------


def test_alternatives_take_turns_after_the_warm_up():
    calls = []
    alternatives = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = timing.interleaved(alternatives, repeats=3, device="cpu", warmup=2)
    assert calls == ["a", "b"] * 5
    assert all(len(times[name][clock]) == 3 for name in "ab" for clock in ("wall", "cpu"))


@pytest.mark.parametrize(
    ("limits", "own", "ratio", "holds"),
    [
        ({"at_most": 1.1}, [1.0, 2.2, 9.0], 1.1, True),
        ({"at_most": 1.0}, [1.0, 2.2, 9.0], 1.1, False),
        ({"at_least": 2.0}, [0.5, 0.9, 4.0], 2.0, True),
        ({"at_least": 2.5}, [0.5, 0.9, 4.0], 2.0, False),
        ({}, [1.0, 2.2, 9.0], 1.1, None),
    ],
)
def test_row_is_the_median_of_the_ratios_inside_rounds(limits, own, ratio, holds):
    half = {clock: [0.5, 1.0, 2.0] for clock in ("wall", "cpu")}
    times = {"own": {"wall": [7.0] * 3, "cpu": own}, "b": half, "c": half}
    row = timing.compare("x", times, "own", ["b", "c"], "cpu", **limits)
    assert row["ratio"] == pytest.approx(ratio) and row["holds"] is holds and row["clock"] == "cpu"
    assert timing.compare("x", times, "own", ["b", "c"], "cuda", **limits)["clock"] == "wall"
    assert row["seconds"]["own"]["wall"] == 7.0
    assert f"| x | {ratio:.2f} |" in timing.render_rows([row])


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "options", "rows"),
    [
        ("moe_step", [], 4),
        ("pgd", ["--steps", "2"], 1),
        ("training_step", ["--steps", "1", "--idle_batches", "1"], 3),
        ("experts", ["--experts", "2", "--batches", "3"], 2),
        ("levers", ["--steps", "1"], 13),
    ],
)
def test_a_part_writes_what_it_prints(part, options, rows, tmp_path, capsys):
    result = cpu.main([part, *TINY, *options, "--output", str(tmp_path / "speed.json")])
    written = json.loads((tmp_path / "speed.json").read_text())
    assert written["rows"] == json.loads(json.dumps(result["rows"])) and len(written["rows"]) >= rows
    assert written["environment"]["packages"]["torch"] and written["settings"]["batch_size"] == 6
    printed = capsys.readouterr().out
    assert all(row["what"] in printed and row["ratio"] >= 0 for row in written["rows"])


@pytest.mark.slow
def test_changing_groups_do_not_compile_anew_each_time():
    options = ["--batch_size", "48", "--backbone", "resnet10t", "--num_experts", "2", "--batches", "20"]
    found = cpu.main(["compiling", *TINY, *options])["rows"][0]
    assert found["holds"] and len(found["graphs"]) == len(found["group_sizes"]) == 20
    assert found["graphs"][0] > 0 and found["ratio"] == found["graphs"][-1] - found["graphs"][0]
    assert len({tuple(sizes) for sizes in found["group_sizes"]}) > 10


def test_the_formula_of_memory_comes_near_the_measured_peaks():
    options = ["--probe_batch", "2", "--peak_batch", "4", "--memory_gb", "0.006", "--num_experts", "2"]
    rows = cpu.main(["memory", *TINY, "--backbone", "resnet10t", *options])["rows"]
    assert [row["what"].split(":")[0] for row in rows[:2]] == ["2 experts", "2 experts"]
    assert "* 4 images" in rows[0]["what"] and "* 8 images" in rows[1]["what"]
    assert any(row["what"].startswith("4 experts") for row in rows)
    assert all(row["predicted"] <= 6e6 and 0.5 < row["ratio"] < 1.5 for row in rows)


# --- all parts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(monkeypatch):
    parts = {name: cpu.Part(f"The {name}", name, ["--x", "1"]) for name in ("first", "second", "third")}
    monkeypatch.setattr(cpu, "PARTS", parts)
    return parts


def row(what, ratio, holds, **limits):
    limits = {"at_most": None, "at_least": None, **limits}
    return {"what": what, "ratio": ratio, "range": [ratio, ratio], "wall_ratio": ratio, "holds": holds, **limits}


def part(*rows):
    packages = {"torch": "9.1", "timm": "9.2", "transformers": "9.3"}
    return {"environment": {"packages": packages, "hardware": "a machine"}, "rows": list(rows), "seconds": 3.0}


def test_parts_that_are_done_are_not_run_again(parts, monkeypatch, tmp_path):
    ran, failing = [], {"second"}

    def run_part(name, extra, threads):
        ran.append(name)
        note = {"arguments": [*parts[name].arguments, *extra], "seconds": 1.0}
        return {**note, "error": "boom"} if name in failing else {**note, **part(row("r", 1.0, True, at_most=1.1))}

    monkeypatch.setattr(cpu, "run_part", run_part)
    options = ["--output", str(tmp_path / "speed.json"), "--jobs", "1"]
    cpu.main(options)
    assert ran == ["first", "second", "third"]
    failing.clear()
    written = json.loads((tmp_path / "speed.json").read_text())
    assert written["parts"]["second"]["error"] == "boom" and "rows" in written["parts"]["third"]
    cpu.main([*options, "--parts", "first", "second"])
    assert ran[3:] == ["second"]  # it had failed
    cpu.main([*options, "--parts", "first", "--repeats", "2"])
    assert ran[4:] == ["first"]  # other arguments
    cpu.main([*options, "--fresh"])
    assert ran[5:] == ["first", "second", "third"]


@pytest.mark.slow  # two processes that import torch
def test_a_part_runs_as_a_process_and_its_failure_is_noted():
    options = [*TINY, "--steps", "2"]
    found = cpu.run_part("pgd", options, threads=1)
    assert found["rows"] and found["seconds"] > 0 and found["arguments"] == options
    assert "no_such_argument" in cpu.run_part("pgd", ["--no_such_argument"], threads=1)["error"]


def test_the_section_tells_what_was_missed(parts):
    met = row("fast", 0.5, True, at_most=1.1)
    missed, plain = row("slow", 1.2, False, at_least=2.0), row("whatever", 3.0, None)
    text = cpu.render({"jobs": 2, "parts": {"first": part(met, missed, plain), "second": {"error": "boom"}}})
    assert "1 of 2 targets met. Missed: slow. Not measured: The second; The third." in text
    assert "| fast | 0.50 | 0.50 to 0.50 | 0.50 | <= 1.1 | yes |" in text and "torch 9.1" in text
    assert "| slow | 1.20 | 1.20 to 1.20 | 1.20 | >= 2.0 | **NO** |" in text
    assert "| whatever | 3.00 | 3.00 to 3.00 | 3.00 | - | - |" in text and "not measured: boom" in text
    with pytest.raises(ValueError, match="no part that was measured"):
        cpu.render({"jobs": 2, "parts": {"second": {"error": "boom"}}})


def test_every_part_names_a_module_with_these_arguments(capsys):
    for part in cpu.PARTS.values():
        with pytest.raises(SystemExit) as end:
            cpu.run_module(part.module, [*part.arguments, "--help"])
        assert end.value.code == 0 and capsys.readouterr().out
    assert (CHECKOUT / cpu.TRAINED[1]).is_dir()
