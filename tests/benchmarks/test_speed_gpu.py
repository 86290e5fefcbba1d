"""The GPU benchmark, rehearsed on a CPU: every measurement runs; a results file is gone on with and rendered."""

import importlib
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "training" / "benchmarks"
RESULTS = BENCHMARKS / "results"
CHEAP = ["equal at nfgsm", "bare 128", "graph single standard", "bare step single standard"]


@pytest.fixture
def load():
    return lambda name: importlib.import_module(f"training.benchmarks.{name}")


@pytest.fixture
def speed_gpu(load):
    return load("speed.gpu")


def test_a_rehearsal_measures_and_goes_on(speed_gpu, tmp_path, capsys):
    path = tmp_path / "gpu.json"
    options = ["--rehearse", "--output", str(path), "--minutes", "10"]
    assert speed_gpu.main([*options, "--only", *CHEAP]) == 0
    first = json.loads(path.read_text())
    assert first["rehearsal"] and first["environment"]["packages"]["torch"] and not first["notes"]
    assert len(first["units"]) == 4
    equal = first["units"]["equal at nfgsm"]  # eager against eager, with the same random numbers
    assert equal["holds"] and equal["loss"] == equal["gradient"] == equal["weights"] == 0
    assert first["units"]["bare 128"].keys() >= {"eager_ms", "ours_ms", "graph_ms"}
    assert first["units"]["graph single standard, 256"]["ms"] > 0
    assert first["units"]["bare step single standard, 256"]["bare_graph_ms"] > 0

    speed_gpu.main([*options, "--only", "equal at nfgsm"])
    assert json.loads(path.read_text())["units"] == first["units"]  # not measured again
    with pytest.raises(ValueError, match="rehearsal on a CPU"):
        speed_gpu.read_results(path)


@pytest.mark.slow
def test_a_rehearsal_of_everything(speed_gpu, tmp_path):
    path = tmp_path / "gpu.json"
    assert speed_gpu.main(["--rehearse", "--output", str(path), "--minutes", "30"]) == 0
    found = json.loads(path.read_text())
    assert not found["notes"] and found["units"].keys() == speed_gpu.units(speed_gpu.REHEARSAL).keys()
    for name in ("autoattack", "worst_case"):
        assert found["units"][name]["images_per_s"] > 0 and found["units"][name]["gradient"] > 0


def test_trainings_that_differ_are_told_apart(load):
    cases, sizes = load("speed.gpu_cases"), load("speed.gpu_sizes")
    one = cases.trained("at", "nfgsm", sizes.REHEARSAL, graph=False, steps=2)
    assert one["loss"].shape == (2,) and one["gradient"].norm() > 0 and one["weights"].norm() > 0
    other = {**one, "gradient": 1.1 * one["gradient"]}
    assert cases.distances(one, other) == {"loss": 0, "gradient": pytest.approx(0.1), "weights": 0}


def test_steps_that_are_not_equal_are_reported(load, monkeypatch):
    cases = load("speed.gpu_cases")
    size = SimpleNamespace(device="cpu")

    def pretend(difference, noise):
        runs = iter([1.0, 1.0 + difference, 1.0 + noise])
        run = lambda *args, **kwargs: dict.fromkeys(cases.TOLERANCE, torch.tensor([next(runs)]))  # noqa: E731
        monkeypatch.setattr(cases, "trained", run)
        return cases.compare_steps("at", "pgd", size)

    assert pretend(0.01, 9.0)["holds"] and not pretend(0.3, 0.01)["holds"]
    assert pretend(0.3, 0.2)["holds"] and pretend(0.3, 0.2)["noise"]["loss"] == pytest.approx(0.2)


def test_eager_steps_are_never_taken_for_recorded_ones(load):
    cases = load("speed.gpu_cases")
    trainer = SimpleNamespace(step_graph=SimpleNamespace(reason="recording failed"))
    with pytest.raises(RuntimeError, match="one by one, since recording failed"):
        cases.check_recorded(trainer, True, cases.Size("cuda"))
    cases.check_recorded(trainer, False, cases.Size("cuda"))
    cases.check_recorded(trainer, True, load("speed.gpu_sizes").REHEARSAL)


