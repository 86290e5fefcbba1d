"""`certificates.py` and its report: trains, certifies, goes on, sums up."""

import json

import pytest
from conftest import assert_same_tensors
from transformers import TrainerCallback

from hf_dualmoe.models import lipschitz_dualmoe
from training.benchmarks import results_page
from training.benchmarks.certificates import certificates, report
from training.benchmarks.shared import store

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


def test_alpha_is_chosen_on_held_out_images(runs):
    dual, robust = runs[3], runs[2]
    assert report.chosen_alpha(dual, robust) == 0.9  # 47.5 = 0.95 * 50 is enough, 47.4 is not
    robust["held_out"] = [entry(None, 80.0, 60.0)]
    assert report.chosen_alpha(dual, robust) == 1.0
    robust["held_out"] = [entry(None, 80.0, 10.0)]
    assert report.chosen_alpha(dual, robust) == 0.6


def test_summary_by_hand(runs):
    rows = {(row["arm"], "chosen" if "chosen" in row else row["alpha"]): row for row in report.summarise(runs)}
    assert set(rows) == {
        *((arm, None) for arm in ("standard", "single_plain", "single")),
        *(("dual_single", alpha) for alpha in (0.6, 0.9, 1.0, "chosen")),
    }
    assert rows["standard", None]["certified"] is None and "kept" not in rows["single", None]
    assert rows["single", None]["certified"][0] == {"mean": 51.0, "std": pytest.approx(2**0.5)}
    chosen = rows["dual_single", "chosen"]
    assert chosen["chosen"] == [0.9, 0.9] and chosen["sa_gain"]["mean"] == 3.0  # +4 and +2
    assert chosen["kept"]["mean"] == pytest.approx((49 / 50 + 49 / 52) / 2)
    assert rows["dual_single", 0.6]["sa_gain"]["mean"] == 9.0 and rows["dual_single", 1.0]["kept"]["mean"] == 1.0


def test_gains_compare_the_same_seeds(runs):
    found = report.gains(runs)
    assert set(found) == {"single"} and found["single"]["against"] == "single_plain"
    assert found["single"]["sa"]["mean"] == 2.0
    assert [value["mean"] for value in found["single"]["certified"]] == [3.0, 10.0]
    assert report.gains([run for run in runs if run["arm"] != "single_plain"]) == {}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The command of a tiny study."""
    monkeypatch.setitem(certificates.PRESETS, "digits", TINY)
    monkeypatch.setattr(certificates, "ALPHAS", (0.6, 1.0))
    return ["--seeds", "0", "--use_cpu", "--output_dir", str(tmp_path / "out")]


@needs_torchlip
@pytest.mark.slow
def test_a_study_trains_certifies_goes_on_and_is_kept(tiny, tmp_path, monkeypatch, capsys):
    assert certificates.main(tiny) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {run["arm"] for run in results["runs"]} == {*TINY["arms"], "dual_single_plain", "dual_single"}
    assert not any(run["failures"] for run in results["runs"])
    rows = {(row["arm"], row["alpha"]): row for row in results["summary"] if "chosen" not in row}
    assert rows["single", None]["certified"][0]["mean"] > 25  # far above chance
    assert rows["dual_single", 1.0]["certified"] == rows["single", None]["certified"]
    assert rows["dual_single", 0.6]["certified"][0]["mean"] <= rows["dual_single", 1.0]["certified"][0]["mean"]
    assert results["dataset"]["test_images"] == 60 and results["gains"]["single"]["against"] == "single_plain"

    monkeypatch.setattr(certificates, "RobustTrainer", lambda *_, **__: pytest.fail("trained again"))
    assert certificates.main(tiny) == 0
    monkeypatch.setitem(certificates.PRESETS, "digits", {**TINY, "train_radius": 0.2})
    assert certificates.main(tiny) == 2 and "made with other train_radius" in capsys.readouterr().err

    rendered = []
    monkeypatch.setattr(results_page, "render_page", lambda: rendered.append(True))
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    assert certificates.main([*tiny, "--render"]) == 0 and rendered
    kept = json.loads((tmp_path / "results" / "certificates_digits.json").read_text())
    assert kept["summary"] == results["summary"] and str(tmp_path) not in json.dumps(kept)
    assert certificates.main(["--render", "--output_dir", str(tmp_path / "nothing")]) == 2
    assert "error" in capsys.readouterr().err


class StopAt(TrainerCallback):
    """Stops a training without warning, after its checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@needs_torchlip
