"""Joining the models of two runs, on runs that nobody trained."""

import json

import pytest
from transformers import AutoModelForImageClassification

from hf_dualmoe.evaluation.report import RobustnessReport
from training.benchmarks.study import join_runs

TRAINING = {
    **{
        "method": "at",
        "training_attack": "nfgsm",
        "lr_scheduler_type": "linear",
        "optim": "sgd",
        "weight_decay": 5e-4,
    },
    **{"per_device_train_batch_size": 128, "num_train_epochs": 3, "learning_rate": 0.1, "eps": 8 / 255, "seed": 4},
}


def write_run(folder, model, start, **changes):
    model.save_pretrained(folder / "model")
    settings = {"model": {"init_experts_from": start}, "training": {**TRAINING, **changes}}
    (folder / "settings.json").write_text(json.dumps(settings))


@pytest.fixture
def runs(tmp_path, make_moe):
    """Folders of a start, and of F_S and F_R, which went on from it."""
    model = make_moe("resnet", num_experts=1)
    write_run(tmp_path / "start", model, None, num_train_epochs=11)
    for name, eps in (("standard", 4 / 255), ("robust", 8 / 255)):
        write_run(tmp_path / name, model, str(tmp_path / "start" / "model"), eps=eps)
    return tmp_path


@pytest.mark.parametrize("mixing", ["weights", "probs"])
def test_a_joined_model_loads_and_tells_of_its_trainings(runs, mixing):
    command = [str(runs / name) for name in ("standard", "robust", "joined")]
    join_runs.main([*command, "--num_images", "490", "--mixing", mixing])
    assert AutoModelForImageClassification.from_pretrained(runs / "joined").config.mixing == mixing
    report = RobustnessReport.load(runs / "joined" / "results.json")
    told = {"eps": 8 / 255, "standard_eps": 4 / 255, "start_num_train_epochs": 11, "robust_num_train_epochs": 3}
    assert told.items() <= report.training.items() and report.training["num_images"] == 490
    assert report.seeds == {"training": 4} and report.metrics == {}


def test_runs_without_a_common_start_or_an_end_are_refused(runs, make_moe):
    write_run(runs / "other", make_moe("resnet", num_experts=1), None)
    with pytest.raises(SystemExit, match="started from different models"):
        join_runs.main([str(runs / "other"), str(runs / "robust"), str(runs / "joined"), "--num_images", "1"])
    with pytest.raises(SystemExit, match="no settings.json"):
        join_runs.main([str(runs / "nowhere"), str(runs / "robust"), str(runs / "joined"), "--num_images", "1"])
    assert not (runs / "joined").exists()
