"""The time of a run is measured on a copy: the training that follows is the same to the bit."""

import random

import numpy as np
import pytest
import scripts
import tiny_training
import torch
from conftest import assert_same_tensors
from transformers import TrainerCallback

from hf_dualmoe.trainer import time_estimate
from hf_dualmoe.trainer.time_estimate import (
    Effort,
    Measured,
    StepClock,
    TimeEstimate,
    count_evaluations,
    count_steps,
    estimate_time,
)
from hf_dualmoe.trainer.trainer import RobustTrainer
from training import run as script


class Count(TrainerCallback):
    """Counts evaluations."""

    evaluations = 0

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluations += 1


@pytest.fixture
def trainer(tmp_path):
    """trainer(**changes): a trainer of a tiny network on 20 random images."""

    def make(**changes) -> RobustTrainer:
        sizes = {"per_device_train_batch_size": 6, "per_device_eval_batch_size": 5, "eval_attack_steps": 1}
        args = tiny_training.arguments(tmp_path, **{"training_attack": "nfgsm", **sizes, **changes})
        model, data = tiny_training.build("at", num_experts=1), tiny_training.noise(20)
        return RobustTrainer(model, args, train_dataset=data, eval_dataset=data, callbacks=[Count()])

    return make


def random_numbers() -> tuple:
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_training_after_an_estimate_is_the_same_to_the_bit(trainer):
    settings = {"max_steps": 5, "ema_decay": 0.9, "logging_steps": 2, "learning_rate": 0.05}
    settings |= {"clean_weight": 0.5, "awp_gamma": 0.01}
    plain = trainer(**settings)
    plain.train()
    expected = random_numbers()

    measured = trainer(**settings)
    before = {name: tensor.clone() for name, tensor in measured.model.state_dict().items()}
    estimate = estimate_time(measured)
    assert all(torch.equal(tensor, before[name]) for name, tensor in measured.model.state_dict().items())
    assert measured.optimizer is None and measured.state.global_step == 0 and not measured.state.log_history
    measured.train()
    assert_same_tensors(measured.model, plain.model)
    assert random_numbers() == expected
    timeless = ("runtime", "per_second")
    logs = [
        [{k: v for k, v in entry.items() if not k.endswith(timeless)} for entry in one.state.log_history]
        for one in (plain, measured)
    ]
    assert logs[0] == logs[1]

    assert estimate.steps == 5 and estimate.evaluations == 2 and estimate.measured_steps == 2  # two for the average
    assert list(estimate.step_seconds) == ["without the step graph"]  # on a CPU there is no other way
    seconds = estimate.step_seconds["without the step graph"]
    total = 5 * seconds + 2 * estimate.evaluation_seconds
    assert 0 < seconds < 5 and estimate.total_seconds("without the step graph") == pytest.approx(total)
    assert estimate.evaluation_seconds > 0


@pytest.mark.parametrize(
    ("settings", "steps", "evaluations"),
    [
        ({"num_train_epochs": 2, "eval_strategy": "epoch"}, 8, 2),
        ({"num_train_epochs": 1.5, "gradient_accumulation_steps": 3}, 3, 0),
        ({"num_train_epochs": 2, "dataloader_drop_last": True, "eval_strategy": "steps", "eval_steps": 3}, 6, 2),
        ({"max_steps": 8, "eval_strategy": "steps", "eval_steps": 0.25}, 8, 4),
        ({"max_steps": 6, "eval_strategy": "epoch"}, 6, 2),
    ],
)
def test_steps_and_evaluations_are_those_of_the_run(settings, steps, evaluations, trainer):
    trainer = trainer(**settings, method="standard")
    assert count_steps(trainer) == steps
    assert count_evaluations(trainer, steps) == evaluations
    trainer.train()
    (counter,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, Count))
    assert (trainer.state.global_step, counter.evaluations) == (steps, evaluations)


