"""`training/benchmarks/certificates.py` and its report: trains, certifies, sums up and renders."""

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from hf_dualmoe.models import lipschitz_dualmoe

BENCHMARKS = Path(__file__).parents[2] / "training" / "benchmarks"
TINY = {
    "radii": [0.05, 0.1],
    "train_radius": 0.1,
    "backbone": "lipschitz_mlp",
    "backbone_kwargs": {"hidden_sizes": [16], "logit_scale": 16.0},
    "standard": {"backbone": "resnet18", "stem": "cifar", "width": [8, 8, 8, 8]},
    "epochs": 8,
    "batch_size": 128,
    "learning_rate": 1e-2,
    "augmentation": {"crop_padding": 0, "horizontal_flip": False},
    "arms": ["single_plain", "single", "standard"],
    "num_images": 60,
}


needs_torchlip = pytest.mark.skipif(
    lipschitz_dualmoe.bjorck_normalization is None, reason="training 1-Lipschitz backbones needs deel-torchlip"
)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("certificates", BENCHMARKS / "certificates.py")
    module = importlib.util.module_from_spec(spec)
    for name in ("certificates_report", "readme_tables"):  # so that what a test changes in them ends with it
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "certificates", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def report(script):
    return sys.modules["certificates_report"]


def entry(alpha, sa, *certified):
    return {"alpha": alpha, "sa": sa, "certified": list(certified) or None}


def run_of(arm, seed, entries, held_out=None):
    return {"arm": arm, "seed": seed, "entries": entries, "held_out": held_out or entries}


@pytest.fixture
def runs():
    """Two seeds of F_S, of a robust arm and of its dual model at two alphas; held-out images want another alpha."""
    found = []
    for seed, shift in ((0, 0.0), (1, 2.0)):
        found.append(run_of("standard", seed, [entry(None, 98.0)]))
        found.append(run_of("single_plain", seed, [entry(None, 79.0, 48.0, 10.0)]))
        found.append(run_of("single", seed, [entry(None, 80.0 + shift, 50.0 + shift, 20.0)]))
        dual = [
            entry(0.6, 90.0, 30.0, 5.0),
            entry(0.9, 84.0, 49.0, 19.0),
            entry(1.0, 80.0 + shift, 50.0 + shift, 20.0),
        ]
        held_out = [entry(0.6, 90.0, 47.4), entry(0.9, 84.0, 47.5 + shift), entry(1.0, 80.0, 50.0)]
        found.append(run_of("dual_single", seed, dual, held_out))
    return found


def test_alpha_is_chosen_on_held_out_images(report, runs):
    dual, robust = runs[3], runs[2]
    assert report.chosen_alpha(dual, robust) == 0.9  # 47.5 = 0.95 * 50 is enough, 47.4 is not
    robust["held_out"] = [entry(None, 80.0, 60.0)]
    assert report.chosen_alpha(dual, robust) == 1.0
    robust["held_out"] = [entry(None, 80.0, 10.0)]
    assert report.chosen_alpha(dual, robust) == 0.6


def test_summary_by_hand(report, runs):
    rows = {(row["arm"], "chosen" if "chosen" in row else row["alpha"]): row for row in report.summarise(runs)}
    assert set(rows) == {
        *((arm, None) for arm in ("standard", "single_plain", "single")),
        *(("dual_single", alpha) for alpha in (0.6, 0.9, 1.0, "chosen")),
    }
    assert rows["standard", None]["certified"] is None and "kept" not in rows["single", None]
    assert rows["single", None]["certified"][0] == {"mean": 51.0, "std": pytest.approx(2**0.5)}
    chosen = rows["dual_single", "chosen"]
    assert chosen["chosen"] == [0.9, 0.9] and chosen["sa_gain"]["mean"] == 3.0  # +4 and +2
    assert chosen["kept"]["mean"] == pytest.approx((49 / 50 + 49 / 52) / 2) and chosen["goal_reached"]
    low, one = rows["dual_single", 0.6], rows["dual_single", 1.0]
    assert not low["goal_reached"] and low["sa_gain"]["mean"] == 9.0
    assert one["kept"]["mean"] == 1.0 and not one["goal_reached"]  # all is kept and nothing gained


