"""The step of a training: it waits for nothing, it has few operations, and replaying it is the same training."""

import logging

import pytest
import tiny_training
import torch
import torch.nn.functional as F
from operations import Operations, TapeRecorder
from torch import nn
from transformers import TrainerCallback
from transformers.training_args import ParallelMode

from hf_dualmoe.attacks.base import frozen
from hf_dualmoe.attacks.folding import foldable_pairs, folded
from hf_dualmoe.attacks.nfgsm import NFGSM
from hf_dualmoe.attacks.pgd import PGD
from hf_dualmoe.evaluation.memory import largest_that_fits
from hf_dualmoe.losses.adversarial import at_loss
from hf_dualmoe.models.experts_dualmoe import static_shapes
from hf_dualmoe.models.inputs_dualmoe import trusted_values
from hf_dualmoe.trainer.compiling import compile_networks
from hf_dualmoe.trainer.resumable import ResumableTrainer
from hf_dualmoe.trainer.static_step import WaitWatch
from hf_dualmoe.trainer.step_graph import StepGraph, why_eager
from hf_dualmoe.trainer.step_parts import share_buffers
from hf_dualmoe.trainer.trainer import RobustTrainer

SOFT = {"num_experts": 2, "router_top_k": 2, "shared_stages": 1}
SHARED_ATTACK = {"second_term": "ce", "second_attack": "shared"}
SHARED = {**SHARED_ATTACK, "standard_eps": 0.05}


def build(method, **fields):
    experts = {"num_experts": 1} if method in ("standard", "at", "trades") else SOFT
    return tiny_training.build(method, **{"router": "pooled", **experts, **fields})


@pytest.fixture(scope="module")
def noise():
    return tiny_training.noise(64)


