"""What makes attacks cheap does not change them: folded BatchNorm, frozen weights, and what Square passes over."""

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dualmoe.attacks import APGD, PGD, Square, frozen
from hf_dualmoe.attacks.apgd import PassCounter
from hf_dualmoe.attacks.folding import foldable_pairs, folded
from hf_dualmoe.attacks.square import _Streams, propose_l2, propose_linf, start_l2, start_linf, window_size
from hf_dualmoe.attacks.steps import ce_objective, margin_objective, per_image, value_and_gradient
from hf_dualmoe.models import logits_of

# --- folding ---------------------------------------------------------------------------------------------------------


def moved_statistics(model):
    """Give BatchNorms statistics and gains that are not those of a fresh model."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.3)
    return model.eval()


class Net(nn.Module):
    """A convolution and a BatchNorm, wired as `order` says."""

    def __init__(self, order="conv, norm", norm=nn.BatchNorm2d):
        super().__init__()
        self.order, self.conv, self.norm = order, nn.Conv2d(3, 3, 3, padding=1, bias=order != "conv, norm"), norm(3)

    def forward(self, x):
        if self.order == "norm, conv":
            x = self.conv(self.norm(x))
        elif self.order == "conv seen twice":
            y = self.conv(x)
            x = y + self.norm(y)
        elif self.order == "norm after two":
            x = self.norm(self.conv(x)) + self.norm(x)
        else:
            x = self.norm(self.conv(x))
        return x.mean(dim=(2, 3))


@pytest.mark.parametrize("order", ["conv, norm", "conv with bias, norm"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
def test_folded_model_is_the_same_function_and_comes_back(order, norm):
    model, images = moved_statistics(Net(order, norm)), torch.rand(4, 3, 8, 8)
    expected, state = model(images), {name: t.clone() for name, t in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    calls = []
    with pytest.raises(ArithmeticError), frozen(model), folded(model, images):
        assert not isinstance(model.conv.weight, nn.Parameter)
        torch.testing.assert_close(model(images), expected)
        calls.append("folded")
        raise ArithmeticError
    assert calls == ["folded"] and all(p is parameters[name] for name, p in model.named_parameters())
    assert torch.equal(model(images), expected) and "forward" not in model.norm.__dict__
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("order", ["norm, conv", "conv seen twice", "norm after two"])
def test_what_cannot_be_folded_is_left_alone(order):
    model, images = moved_statistics(Net(order)), torch.rand(4, 3, 8, 8)
    assert foldable_pairs(model, images) == []


def test_training_mode_hooks_and_nested_blocks_stop_folding():
    model, images = moved_statistics(Net()), torch.rand(4, 3, 8, 8)
    assert len(foldable_pairs(model, images)) == 1
    with folded(model.train(), images):
        assert isinstance(model.conv.weight, nn.Parameter)
    handle = model.eval().norm.register_forward_hook(lambda *_: None)
    with folded(model, images):
        assert isinstance(model.conv.weight, nn.Parameter)
    handle.remove()
    with folded(model, images), folded(model, images):
        once = model(images)
    torch.testing.assert_close(once, model(images))


def test_all_experts_are_folded_and_the_trial_is_not_noticed(resnet_moe):
    model, images = moved_statistics(resnet_moe), torch.rand(2, 3, 30, 30)
    seen = []
    model.trunk.register_forward_pre_hook(lambda *_: seen.append(1))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    random_state = torch.get_rng_state()
    assert len(foldable_pairs(PassCounter(model), images)) == len(norms) and not seen
    assert torch.equal(torch.get_rng_state(), random_state)
    labels = torch.zeros(2, dtype=torch.long)
    attacks = (PGD(steps=3, seed=1), APGD(steps=3))
    attacked = [attack(model, images, labels) for attack in attacks]
    for module in norms:
        module.register_forward_hook(lambda *_: None)  # no folding any more
    for attack, with_folding in zip(attacks, attacked, strict=True):
        difference = (attack(model, images, labels) - with_folding).abs() > 1e-5  # a sign may turn near zero
        assert difference.double().mean() < 0.02


# --- low precision, weight gradients, budgets ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_confident_images_are_not_flushed_in_half_precision(dtype):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 4))
    images, labels = torch.rand(16, 3, 2, 2), torch.zeros(16, dtype=torch.long)

    def confident(x):
        return logits_of(net, x) + torch.tensor([14.0, 0, 0, 0])  # cross-entropy's gradient is about 1e-6

    exact, _, value = value_and_gradient(confident, images, labels, ce_objective)
    with torch.autocast("cpu", dtype):
        low, _, _ = value_and_gradient(confident, images, labels, ce_objective)
    assert value.max() < 1e-4 and low.dtype == torch.float32
    assert (low.sign() == exact.sign()).double().mean() > 0.97
    torch.testing.assert_close(low, exact, rtol=0.1, atol=0.05 * float(exact.abs().max()))


def test_scaling_the_gradient_changes_no_bit_in_single_precision(resnet_moe):
    images, labels = torch.rand(5, 3, 30, 30), torch.arange(5)
    with frozen(resnet_moe):
        gradient, logits, value = value_and_gradient(resnet_moe, images, labels, ce_objective)
        points = images.clone().requires_grad_(True)
        plain = ce_objective(logits_of(resnet_moe, points), labels)
        torch.testing.assert_close(gradient, torch.autograd.grad(plain.sum(), points)[0], rtol=1e-6, atol=0)
    assert torch.equal(value, plain.detach())


class CountWeightGradients(TorchDispatchMode):
    """Counts convolution backwards, and those of them that computed a gradient of the weights."""

    def __init__(self):
        super().__init__()
        self.backwards = self.for_weights = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            self.backwards += 1
            self.for_weights += args[-1][1]
        return function(*args, **(kwargs or {}))


def test_attacks_compute_no_weight_gradients(resnet_moe):
    images, labels = torch.rand(3, 3, 30, 30), torch.arange(3)
    with CountWeightGradients() as training:
        logits_of(resnet_moe, images).sum().backward()
    with CountWeightGradients() as attack:
        PGD(steps=2, keep_best=False)(resnet_moe, images, labels)
    assert training.for_weights > 0 and attack.backwards > 0 and attack.for_weights == 0


# --- Square ----------------------------------------------------------------------------------------------------------


def one_after_the_other(attack, model, images, labels):
    """The search as the paper writes it: every query is asked."""
    linf = attack.norm == "linf"
    start, propose = (start_linf, propose_linf) if linf else (start_l2, propose_l2)
    found = images.clone()
    for i in range(len(images)):
        image, label = images[i : i + 1], labels[i : i + 1]
        streams, current, best = _Streams(torch.tensor([i]), attack.seed, images.device), image, -torch.inf
        if logits_of(model, image).argmax() != label:
            continue
        for query in range(attack.queries):
            side = window_size(max(query, 1), attack.queries, images.shape, attack.norm)
            if query == 0:
                proposal = start(image, attack.eps, streams)
            else:
                proposal = propose(image, current, attack.eps, side, streams.draw((2 if linf else 5) + image.shape[1]))
            logits = logits_of(model, proposal)
            margin, wrong = margin_objective(logits, label), bool(logits.argmax() != label)
            if wrong or margin > best:
                current, best = torch.where(per_image(torch.tensor([True]), image), proposal, current), margin
            if wrong:
                break
        found[i] = current[0]
    return found


@pytest.mark.parametrize(
    ("norm", "eps", "shape"), [("linf", 0.02, (1, 5, 6)), ("linf", 0.02, (3, 7, 6)), ("l2", 0.3, (2, 7, 6))]
)
def test_square_finds_what_asking_every_query_finds(norm, eps, shape):
    torch.manual_seed(0)
    size = torch.Size(shape).numel()
    model = nn.Sequential(nn.Flatten(), nn.Linear(size, 12), nn.Tanh(), nn.Linear(12, 4)).double().eval()
    images = torch.rand(7, *shape, dtype=torch.float64)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    labels[0] = (labels[0] + 1) % 4
    attack, counter = Square(eps=eps, norm=norm, queries=300, seed=4), PassCounter(model)
    attacked = attack(counter, images, labels)
    with torch.no_grad():
        expected = one_after_the_other(attack, model, images, labels)
        standing = model(attacked).argmax(dim=1) == labels
    assert torch.equal(attacked, expected) and 0 < standing.sum() < 7
    if norm == "linf" and shape[0] == 1:
        assert counter.forward_rows < 0.6 * 300 * int(standing.sum())