def test_gains_compare_the_same_seeds(report, runs):
    found = report.gains(runs)
    assert set(found) == {"single"} and found["single"]["against"] == "single_plain"
    assert found["single"]["sa"]["mean"] == 2.0
    assert [value["mean"] for value in found["single"]["certified"]] == [3.0, 10.0]
    assert report.gains([run for run in runs if run["arm"] != "single_plain"]) == {}


@needs_torchlip
def test_study_trains_certifies_goes_on_and_renders(script, report, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(script.PRESETS, "digits", TINY)
    monkeypatch.setattr(script, "ALPHAS", (0.6, 1.0))
    command = ["--seeds", "0", "--use_cpu", "--output_dir", str(tmp_path / "out")]
    assert script.main(command) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {run["arm"] for run in results["runs"]} == {*TINY["arms"], "dual_single_plain", "dual_single"}
    assert not any(run["failures"] for run in results["runs"])
    rows = {(row["arm"], row["alpha"]): row for row in results["summary"] if "chosen" not in row}
    assert rows["single", None]["certified"][0]["mean"] > 25  # far above chance
    assert rows["dual_single", 1.0]["certified"] == rows["single", None]["certified"]
    assert rows["dual_single", 0.6]["certified"][0]["mean"] <= rows["dual_single", 1.0]["certified"][0]["mean"]
    assert results["dataset"]["test_images"] == 60 and results["gains"]["single"]["against"] == "single_plain"

    monkeypatch.setattr(script, "RobustTrainer", lambda *_, **__: pytest.fail("trained again"))
    assert script.main(command) == 0
    with pytest.raises(SystemExit, match="other settings"):
        script.main([*command, "--train_radius", "0.2"])

    begin, end = sys.modules["readme_tables"].marks("certificates_digits")
    (tmp_path / "README.md").write_text(f"{begin}\n{end}\n")
    (tmp_path / "PAGE.md").write_text("\n".join(sys.modules["readme_tables"].marks("certificates")))
    monkeypatch.setattr(report, "PAGE", tmp_path / "PAGE.md")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report.replace_section, "__defaults__", (tmp_path / "README.md",))
    assert script.main([*command, "--render"]) == 0
    kept = json.loads((tmp_path / "results" / "certificates_digits.json").read_text())
    assert report.render_table(kept) in (tmp_path / "README.md").read_text()
    assert report.overview({"digits": kept}) in (tmp_path / "PAGE.md").read_text()
    assert (tmp_path / "results" / "certificates_digits.png").stat().st_size > 10_000
    assert str(tmp_path) not in json.dumps(kept)
    (tmp_path / "README.md").write_text("\n".join(sys.modules["readme_tables"].marks("repeats_digits")))
    assert script.main(["--compare", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "results" / "repeats_digits.json").read_text())
    assert len(found) == 2 and found[0] == found[1] and {cell["arm"] for cell in found[0]["cells"]} == {*TINY["arms"]}
    assert report.repeats_table(found) in (tmp_path / "README.md").read_text()
    assert script.main(["--render", "--output_dir", str(tmp_path / "nothing")]) == 2
    assert script.main(["--compare", str(tmp_path / "nothing")]) == 2
    assert "error" in capsys.readouterr().err


