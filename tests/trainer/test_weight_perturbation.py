"""`awp_gamma`: the gradient is that at the worst weights nearby, the weights stay, and all else works as before."""

import copy
import math

import pytest
import tiny_training
import torch
import torch.nn.functional as F
from torch import nn

from hf_dualmoe.attacks.nfgsm import NFGSM
from hf_dualmoe.losses.adversarial import at_loss, standard_loss
from hf_dualmoe.trainer import weight_perturbation
from hf_dualmoe.trainer.arguments import METHODS
from hf_dualmoe.trainer.checks import check_weight_perturbation
from hf_dualmoe.trainer.trainer import RobustTrainer
from hf_dualmoe.trainer.weight_perturbation import ascent_step, averaged, perturbed_loss

UNATTACKED = {"attack": lambda model, images, labels: images}


@pytest.fixture
def trainer_of(tmp_path):
    """trainer_of(model, folder, method=..., ...): a trainer on 60 images of noise."""

    def make(model, folder="run", **changes):
        settings = {"awp_gamma": 0.05, "eval_attack_steps": 0, "max_steps": 2, "learning_rate": 0.01}
        settings |= {"logging_steps": 1, "horizontal_flip": False}
        args = tiny_training.arguments(tmp_path / folder, **{**settings, **changes})
        return RobustTrainer(model, args, train_dataset=tiny_training.noise())

    return make


# --- the loss --------------------------------------------------------------------------------------------------------


def test_the_gradient_is_that_at_the_worst_weights_and_no_weight_moves(make_moe, images, labels):
    """Against the same by hand, on a copy whose weights are moved in place."""
    gamma = 0.05
    model, images = make_moe(num_experts=1).double().train(), images.double()  # kinks of ReLU are far apart then
    by_hand, other = copy.deepcopy(model), copy.deepcopy(model)
    weights = {name: p for name, p in other.named_parameters() if p.ndim > 1}
    loss = at_loss(other, images, labels, **UNATTACKED).loss
    gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True))
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            if gradients.get(name) is not None and gradients[name].any():  # the router of one expert has none
                parameter += gamma * gradients[name] * (parameter.norm() / gradients[name].norm())
    expected = at_loss(by_hand, images, labels, **UNATTACKED).loss
    expected.backward()

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    output = perturbed_loss(at_loss, model, images, labels, UNATTACKED, gamma=gamma)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5) and output.loss > loss
    theirs = dict(by_hand.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])  # to the bit
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5)
    for (name, buffer), moved in zip(model.named_buffers(), by_hand.buffers(), strict=True):
        torch.testing.assert_close(buffer, moved, msg=name)  # moved once, by the perturbed network


def test_a_vanishing_step_is_the_plain_loss(make_moe, images, labels):
    plain, model = make_moe().train(), make_moe().train()
    expected = at_loss(plain, images, labels, **UNATTACKED).loss
    expected.backward()
    found = perturbed_loss(at_loss, model, images, labels, UNATTACKED, gamma=1e-9).loss
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None)
        if other.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-5)


def test_images_are_attacked_once_and_repeated_in_order(make_moe, images, labels):
    model, attack, seen = make_moe().train(), NFGSM(eps=0.1), []
    calls = []

    def counted(*args):
        calls.append(1)
        return attack(*args)

    def objective(model, images, labels, *, attack, forward=None):
        seen.append([attack(model, images, labels) for _ in range(2)])
        return at_loss(model, images, labels, attack=lambda *args: seen[-1][0], forward=forward)

    perturbed_loss(objective, model, images, labels, {"attack": counted}, gamma=0.01)
    assert len(calls) == 2 and not torch.equal(*seen[0])
    assert all(torch.equal(first, again) for first, again in zip(*seen, strict=True))


def test_a_step_has_the_length_that_is_asked_for():
    weight, gradient = torch.randn(5, 3), 1e-4 * torch.randn(5, 3)
    step = ascent_step(weight, gradient, 0.02)
    assert step.norm().item() == pytest.approx(0.02 * weight.norm().item(), rel=1e-5)
    assert F.cosine_similarity(step.flatten(), gradient.flatten(), dim=0).item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(ascent_step(weight, torch.zeros(5, 3), 0.02), torch.zeros(5, 3))


def test_processes_perturb_by_their_mean_gradient(monkeypatch):
    gradients = [torch.randn(4, 3), torch.randn(2, 5)]
    assert averaged(gradients) is gradients
    monkeypatch.setattr(weight_perturbation, "several_processes", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: flat.add_(torch.ones_like(flat)))
    for own, mean in zip(gradients, averaged(gradients), strict=True):  # the other process has ones
        torch.testing.assert_close(mean, (own + 1) / 2)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_at_perturbed_weights(method, trainer_of):
    if method == "certified":
        pytest.importorskip("deel.torchlip")
    logged, moved = {}, {}
    for gamma in (0.0, 0.05):
        torch.manual_seed(3)
        model = tiny_training.build(method)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        options = {"standard_eps": 0.05} if method == "jtdmoe" else {}
        trainer = trainer_of(model, method=method, awp_gamma=gamma, **options)
        trainer.train()
        logged[gamma] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        moved[gamma] = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        counts = {int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")}
        assert counts <= {2}  # two steps
    assert len(logged[0.05]) == 2 and all(math.isfinite(loss) for loss in logged[0.05])
    assert logged[0.05][0] > logged[0.0][0]  # the same images, at worse weights
    assert moved[0.05] == moved[0.0] != set()


def test_each_accumulated_batch_has_a_perturbation_of_its_own(trainer_of):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(100, 8), nn.ReLU(), nn.Linear(8, 3))
    start, batches = copy.deepcopy(model), []
    plain = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer = trainer_of(model, method="standard", max_steps=1, gradient_accumulation_steps=3, **plain)
    compute_loss = trainer.compute_loss

    def recorded(model, inputs, **kwargs):
        batches.append((inputs["pixel_values"] / 255, inputs["labels"]))
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = recorded
    trainer.train()
    assert len(batches) == 3
    for images, labels in batches:
        (perturbed_loss(standard_loss, start, images, labels, {}, gamma=0.05).loss / 3).backward()
    for parameter, expected in zip(model.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), (expected - 0.1 * expected.grad).detach())


@pytest.mark.slow  # without a perturbation, `test_trainer.py` compiles in seconds
def test_compiled_networks_take_the_same_steps(trainer_of):
    runs = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        runs.append(trainer_of(tiny_training.build("at"), **compiled))
        runs[-1].train()
    for name, value in runs[0].model.state_dict().items():
        torch.testing.assert_close(runs[1].model.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_recomputed_activations_are_refused(trainer_of):
    with pytest.raises(ValueError, match="awp_gamma=0.05 does not work with gradient checkpointing"):
        trainer_of(tiny_training.build("at"), gradient_checkpointing=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("is_deepspeed_enabled", "DeepSpeed"),
        ("is_fsdp_enabled", r"weights that are spread over processes \(FSDP\)"),
    ],
)
def test_weights_that_cannot_be_replaced_are_refused(name, message, trainer_of):
    trainer = trainer_of(tiny_training.build("at"))
    setattr(trainer, name, True)
    with pytest.raises(ValueError, match=f"awp_gamma=0.05 does not work with {message}"):
        check_weight_perturbation(trainer)
    trainer.args.awp_gamma = 0.0
    check_weight_perturbation(trainer)