@pytest.fixture
def train(tmp_path, noise):
    """train(method, graph=..., model=..., **arguments): a trainer that has trained."""

    def run(method, graph=False, model=None, recorder=None, callbacks=(), resume=None, **changes):
        settings = {"method": method, "attack_steps": 2, "max_steps": 6, "per_device_train_batch_size": 8}
        settings |= {"learning_rate": 0.05, "optim": "sgd", "logging_steps": 3, "crop_padding": 1}
        settings |= {"jtdmoe": SHARED, "rt_er": SHARED_ATTACK}.get(method, {})
        args = tiny_training.arguments(tmp_path / ("graph" if graph else "eager"), **{**settings, **changes})
        model = build(method) if model is None else model
        trainer = RobustTrainer(model, args, train_dataset=noise, eval_dataset=noise, callbacks=[*callbacks])
        if graph:
            trainer.step_graph = StepGraph(trainer, recorder=recorder or TapeRecorder(trainer))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def difference(left, right):
    """Largest difference of two models' weights and statistics."""
    pairs = zip(left.model.state_dict().values(), right.model.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def recorded(trainer):
    return trainer.step_graph.captures == 1 and trainer.step_graph.reason is None


def train_the_same(train, method, **options):
    """Two trainers, with and without a graph; their models are the same to the bit."""
    ordinary, graphed = (train(method, graph=graph, **options) for graph in (False, True))
    assert recorded(graphed) and difference(ordinary, graphed) == 0
    return ordinary, graphed


METHODS = ("standard", "at", "trades", "rt_er", "jtdmoe")
CASES = [
    (method, attack) for method in METHODS for attack in ("pgd", "nfgsm") if (method, attack) != ("standard", "nfgsm")
]


# --- few operations, and no waiting ----------------------------------------------------------------------------------


class Watched(TrainerCallback):
    """Watches the third step: forward, attack, backward, clipping, optimizer and moving average."""

    def __init__(self):
        self.watch = WaitWatch()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.watch.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.watch.__exit__(None, None, None)


@pytest.mark.parametrize(("method", "attack"), [*((m, "pgd") for m in METHODS), ("at", "nfgsm")])
def test_a_step_waits_for_nothing(method, attack, train):
    watched = Watched()
    options = {"training_attack": attack, "ema_decay": 0.9, "max_grad_norm": 0.1, "optim_args": "momentum=0.9"}
    options |= {"awp_gamma": 0.01, "clean_weight": 0.2 if method == "at" else 0.0}
    options["cutmix_prob"] = 0.5 if method in ("standard", "at", "trades") else 0.0
    train(method, callbacks=[watched], max_steps=3, attack_steps=1, logging_steps=100, **options)
    assert watched.watch.names == []


def test_the_watch_sees_what_waits():
    x = torch.rand(3)
    for wait in (lambda: x.sum().item(), lambda: x[x > 0.5], lambda: x.nonzero(), lambda: torch.tensor(0.5) * x):
        with WaitWatch() as watch:
            wait()
        assert watch.names
    with WaitWatch() as watch:
        torch.where(x > 0.5, x, 0).index_select(0, torch.arange(2))
    assert watch.names == []


def passes(attack, model, images, labels):
    with trusted_values(), Operations() as operations:
        attack(model, images, labels)
    return operations


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_pgd_step_has_few_more_operations_than_the_bare_network(dtype):
    model = build("at", backbone="resnet18").train()
    images, labels = torch.rand(4, 1, 10, 10), torch.randint(3, (4,))
    attacks = {steps: PGD(steps=steps, keep_best=False) for steps in (1, 11)}
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        attacks[1](model, images, labels)  # finds what can be folded
        one, eleven = (passes(attack, model, images, labels) for attack in attacks.values())
        with frozen(model), folded(model, images), Operations() as bare:
            points = images.clone().requires_grad_(True)
            loss = F.cross_entropy(model.experts[0](points).float(), labels, reduction="sum")
            torch.autograd.grad(loss, points)
    assert (eleven.total - one.total) / 10 <= 1.10 * (bare.total - 1)  # without the clone


def test_weights_are_cast_once_for_all_steps_of_an_attack():
    model = build("at").train()
    images, labels = torch.rand(4, 1, 10, 10), torch.randint(3, (4,))
    weights = {tuple(p.shape) for p in model.parameters() if p.ndim > 1}
    with torch.autocast("cpu", torch.bfloat16):
        PGD(steps=1, keep_best=False)(model, images, labels)
        counts = [
            sum(shape in weights for shape in passes(PGD(steps=steps, keep_best=False), model, images, labels).casts)
            for steps in (1, 10)
        ]
    assert counts[0] == counts[1] == sum(p.ndim > 1 for p in model.parameters())


def test_casting_weights_once_changes_nothing():
    model = build("at").eval()
    images = torch.rand(4, 1, 10, 10)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = model(images).logits
        with frozen(model), folded(model, images):
            assert model.experts[0].conv1.weight.dtype == torch.bfloat16
            held = model(images).logits
    torch.testing.assert_close(held, plain, rtol=0.05, atol=0.05)
    assert model.experts[0].conv1.weight.dtype == torch.float32


def test_an_attack_computes_no_balance_loss():
    model = build("rt_er")
    with frozen(model), torch.enable_grad():
        assert model(torch.rand(4, 1, 10, 10)).aux_loss is None
    assert model(torch.rand(4, 1, 10, 10)).aux_loss is not None


@pytest.mark.parametrize("attack", [PGD(eps=0.1, steps=3, keep_best=False), NFGSM(eps=0.1)])
def test_radii_may_be_tensors(attack):
    model, images, labels = build("at").eval(), torch.rand(4, 1, 10, 10), torch.randint(3, (4,))
    names = [name for name in ("eps", "step_size") if getattr(attack, name, None) is not None]
    other = type(attack)(**{**vars(attack), **{name: torch.tensor(getattr(attack, name)) for name in names}})
    results = []
    for a in (attack, other):
        torch.manual_seed(0)
        results.append(a(model, images, labels))
    assert torch.equal(*results)


@pytest.mark.parametrize("values", ["images", "labels"])
def test_batches_are_checked_on_the_host(values, train, noise):
    images, labels = noise.images.float() / 255, noise.labels.clone()
    (images if values == "images" else labels)[40] = 7
    items = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    trainer = train("at", max_steps=1)
    trainer.train_dataset = items
    trainer.args.max_steps = 6
    with pytest.raises(ValueError, match=f"{values} lie in"):
        trainer.train()


# --- all experts on all images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_static_shapes_are_the_same_function(top_k, training):
    """Logits, gradients and BatchNorm statistics, where images are routed, forced and counted twice."""
    results = []
    for static in (False, True):
        model = build("rt_er", num_experts=3, router_top_k=top_k, shared_stages=0).train(training)
        torch.manual_seed(1)
        images = torch.rand(12, 1, 10, 10, requires_grad=True)
        forced = torch.tensor([-1, 0, 1, 2] * 3)
        extra = torch.tensor([2, -1, 1, 0, 0, 1] * 2)
        with trusted_values(), static_shapes() if static else torch.enable_grad():
            output = model(images, expert_index=forced, extra_expert_index=extra)
        (output.logits.square().sum() + output.extra_logits.sum() + output.aux_loss).backward()
        gradients = [images.grad, *(p.grad for p in model.parameters())]
        results.append([output.logits, output.extra_logits, output.aux_loss, *gradients, *model.buffers()])
    for grouped, all_experts in zip(*results, strict=True):
        torch.testing.assert_close(all_experts, grouped, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 1])