def test_an_average_is_counted_at_the_end_and_not_chosen_while_time_is_measured(trainer, monkeypatch):
    predicted = []
    predict = RobustTrainer.predict
    monkeypatch.setattr(RobustTrainer, "predict", lambda *args, **kw: (predicted.append(1), predict(*args, **kw))[1])
    estimates = [estimate_time(trainer(max_steps=8, ema_decay=decay)) for decay in (0.0, 0.9)]
    assert [estimate.evaluations for estimate in estimates] == [0, 2] and predicted == []


def test_both_ways_are_measured_where_steps_can_be_recorded(trainer, monkeypatch):
    found = {"auto": Measured(0.02, 1.5, None), "off": Measured(0.2, 1.6, "step_graph='off'")}
    monkeypatch.setattr(time_estimate, "measure", lambda trainer, effort, graph: found[graph])
    trainer = trainer(max_steps=90_000, eval_strategy="steps", eval_steps=30_000)
    text = estimate_time(trainer).text()
    assert "with the step graph: 30.1 min (20 ms per step)" in text  # 90,000 * 0.02 + 3 * 1.5 s
    assert "without the step graph: 5.0 h (200 ms per step)" in text and "3 evaluations of 1.5 s" in text

    found["auto"] = Measured(0.2, 1.5, "it needs a CUDA GPU")  # steps fell back: no number is called what it is not
    estimate = estimate_time(trainer)
    assert estimate.step_seconds == {"without the step graph": 0.2}
    assert "with the step graph: not possible, since it needs a CUDA GPU" in estimate.text()


def test_the_clock_leaves_warm_up_and_the_slow_block_out(monkeypatch):
    times = iter([10.0, 12.0, 30.0, 33.0])  # blocks of 2 s, 18 s and 3 s
    monkeypatch.setattr(time_estimate.time, "perf_counter", lambda: next(times))
    clock, state = StepClock(Effort(warmup=3, block=2, blocks=3), torch.device("cpu")), type("State", (), {})()
    assert clock.effort.steps == 10
    for state.global_step in range(1, 11):
        clock.on_step_end(None, state, None)
    assert clock.seconds() == 1.5


def test_sharded_weights_are_refused(trainer):
    trainer = trainer()
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="estimate_time cannot copy sharded weights"):
        estimate_time(trainer)


class Stream(torch.utils.data.IterableDataset):
    """The images of a dataset, one after the other, again and again."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        while True:
            yield from self.dataset


@pytest.mark.parametrize(
    ("name", "settings"),
    [("eval_dataset", {}), ("train_dataset", {"max_steps": 3, "eval_strategy": "epoch"})],
)
def test_a_stream_that_must_be_counted_is_refused(name, settings, trainer):
    trainer = trainer(**settings)
    setattr(trainer, name, Stream(getattr(trainer, name)))
    with pytest.raises(ValueError, match=f"must count the images of {name}, but Stream is a stream without a length"):
        estimate_time(trainer)


def test_a_training_stream_is_measured_where_nothing_must_be_counted(trainer):
    trainer = trainer(max_steps=3)
    trainer.train_dataset = Stream(trainer.train_dataset)
    assert estimate_time(trainer).steps == 3


@pytest.mark.parametrize(("value", "trains"), [([], False), (["only"], False), (["first"], True)])
def test_run_py_tells_the_time_and_stops_unless_asked_to_train(value, trains, tmp_path, monkeypatch, capsys):
    estimate, trained = TimeEstimate(10, 0, {time_estimate.WITHOUT: 0.5}, 0.0, "a CPU", 2), []
    monkeypatch.setattr(script, "estimate_time", lambda trainer: estimate)
    monkeypatch.setattr(script.RobustTrainer, "train", lambda self, **kwargs: trained.append(kwargs))
    monkeypatch.setattr(script, "save_and_report", lambda *args: None)
    options = ["--width", "8,8,8,16", "--max_train_samples", "40", "--output_dir", str(tmp_path), "--report", "none"]
    assert scripts.call(script, *options, "--estimate_time", *value) == 0
    assert estimate.text() in capsys.readouterr().out
    assert len(trained) == trains and (tmp_path / "settings.json").is_file() == trains
