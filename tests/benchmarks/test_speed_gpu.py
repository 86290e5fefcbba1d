"""The GPU benchmark, rehearsed on a CPU: every measurement runs; a results file is gone on with and rendered."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from training.benchmarks.speed import gpu, gpu_sizes, gpu_steps, gpu_table
from training.run import RECIPES

CHEAP = ["equal at nfgsm", "bare 128", "graph single standard", "bare step single standard"]


def test_a_rehearsal_measures_and_goes_on(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    options = ["--rehearse", "--output", str(path), "--minutes", "10"]
    assert gpu.main([*options, "--only", *CHEAP]) == 0
    first = json.loads(path.read_text())
    assert first["rehearsal"] and first["environment"]["packages"]["torch"] and not first["notes"]
    assert len(first["units"]) == 4
    equal = first["units"]["equal at nfgsm"]  # eager against eager, with the same random numbers
    assert equal["holds"] and equal["loss"] == equal["gradient"] == equal["weights"] == 0
    assert first["units"]["bare 128"].keys() >= {"eager_ms", "ours_ms", "graph_ms"}
    assert first["units"]["graph single standard, 256"]["ms"] > 0
    assert first["units"]["bare step single standard, 256"]["bare_graph_ms"] > 0

    gpu.main([*options, "--only", "equal at nfgsm"])
    assert json.loads(path.read_text())["units"] == first["units"]  # not measured again
    monkeypatch.setattr(gpu_table, "RESULTS", tmp_path)
    path.rename(tmp_path / "speed_gpu.json")
    with pytest.raises(ValueError, match="rehearsal on a CPU"):
        gpu_table.read_measurements()


@pytest.mark.slow
def test_a_rehearsal_of_everything(tmp_path):
    path = tmp_path / "gpu.json"
    assert gpu.main(["--rehearse", "--output", str(path), "--minutes", "30"]) == 0
    found = json.loads(path.read_text())
    assert not found["notes"] and found["units"].keys() == gpu.units(gpu.REHEARSAL).keys()
    for name in ("autoattack", "worst_case"):
        assert found["units"][name]["images_per_s"] > 0 and found["units"][name]["gradient"] > 0


def test_trainings_that_differ_are_told_apart():
    one = {name: torch.ones(3) for name in gpu_steps.TOLERANCE}
    other = {**one, "gradient": 1.1 * one["gradient"]}
    assert gpu_steps.distances(one, other) == {"loss": 0, "gradient": pytest.approx(0.1), "weights": 0}


def test_steps_that_are_not_equal_are_reported(monkeypatch):
    size = SimpleNamespace(device="cpu")

    def pretend(difference, noise):
        runs = iter([1.0, 1.0 + difference, 1.0 + noise])
        run = lambda *args, **kwargs: dict.fromkeys(gpu_steps.TOLERANCE, torch.tensor([next(runs)]))  # noqa: E731
        monkeypatch.setattr(gpu_steps, "trained", run)
        return gpu_steps.compare_steps("at", "pgd", size)

    assert pretend(0.01, 9.0)["holds"] and not pretend(0.3, 0.01)["holds"]
    assert pretend(0.3, 0.2)["holds"] and pretend(0.3, 0.2)["noise"]["loss"] == pytest.approx(0.2)


def test_eager_steps_are_never_taken_for_recorded_ones():
    trainer = SimpleNamespace(step_graph=SimpleNamespace(reason="recording failed"))
    with pytest.raises(RuntimeError, match="one by one, since recording failed"):
        gpu_steps.check_recorded(trainer, True, gpu_sizes.Size("cuda"))
    gpu_steps.check_recorded(trainer, False, gpu_sizes.Size("cuda"))
    gpu_steps.check_recorded(trainer, True, gpu_sizes.REHEARSAL)


def test_busy_time_counts_overlapping_work_once():
    assert gpu_steps.covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4

    def event(name, start, stop, kind="DeviceType.CUDA"):
        return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(start=start, end=stop))

    events = [event("kernel", 0, 1e6), event("Optimizer.step#SGD.step", 0, 4e6), event("kernel", 2e6, 3e6)]
    events += [event("cudaStreamSynchronize", 0, 1, "DeviceType.CPU")] * 6
    assert gpu_steps.Profile(0, 2).summary(events, wall=4.0) == {"busy": 0.5, "kernels": 1.0, "waits": 3.0}


def test_what_does_not_fit_into_the_time_is_noted(tmp_path):
    def work():
        return {"ms": 1.0}

    def fails():
        raise RuntimeError("no graph")

    results = {"notes": {"old": "x"}, "units": {"done": {"ms": 3.0}}}
    path, clock = tmp_path / "r.json", gpu.Clock(30)
    units = {"done": (fails, 1), "first": (work, 1), "broken": (fails, 1), "long": (work, 100)}
    gpu.measure(results, units, clock, path)
    assert json.loads(path.read_text()) == results
    assert results["notes"] == {"broken": "RuntimeError: no graph", "long": "no time was left"}
    assert results["units"]["first"]["ms"] == 1.0 and results["units"]["done"] == {"ms": 3.0}


def test_other_versions_do_not_go_on_in_a_file(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"rehearsal": True, "environment": {}, "notes": {}, "units": {}}))
    with pytest.raises(SystemExit, match="--fresh"):
        gpu.main(["--rehearse", "--output", str(path)])


@pytest.mark.parametrize(("options", "message"), [(["--minutes", "0"], "minutes=0"), ([], "no CUDA GPU")])
def test_bad_calls_are_refused(options, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(options)
    assert message in capsys.readouterr().err


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_says_what_is_missing():
    before, _ = gpu_table.read_measurements()
    unmeasured = gpu_table.render(before, None)
    assert "Nothing has been measured with the step graph yet" in unmeasured
    row = "| one ResNet18, PGD-10 | 128 | 202.2 | - | - | <= 28 | - | - | 13 / - | 41 / - | 79.0 / - |"
    assert row in unmeasured and "| 512 | 6.89 / - | 8.32 / - | 5.38 / - | 4.37 / - |" in unmeasured


def test_the_table_has_ratios_to_the_bare_graph():
    name = "single PGD-10, 128"
    graph = {"ms": 25.0, "busy": 0.93, "waits": 0.2, "reserved_gib": 2.0}
    units = {f"eager {name}": {"ms": 60.0}, f"graph {name}": graph, f"bare step {name}": {"bare_graph_ms": 21.0}}
    units["equal at pgd"] = {"loss": 0.5, "gradient": 1e-3, "weights": 0.0, "holds": False}
    environment = {"hardware": "a GPU", "packages": dict.fromkeys(("torch", "timm", "transformers"), "1.2")}
    now = {"environment": environment, "notes": {"compiled": "no time was left"}, "units": units}
    text = gpu_table.render(gpu_table.read_measurements()[0], now)
    row = "| 202.2 | 60.0 | 25.0 | <= 28 | 21.0 | 84 % | 13 / 93 | 41 / 0 | 79.0 / 9.8 | 0.9 / 2.0 |"
    assert row in text and "Now: a GPU, torch 1.2" in text and "**Not measured now**: compiled: no time" in text
    assert "| at pgd | 5.0e-01 | 1.0e-03 | 0.0e+00 | **NO** |" in text


def test_recipes_quote_measured_times_only(tmp_path, monkeypatch):
    """A step of the recipe as it is, with the hardware; no hours that nobody has seen."""
    for path in RECIPES.iterdir():
        assert not re.search(r"\d h on|computed:", path.read_text()), path.name
    monkeypatch.setattr(gpu_table, "RESULTS", tmp_path)

    def write(name, unit, milliseconds):
        units = {f"{unit} single PGD-10, 128": {"ms": milliseconds}}
        results = {"rehearsal": False, "environment": {"hardware": f"{unit} card"}, "units": units}
        (tmp_path / f"{name}.json").write_text(json.dumps(results))

    write("speed_gpu_before", "eager", 202.2)
    before = "202 ms per step of 128 images without the step graph, measured on one eager card; "
    assert gpu_table.step_time("cifar10_resnet18_single").startswith(before)
    write("speed_gpu", "graph", 25.1)
    now = "25 ms per step of 128 images with the step graph, measured on one graph card; "
    assert gpu_table.step_time("cifar10_resnet18_single").startswith(now)
    assert gpu_table.step_time("paper") == "not measured; run with --estimate_time."