def test_an_expert_with_one_image_or_none_keeps_its_statistics(rows):
    model = build("rt_er", router_top_k=1, shared_stages=0).train()
    before = [buffer.clone() for buffer in model.experts[1].buffers()]
    forced = torch.tensor([1] * rows + [0] * (6 - rows))
    with trusted_values(), static_shapes():
        logits = model(torch.rand(6, 1, 10, 10), expert_index=forced).logits
    assert logits.isfinite().all()
    for old, new in zip(before, model.experts[1].buffers(), strict=True):
        assert torch.equal(old, new)


# --- the graph -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "attack"),
    [case if "pgd" in case else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_replayed_steps_are_the_ordinary_ones_to_the_bit(method, attack, train):
    ordinary, graphed = train_the_same(train, method, training_attack=attack)
    assert graphed.step_graph.recorder.replays == 3
    for left, right in zip(ordinary.state.log_history, graphed.state.log_history, strict=True):
        own = {name: value for name, value in left.items() if "runtime" not in name and "per_second" not in name}
        assert {name: right[name] for name in own} == own
    assert torch.equal(*(torch.stack(list(t.watch._first.values())[:1]) for t in (ordinary, graphed)))


TOGETHER = {"eps_warmup_ratio": 0.9, "gradient_accumulation_steps": 3, "ema_decay": 0.9, "max_grad_norm": 0.01}
TOGETHER |= {"optim_args": "momentum=0.9", "weight_decay": 5e-4, "label_smoothing_factor": 0.1, "max_steps": 5}
TOGETHER |= {"eval_strategy": "steps", "eval_steps": 3, "eval_attack_steps": 1}
SETTINGS = {
    "together": TOGETHER,
    "eps warm-up": {"eps_warmup_ratio": 0.9},
    "bf16": {"bf16": True},
    "l2": {"norm": "l2"},
    "adamw": {"optim": "adamw_torch"},
    "perturbed weights": {"awp_gamma": 0.05, "weight_decay": 0.1},
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS if name != "together"]


@pytest.mark.parametrize("name", ["together", *SLOW])
def test_settings_train_the_same_in_a_graph(name, train):
    train_the_same(train, "jtdmoe", **SETTINGS[name])


def test_clean_images_and_perturbed_weights_train_the_same_in_a_graph(train):
    both = train_the_same(train, "at", clean_weight=0.3, awp_gamma=0.05)
    assert both[1].step_graph.recorder.replays == 3
    logs = [[e["loss_ce"] for e in t.state.log_history if "loss_ce" in e] for t in both]
    assert logs[0] == logs[1] and len(logs[0]) == 2


def test_a_model_that_changes_is_recorded_anew(train):
    """Its layers begin to learn one after the other; a model that is never the same is left alone."""

    class Unfreeze(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            model.experts[0].fc.requires_grad_(state.global_step >= 6)

    runs = [train("standard", graph=graph, callbacks=[Unfreeze()], max_steps=12) for graph in (False, True)]
    assert runs[1].step_graph.captures == 2 and runs[1].step_graph.reason is None
    assert difference(*runs) == 0

    class Count(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            model.seen = state.global_step

    counting = train("standard", graph=True, callbacks=[Count()], max_steps=12)
    assert "was changed" in counting.step_graph.reason


@pytest.mark.parametrize("second", ["own", pytest.param("shared", marks=pytest.mark.slow)])
def test_hard_routing_trains_the_same_in_a_graph(second, train):
    """Up to rounding: statistics over some of the rows are summed in another order."""
    fields = {"router_top_k": 1, "shared_stages": 0}
    options = {"second_term": "kl", "second_attack": second, "max_steps": 6}
    trainers = [train("rt_er", graph=graph, model=build("rt_er", **fields), **options) for graph in (False, True)]
    assert recorded(trainers[1])
    assert difference(*trainers) < 1e-4


def test_last_smaller_batch_is_eager_and_said(train, caplog):
    options = {"per_device_train_batch_size": 10, "max_steps": 8}
    with caplog.at_level(logging.WARNING):
        ordinary, graphed = (train("at", graph=graph, **options) for graph in (False, True))
    assert difference(ordinary, graphed) == 0
    assert sum("batches of 4 images" in record.getMessage() for record in caplog.records) == 1


def test_a_resumed_graph_goes_on_as_if_unbroken(train, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5, "ema_decay": 0.9, "max_steps": 9}
    unbroken = train("at", graph=True, **options)
    resumed = train("at", graph=True, resume=str(tmp_path / "graph" / "checkpoint-5"), **options)
    assert recorded(resumed)
    assert difference(unbroken, resumed) == 0


# --- fallbacks -------------------------------------------------------------------------------------------------------


def test_a_cpu_is_said_to_be_the_reason(train, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = train("at", max_steps=2)
        assert "CUDA GPU" in trainer.step_graph.reason
        train("at", max_steps=2, step_graph="off")
    assert sum("launched one by one" in record.getMessage() for record in caplog.records) == 1


class FailingRecorder(TapeRecorder):
    def __init__(self):
        super().__init__(None)

    def record(self, function):
        raise RuntimeError("operation not permitted when stream is capturing")


class StaleRecorder(TapeRecorder):
    """A graph that does not see the batch: the kind of mistake that would train on wrong gradients."""

    def __init__(self):
        super().__init__(None)

    def record(self, function):
        result = function()
        frozen_result = [None if g is None else torch.randn_like(g) for g in result.gradients]

        def replay():
            for gradient, stale in zip(result.gradients, frozen_result, strict=True):
                if gradient is not None:
                    gradient.copy_(stale)

        return result, replay


def test_a_recording_that_failed_or_gives_wrong_gradients_is_thrown_away(train, caplog):
    ordinary = train("at")
    with caplog.at_level(logging.WARNING):
        for recorder, reason in ((FailingRecorder(), "operation not permitted"), (StaleRecorder(), "differed")):
            trainer = train("at", graph=True, recorder=recorder)
            assert reason in trainer.step_graph.reason and difference(ordinary, trainer) == 0
    assert sum("recording failed" in record.getMessage() for record in caplog.records) == 1


class Waiting(nn.Module):
    """A classifier that looks at its images."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(100, 3))

    def forward(self, images):
        return self.net(images if images.sum().item() > 0 else images)


def test_a_model_that_waits_is_named(train):
    trainer = train("at", graph=True, model=Waiting())
    assert trainer.step_graph.recorder.replays == 0
    assert "_local_scalar_dense" in trainer.step_graph.reason


def test_batches_with_more_than_images_and_labels_are_named(train):
    trainer = train("at", graph=True)
    graph = StepGraph(trainer, recorder=TapeRecorder(trainer))
    graph.begin()
    batch = {"pixel_values": torch.zeros(2, 1, 10, 10), "labels": torch.zeros(2, dtype=torch.int64)}
    assert not graph.takes({**batch, "weights": torch.ones(2)})
    assert "batches hold labels, pixel_values, weights" in graph.reason


REASONS = {
    "on_nan_loss": {"on_nan_loss": "skip"},
    "checkpointing": {"gradient_checkpointing": True},
    "lomo": {"optim": "adalomo"},
    "float16": {"fp16": True},
    "reduce-overhead": {"torch_compile": True, "torch_compile_mode": "reduce-overhead"},
    "several processes": {"parallel_mode": ParallelMode.DISTRIBUTED},
}


def test_on_one_gpu_a_step_is_recorded_unless_a_setting_forbids_it(train, monkeypatch):
    trainer = train("at", max_steps=1)
    monkeypatch.setattr(type(trainer.args), "device", torch.device("cuda"))
    assert why_eager(trainer) is None
    for word, changes in REASONS.items():
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                where = type(trainer.args) if name == "parallel_mode" else trainer.args
                patch.setattr(where, name, value)
            assert word in why_eager(trainer)

    class Other(RobustTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    trainer.__class__ = Other
    assert "compute_loss" in why_eager(trainer)


def test_buffers_are_shared_in_one_broadcast_per_type(monkeypatch):
    model, sent = build("jtdmoe"), []

    def broadcast(tensor, src):
        sent.append(tensor.dtype)
        tensor.fill_(3)

    for name, value in {"is_initialized": lambda: True, "get_world_size": lambda: 2, "broadcast": broadcast}.items():
        monkeypatch.setattr(torch.distributed, name, value)
    share_buffers(model)
    assert sorted(sent, key=str) == [torch.float32, torch.int64]
    assert all((buffer == 3).all() for buffer in model.buffers())


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "size", "expected"), [(100, 512, 96), (5, 8, 5), (0, 64, 0), (1, 2, 1)])
def test_the_largest_batch_is_found_by_halving(limit, size, expected):
    assert largest_that_fits(lambda n: n <= limit, size) == expected


def test_a_batch_that_does_not_fit_names_the_largest_that_does(train, monkeypatch):
    real = RobustTrainer.run_objective

    def small(self, model, images, *args):
        if len(images) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, model, images, *args)

    monkeypatch.setattr(RobustTrainer, "run_objective", small)
    with pytest.raises(
        torch.OutOfMemoryError, match="in a trial is 5. .*batch_size 5 --gradient_accumulation_steps 2"
    ):
        train("at", max_steps=1)
    trainer = train("at", graph=True, auto_find_batch_size=True)  # accelerate takes smaller ones itself then
    assert recorded(trainer) and trainer._train_batch_size <= 5


def test_an_evaluation_that_does_not_fit_beside_the_graph_takes_its_place(train, monkeypatch, caplog):
    real, failed = ResumableTrainer.evaluation_loop, []

    def once(self, *args, **kwargs):
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ResumableTrainer, "evaluation_loop", once)
    options = {"eval_strategy": "steps", "eval_steps": 5, "eval_attack_steps": 0}
    with caplog.at_level(logging.WARNING):
        trainer = train("standard", graph=True, **options)
    assert "evaluation needs its memory" in trainer.step_graph.reason
    assert any("eval_sa" in entry for entry in trainer.state.log_history)


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_networks_are_folded_and_compile_once(train):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    model, images, labels = build("rt_er"), torch.rand(4, 1, 10, 10), torch.randint(3, (4,))
    compile_networks(model, backend=count)
    assert foldable_pairs(model.eval(), images)
    counts = []
    for _ in range(3):
        at_loss(model.train(), images, labels, attack=PGD(steps=2, keep_best=False)).loss.backward()
        counts.append(len(graphs))
    assert counts[0] > 0 and counts[1] == counts[2]
    plain = build("rt_er")
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(images).logits, plain.eval()(images).logits)


@pytest.mark.slow
def test_compiled_networks_train_the_same_in_a_graph(train):
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    ordinary, graphed = train("jtdmoe"), train("jtdmoe", graph=True, **options)
    assert recorded(graphed)
    assert difference(ordinary, graphed) < 1e-5
    assert any("compile_seconds" in entry for entry in graphed.state.log_history)
