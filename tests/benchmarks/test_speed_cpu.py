"""The speed benchmarks on a CPU: how they time, what they compare, and the command that runs all of them."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from hf_dualmoe.attacks import PGD
from training.benchmarks.speed import cpu, parts, timing

TINY = "--device cpu --repeats 1 --width 0.125 --image_size 8 --batch_size 8 --steps 1 --num_experts 2".split()


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


def test_parts_write_what_they_print(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(cpu.PARTS["experts"].settings, "most_experts", 2)
    names = ["training_step", "moe_step", "experts", "pgd"]
    found = cpu.main([*names, *TINY, "--output", str(tmp_path / "speed.json")])
    written = json.loads((tmp_path / "speed.json").read_text())["parts"]
    assert list(written) == names and written == json.loads(json.dumps(found))
    assert [len(part["rows"]) for part in written.values()][:3] == [3, 4, 4]
    printed = capsys.readouterr().out
    for part in written.values():
        assert part["environment"]["packages"]["torch"] and part["settings"]["batch_size"] == 8
        assert all(row["what"] in printed and row["ratio"] >= 0 for row in part["rows"])


@pytest.mark.parametrize(("robust", "holds"), [(0.5, True), (0.6, False)])
def test_autoattack_must_leave_no_more_images_standing(robust, holds, tmp_path, monkeypatch):
    standing = dict(zip(parts.BACKENDS, (robust, 0.5), strict=True))
    attack = lambda *batch, backend, **_: SimpleNamespace(robust_accuracy=standing[backend])  # noqa: E731
    monkeypatch.setattr(parts, "run_autoattack", attack)
    monkeypatch.setattr(parts, "compare", lambda *args, **limits: row("times faster", 3.0, True, **limits))
    found = cpu.main(["autoattack", *TINY, "--output", str(tmp_path / "speed.json")])["autoattack"]["rows"][0]
    assert found["holds"] is holds and f"robust {100 * robust:.2f} % against 50.00 %" in found["what"]


@pytest.mark.slow
def test_changing_groups_do_not_compile_anew_each_time(make_moe, images, labels):
    """torch gives up on a function after `recompile_limit` recompilations."""
    torch._dynamo.reset()
    counters.clear()
    compiled, graphs = torch.compile(make_moe(num_experts=2), dynamic=True, backend="eager"), []
    for seed in range(20):
        routes = (torch.rand(len(images), generator=torch.Generator().manual_seed(seed)) < seed / 20).long()
        PGD(steps=2, keep_best=False)(partial(compiled, expert_index=routes), images, labels)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] and graphs[-1] - graphs[0] < torch._dynamo.config.recompile_limit


# --- all parts -------------------------------------------------------------------------------------------------------


def row(what, ratio, holds, **limits):
    limits = {"at_most": None, "at_least": None, **limits}
    return {"what": what, "ratio": ratio, "range": [ratio, ratio], "wall_ratio": ratio, "holds": holds, **limits}


def test_parts_that_are_done_are_not_measured_again(monkeypatch, tmp_path):
    ran, failing = [], {"second"}

    def part(name):
        def measure(args):
            ran.append(name)
            if name in failing:
                raise RuntimeError("boom")
            return [row("r", 1.0, True, at_most=1.1)]

        return cpu.Part(f"The {name}", measure)

    monkeypatch.setattr(cpu, "PARTS", {name: part(name) for name in ("first", "second", "third")})
    options = ["--output", str(tmp_path / "speed.json")]
    cpu.main(options)
    failing.clear()
    written = json.loads((tmp_path / "speed.json").read_text())["parts"]
    assert ran == ["first", "second", "third"]
    assert "boom" in written["second"]["error"] and written["third"]["rows"]
    cpu.main(["first", "second", *options])
    assert ran[3:] == ["second"]  # it had failed
    cpu.main(["first", *options, "--repeats", "2"])
    assert ran[4:] == ["first"]  # other settings


def test_the_section_tells_what_was_missed(monkeypatch):
    made_up = {name: cpu.Part(f"The {name}", lambda args: []) for name in ("first", "second", "third")}
    monkeypatch.setattr(cpu, "PARTS", made_up)
    packages = {"torch": "9.1", "timm": "9.2", "transformers": "9.3"}
    rows = [row("fast", 0.5, True, at_most=1.1), row("slow", 1.2, False, at_least=2.0), row("whatever", 3.0, None)]
    first = {"environment": {"packages": packages, "hardware": "a machine"}, "rows": rows}
    text = cpu.render({"how": "one thread", "parts": {"first": first, "second": {"error": "boom"}}})
    assert "1 of 2 targets met. Missed: slow. Not measured: The second; The third." in text
    assert "Measured on a machine, one thread, with torch 9.1" in text
    assert "| fast | 0.50 | 0.50 to 0.50 | 0.50 | <= 1.1 | yes |" in text
    assert "| slow | 1.20 | 1.20 to 1.20 | 1.20 | >= 2.0 | **NO** |" in text
    assert "| whatever | 3.00 | 3.00 to 3.00 | 3.00 | - | - |" in text and "not measured: boom" in text
    with pytest.raises(ValueError, match="no part that was measured"):
        cpu.render({"how": "one thread", "parts": {"second": {"error": "boom"}}})
