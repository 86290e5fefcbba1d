"""Losses that are not finite, statistics that would be updated twice: training stops or skips, and says so."""

import copy

import pytest
import scripts
import tiny_training
import torch
from transformers import TrainerCallback

from hf_dualmoe.trainer.checkpoints import last_good_checkpoint, list_checkpoints
from hf_dualmoe.trainer.nonfinite import NonFiniteWatch, non_finite_tensors
from hf_dualmoe.trainer.trainer import RobustTrainer
from training import run as script

TERMS = {
    "standard": ["loss_ce"],
    "at": ["loss_robust_ce"],
    "trades": ["loss_ce", "loss_kl"],
    "rt_er": ["loss_robust_ce", "loss_expert_kl"],
    "jtdmoe": ["loss_robust_ce", "loss_dual_ce"],
}


class Poison:
    """Puts a value into what each BatchNorm layer reads, in the training passes of these batches (from 1)."""

    def __init__(self, *batches, value=float("nan")):
        self.batches, self.value, self.count, self.active = batches, value, 0, False

    def attach(self, trainer):
        compute_loss = trainer.compute_loss

        def poisoned(*args, **kwargs):
            self.count += 1
            self.active = self.count in self.batches
            try:
                return compute_loss(*args, **kwargs)
            finally:
                self.active = False

        def spoil(module, inputs):
            if self.active and module.training:
                spoiled = inputs[0].clone()
                spoiled[0] = self.value
                return (spoiled,)

        trainer.compute_loss = poisoned
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.register_forward_pre_hook(spoil)


@pytest.fixture
def train(tmp_path):
    def call(poison=None, method="at", callbacks=(), train=True, **changes):
        args = tiny_training.arguments(tmp_path / "run", method=method, **{"max_steps": 6, **changes})
        model, data = tiny_training.build(method), tiny_training.noise()
        trainer = RobustTrainer(model, args, train_dataset=data, callbacks=list(callbacks))
        if poison:
            poison.attach(trainer)
        if train:
            trainer.train()
        return trainer

    return call


class Recorder(TrainerCallback):
    """State of model and optimizer after each step."""

    def __init__(self):
        self.model, self.optimizer = [], []

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        self.model.append(copy.deepcopy(model.state_dict()))
        self.optimizer.append(copy.deepcopy(optimizer.state_dict()["state"]))