class StopAt(TrainerCallback):
    """Stops a training without warning, after its checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@needs_torchlip
def test_a_training_goes_on_from_its_last_checkpoint(script, tmp_path, monkeypatch):
    data, trainer_class = script.load_splits("digits"), script.RobustTrainer
    arguments = {"use_cpu": True, "train_only": True}
    whole, _ = script.train("single", 0, TINY, data, Namespace(output_dir=tmp_path / "whole", **arguments))

    args = Namespace(output_dir=tmp_path / "stopped", **arguments)
    stopping = lambda *a, **k: trainer_class(*a, callbacks=[StopAt(60)], **k)  # noqa: E731
    monkeypatch.setattr(script, "RobustTrainer", stopping)
    with pytest.raises(KeyboardInterrupt):
        script.train("single", 0, TINY, data, args)
    monkeypatch.setattr(script, "RobustTrainer", trainer_class)
    resumed, seconds = script.train("single", 0, TINY, data, args)
    assert seconds is None and not list((tmp_path / "stopped").rglob("checkpoint-*"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@needs_torchlip
@pytest.mark.slow
def test_trainings_in_other_processes_are_the_same(script, tmp_path):
    found = []
    for jobs in (1, 2):
        folder = tmp_path / str(jobs)
        command = ["--seeds", "0", "1", "--use_cpu", "--output_dir", str(folder), "--arms", "single"]
        command += ["--epochs", "2", "--num_images", "60"]
        assert script.main([*command, "--jobs", str(jobs), "--threads", "1"]) == 0
        runs = json.loads((folder / "results.json").read_text())["runs"]
        found.append([(run["seed"], run["entries"]) for run in runs])
    assert found[0] == found[1] and len(found[0]) == 2


def test_cifar10_is_shown_next_to_digits(script, report, runs):
    arms = {name: script.ARMS[name] for name in ("standard", "single_plain", "single")}
    found = {"radii": [0.1, 0.5], "seeds": [0, 1], "arms": arms, "summary": report.summarise(runs)}
    text = report.overview({"digits": found, "cifar10": {**found, "radii": [36 / 255, 72 / 255]}})
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 2 * 4  # three arms and one dual model, at the alpha chosen only
    assert "| digits, 2 seeds, L2 0.1 / 0.5 | standard | 98.0 ± 0.0 | - |" in rows
    assert "| cifar10, 2 seeds, L2 36/255 / 72/255 | standard | 98.0 ± 0.0 | - |" in rows
    assert text.count("|  | single | 81.0 ± 1.4 | 51.0 ± 1.4 / 20.0 ± 0.0 |") == 2
    assert text.count("keeps 96.1 ± 2.7 % of F_R's certified accuracy") == 2
    assert text.count("SA by +3.0 ± 1.4 points. The goal, 95 % and an SA gain above its spread, is reached.") == 2


def test_a_gain_within_its_spread_is_no_gain(report):
    dual = {"arm": "dual_single", "chosen": [0.9], "kept": {"mean": 0.99, "std": 0.0}}
    assert "is missed" in report.goal_line("digits", {**dual, "sa_gain": {"mean": 0.1, "std": 0.6}})
    assert "is reached" in report.goal_line("digits", {**dual, "sa_gain": {"mean": 0.7, "std": 0.6}})
    assert "is open" in report.goal_line("digits", {**dual, "sa_gain": {"mean": 0.7, "std": None}})
    assert "no certified accuracy" in report.goal_line("digits", {"arm": "dual_single", "chosen": [1.0]})


def test_bad_counts_are_refused(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--jobs", "0"])
    assert "jobs=0 must be at least 1" in capsys.readouterr().err


def test_readme_shows_the_overview(report):
    begin, end = sys.modules["readme_tables"].marks("certificates")
    assert f"{begin}\n\n{report.overview(report.kept_results())}\n\n{end}" in report.PAGE.read_text()


def test_literature_states_sources_and_fits_together(report):
    rows = json.loads((BENCHMARKS / "results" / "certified_literature.json").read_text())["rows"]
    for row in rows:
        assert row["source"].startswith("https://")
        values = [value for value in (row["clean"], *row["certified"].values()) if value is not None]
        assert values == sorted(values, reverse=True) and all(10 < value < 100 for value in values)
    table = report.literature_table()
    assert len(table.splitlines()) == len(rows) + 2 and all(row["source"] in table for row in rows)


def test_readme_shows_the_repeats(report):
    found = json.loads((BENCHMARKS / "results" / "repeats_digits.json").read_text())
    assert report.repeats_table(found) in (BENCHMARKS / "README.md").read_text()
    assert {repeat["environment"].get("threads") for repeat in found[1:]} == {1, 2}


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("certificates_*.json")), ids=lambda p: p.stem)
def test_readme_shows_the_kept_results(report, path):
    text = path.read_text()
    table = report.render_table(json.loads(text))
    begin, end = sys.modules["readme_tables"].marks(path.stem)
    assert f"{begin}\n\n{table}\n\n{end}" in (BENCHMARKS / "README.md").read_text()
    assert not [name for name in ("/work", "/tmp", "/home") if name in text]