@pytest.mark.slow
def test_a_training_goes_on_from_its_last_checkpoint(tiny, tmp_path, monkeypatch):
    def study(folder):
        args = certificates.parse_args([*tiny, "--output_dir", str(tmp_path / folder)])
        return certificates.CertificateStudy(TINY, args)

    trainer_class = certificates.RobustTrainer
    whole, _ = study("whole").train("single", 0)
    stopping = lambda *a, **k: trainer_class(*a, callbacks=[StopAt(60)], **k)  # noqa: E731
    monkeypatch.setattr(certificates, "RobustTrainer", stopping)
    with pytest.raises(KeyboardInterrupt):
        study("stopped").train("single", 0)
    monkeypatch.setattr(certificates, "RobustTrainer", trainer_class)
    resumed, seconds = study("stopped").train("single", 0)
    assert seconds is None and not list((tmp_path / "stopped").rglob("checkpoint-*"))
    assert_same_tensors(whole, resumed)


def test_tables_by_hand(runs):
    arms = {name: certificates.ARMS[name] for name in ("standard", "single_plain", "single")}
    found = {"radii": [36 / 255, 0.5], "seeds": [0, 1], "arms": arms, "runs": runs, "gains": report.gains(runs)}
    text = report.render({**found, "summary": report.summarise(runs)})
    assert "| arm | seeds | param. | most load % | SA % | L2 36/255 | L2 0.5 |" in text
    assert "| standard: a free ResNet, F_S | 2 | 0k | - | 98.0 ± 0.0 | - | - |" in text
    assert "| 81.0 ± 1.4 | 51.0 ± 1.4 | 20.0 ± 0.0 |" in text
    assert "| dual_single | 0.9, 0.9 | 84.0 ± 0.0 | 49.0 ± 0.0 | 19.0 ± 0.0 | 96.1 ± 2.7 |" in text
    assert "- single against single_plain: SA +2.0 ± 1.4, certified +3.0 ± 1.4, +10.0 ± 0.0 points." in text
    assert "keeps 96.1 ± 2.7 % of F_R's certified accuracy" in text
    assert "SA by +3.0 ± 1.4 points. The goal, 95 % and an SA gain above its spread, is reached." in text


def test_a_gain_within_its_spread_is_no_gain():
    dual = {"arm": "dual_single", "chosen": [0.9], "kept": {"mean": 0.99, "std": 0.0}}
    assert "is missed" in report.goal_line({**dual, "sa_gain": {"mean": 0.1, "std": 0.6}})
    assert "is reached" in report.goal_line({**dual, "sa_gain": {"mean": 0.7, "std": 0.6}})
    assert "is open" in report.goal_line({**dual, "sa_gain": {"mean": 0.7, "std": None}})
    assert "no certified accuracy" in report.goal_line({"arm": "dual_single", "chosen": [1.0]})


def test_bad_counts_are_refused(capsys):
    with pytest.raises(SystemExit):
        certificates.main(["--threads", "0"])
    assert "threads=0 must be > 0" in capsys.readouterr().err


def test_literature_states_sources_and_fits_together():
    rows = store.read_json(store.RESULTS / "certified_literature.json")["rows"]
    for row in rows:
        assert row["source"].startswith("https://")
        values = [value for value in (row["clean"], *row["certified"].values()) if value is not None]
        assert values == sorted(values, reverse=True) and all(10 < value < 100 for value in values)
    table = report.render_literature()
    assert len(table.splitlines()) == len(rows) + 2 and all(row["source"] in table for row in rows)