def equal(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("method", list(TERMS))
def test_stop_names_step_and_terms(train, method):
    with pytest.raises(FloatingPointError) as error:
        train(Poison(3), method=method, logging_steps=2)
    text = str(error.value)
    assert text.startswith("Step 3: not finite (NaN or infinite): loss, ")
    for name in TERMS[method]:
        assert name in text
    assert "There is no checkpoint yet." in text and "on_nan_loss='skip'" in text


def test_infinite_values_are_found_too(train):
    with pytest.raises(FloatingPointError, match="Step 2: not finite"):
        train(Poison(2, value=float("inf")), method="standard", logging_steps=1)


class BadGradient(TrainerCallback):
    """Multiplies the gradient of one weight in one step: the losses are fine, the update would not be."""

    def __init__(self, step, factor):
        self.step, self.factor, self.now = step, factor, False

    def on_train_begin(self, args, state, control, model, **kwargs):
        weight = next(p for p in model.parameters() if p.ndim == 4)
        weight.register_hook(lambda gradient: gradient * self.factor if self.now else gradient)

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = state.global_step + 1 == self.step


@pytest.mark.parametrize(("factor", "max_grad_norm"), [("nan", 1.0), ("inf", 0.0), ("1e30", 1.0), ("1e30", 0.0)])
def test_a_bad_gradient_is_found_where_the_losses_are_fine(train, factor, max_grad_norm):
    with pytest.raises(FloatingPointError, match="Step 3: not finite .*: grad_norm"):
        train(callbacks=[BadGradient(3, float(factor))], max_grad_norm=max_grad_norm, logging_steps=1)


def test_skip_leaves_a_bad_gradient_out(train):
    record = Recorder()
    trainer = train(callbacks=[BadGradient(3, float("nan")), record], on_nan_loss="skip")
    assert equal(record.model[1], record.model[2]) and trainer.watch.skipped == 1
    assert not equal(record.model[2], record.model[3]) and not non_finite_tensors(trainer.model)


def test_a_model_that_went_bad_long_before_the_log_is_named_by_its_first_step(train):
    """Its attacks are not finite either, and must not be blamed on the images."""
    with pytest.raises(FloatingPointError, match="Step 2: not finite"):
        train(Poison(2), method="trades", logging_steps=50)


def test_nothing_that_is_not_finite_gets_into_a_checkpoint(train, tmp_path):
    """Logs come later than checkpoints here; the checkpoint looks for itself."""
    with pytest.raises(FloatingPointError, match=r"Step 3: .*The last checkpoint, .*checkpoint-2, was written before"):
        train(Poison(3), save_strategy="steps", save_steps=1, logging_steps=50)
    assert list(list_checkpoints(tmp_path / "run")) == [1, 2]
    assert last_good_checkpoint(tmp_path / "run").name == "checkpoint-2"


@pytest.mark.parametrize(("policy", "save_strategy"), [("stop", "steps"), ("skip", "steps"), ("stop", "no")])
def test_weights_that_overflow_are_neither_saved_nor_handed_over(train, tmp_path, policy, save_strategy):
    """The only loss is finite, the update is not."""
    with pytest.raises(FloatingPointError, match=r"weights are not finite.*: \w+.* and \d+ more"):
        overflow = {"learning_rate": 1e38, "weight_decay": 1e3, "optim": "sgd", "max_steps": 1}
        train(**overflow, save_strategy=save_strategy, on_nan_loss=policy)
    assert not list_checkpoints(tmp_path / "run")


def test_skip_leaves_weights_statistics_and_optimizer_alone(train):
    record = Recorder()
    skipping = {"on_nan_loss": "skip", "logging_steps": 2}
    trainer = train(Poison(3, 5), callbacks=[record], **skipping)
    for step in (3, 5):
        assert equal(record.model[step - 2], record.model[step - 1])
        before, after = record.optimizer[step - 2], record.optimizer[step - 1]
        assert all(equal(before[i], after[i]) for i in before)
    assert not equal(record.model[0], record.model[1]) and not equal(record.model[3], record.model[5])
    assert not non_finite_tensors(trainer.model)
    counts = {int(b) for name, b in trainer.model.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {4}  # 6 steps, 2 skipped

    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["skipped_steps"] for entry in logs] == [0, 1, 2]
    assert all(0 < entry[name] < 10 for entry in logs for name in ("loss", "loss_robust_ce"))


def test_skip_takes_the_whole_step_where_one_of_its_batches_is_bad(train):
    record = Recorder()
    options = {"gradient_accumulation_steps": 3, "max_steps": 3, "on_nan_loss": "skip"}
    train(Poison(5), callbacks=[record], **options)  # batches 4 to 6 are step 2
    assert equal(record.model[0], record.model[1]) and not equal(record.model[1], record.model[2])


def test_skip_gives_up_after_so_many_in_a_row(train):
    message = r"Step 4: not finite .*: loss.*\. 2 updates in a row were skipped before it\."
    with pytest.raises(FloatingPointError, match=message):
        train(Poison(2, 3, 4), on_nan_loss="skip", max_skipped_steps=2)
    trainer = train(Poison(1, 2, 4, 5), on_nan_loss="skip", max_skipped_steps=2, logging_steps=6)
    assert trainer.watch.skipped == 4


def test_counts_go_on_after_resuming(train, tmp_path):
    options = {"on_nan_loss": "skip", "save_strategy": "steps", "save_steps": 3}
    train(Poison(2, 3), max_steps=3, **options)
    trainer = train(train=False, **options)
    trainer.train(resume_from_checkpoint=str(last_good_checkpoint(tmp_path / "run")))
    assert trainer.watch.skipped == 2 and trainer.watch.in_a_row == 0


def test_noting_waits_for_no_device(train):
    """Tensors without data fail where the host asks for a value."""
    watch = NonFiniteWatch("stop", 0, "out")
    for step in (1, 2):
        watch.note(step, {"loss": torch.zeros((), device="meta"), "loss_ce": torch.zeros((), device="meta")})
    with pytest.raises((RuntimeError, NotImplementedError)):
        watch.found()
    watch = NonFiniteWatch("stop", 0, "out")
    for step, value in enumerate([1.0, float("inf"), 1.0, float("nan")], start=1):
        watch.note(step, {"loss": torch.tensor(value), "loss_ce": torch.tensor(1.0)})
    assert watch.found() == {"loss": 2}


def test_policies_out_of_range_are_named(train):
    with pytest.raises(ValueError, match="on_nan_loss='ignore' must be one of stop, skip"):
        train(on_nan_loss="ignore")
    with pytest.raises(ValueError, match=">= 0"):
        train(max_skipped_steps=-1)


def test_run_ends_with_the_message_alone(tmp_path):
    options = (
        "--max_train_samples 64 --max_validation_samples 20 --backbone resnet10t --width 8,8,8,16 --num_experts 2 "
        "--router_top_k 2 --report none --optim sgd --learning_rate 1e30 --warmup_steps 0 --num_train_epochs 6 "
        "--disable_tqdm true"
    ).split()
    status = scripts.call(script, *options, "--output_dir", tmp_path)
    assert status.startswith("run.py: error: ") and "not finite" in status
    assert not list_checkpoints(tmp_path) and not (tmp_path / "model").exists()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradient_checkpointing_moves_batchnorm_statistics_once(train, accumulation):
    states = []
    for enabled in (False, True):
        options = {"gradient_accumulation_steps": accumulation, "max_steps": 3, "method": "jtdmoe"}
        trainer = train(gradient_checkpointing=enabled, **options)
        states.append(trainer.model.state_dict())
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], atol=1e-5), name
    moved = int(states[1]["robust.experts.0.bn1.num_batches_tracked"])
    assert moved == {1: 3, 2: 5}[accumulation]  # 3 batches an epoch