def test_busy_time_counts_overlapping_work_once(load):
    cases = load("speed.gpu_cases")
    assert cases.covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4

    def event(name, start, stop, kind="DeviceType.CUDA"):
        return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(start=start, end=stop))

    events = [event("kernel", 0, 1e6), event("Optimizer.step#SGD.step", 0, 4e6), event("kernel", 2e6, 3e6)]
    events += [event("cudaStreamSynchronize", 0, 1, "DeviceType.CPU")] * 6
    assert cases.Profile(0, 2).summary(events, wall=4.0) == {"busy": 0.5, "kernels": 1.0, "waits": 3.0}


def test_what_does_not_fit_into_the_time_is_noted(speed_gpu, tmp_path):
    def work():
        return {"ms": 1.0}

    def fails():
        raise RuntimeError("no graph")

    results = {"notes": {"old": "x"}, "units": {"done": {"ms": 3.0}}}
    path, clock = tmp_path / "r.json", speed_gpu.Clock(30)
    units = {"done": (fails, 1), "first": (work, 1), "broken": (fails, 1), "long": (work, 100)}
    speed_gpu.measure(results, units, clock, path)
    assert json.loads(path.read_text()) == results
    assert results["notes"] == {"broken": "RuntimeError: no graph", "long": "no time was left"}
    assert results["units"]["first"]["ms"] == 1.0 and results["units"]["done"] == {"ms": 3.0}


def test_the_clock_stops_what_survives_exceptions(load):
    guard = load("shared.time_guard")
    clock, rounds = guard.Clock(0.05), 0
    with pytest.raises(guard.OutOfTime), clock.limit():
        while True:
            try:
                rounds += 1
                time.sleep(1)
            except Exception:
                pass
    assert clock.left() < 0 and rounds == 1
    with pytest.raises(guard.OutOfTime), clock.limit():
        pytest.fail("no time was left")


def test_other_versions_do_not_go_on_in_a_file(speed_gpu, tmp_path, capsys):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"rehearsal": True, "environment": {}, "notes": {}, "units": {}}))
    with pytest.raises(SystemExit, match="--fresh"):
        speed_gpu.main(["--rehearse", "--output", str(path)])


@pytest.mark.parametrize(("options", "message"), [(["--minutes", "0"], "minutes=0"), ([], "no CUDA GPU")])
def test_bad_calls_are_refused(options, message, speed_gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        speed_gpu.main(options)
    assert message in capsys.readouterr().err


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_results_and_says_what_is_missing(speed_gpu):
    before = json.loads(speed_gpu.BEFORE.read_text())
    text = speed_gpu.render_text(before, speed_gpu.read_results(RESULTS / "speed_gpu.json"))
    assert f"made by --render -->\n\n{text}\n\n<!-- speed_gpu: end" in (BENCHMARKS / "README.md").read_text()
    unmeasured = speed_gpu.render_text(before, None)
    assert "Nothing has been measured with the step graph yet" in unmeasured
    assert (
        "| one ResNet18, PGD-10 | 128 | 202.2 | - | not measured | <= 28 | - | - | 13 / - | 41 / - | 79.0 / - |"
        in (unmeasured)
    )
    assert "| 512 | 6.89 / - | 8.32 / - | 5.38 / - | 4.37 / - |" in unmeasured


def test_the_table_has_ratios_to_the_bare_graph(speed_gpu):
    name = "single PGD-10, 128"
    graph = {"ms": 25.0, "busy": 0.93, "waits": 0.2, "reserved_gib": 2.0}
    units = {f"eager {name}": {"ms": 60.0}, f"graph {name}": graph, f"bare step {name}": {"bare_graph_ms": 21.0}}
    units["equal at pgd"] = {"loss": 0.5, "gradient": 1e-3, "weights": 0.0, "holds": False}
    environment = {"hardware": "a GPU", "packages": dict.fromkeys(("torch", "timm", "transformers"), "1.2")}
    now = {"environment": environment, "notes": {"compiled": "no time was left"}, "units": units}
    text = speed_gpu.render_text(json.loads(speed_gpu.BEFORE.read_text()), now)
    row = "| 202.2 | 60.0 | 25.0 | <= 28 | 21.0 | 84 % | 13 / 93 | 41 / 0 | 79.0 / 9.8 | 0.9 / 2.0 |"
    assert row in text and "Now: a GPU, torch 1.2" in text and "**Not measured now**: compiled: no time" in text
    assert "| at pgd | 5.0e-01 | 1.0e-03 | 0.0e+00 | **NO** |" in text
