"""The speed benchmarks compare what they say they compare, and what makes attacks cheap does not change them."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dualmoe.attacks.apgd import APGD, PassCounter
from hf_dualmoe.attacks.base import frozen
from hf_dualmoe.attacks.folding import foldable_pairs, folded
from hf_dualmoe.attacks.pgd import PGD
from hf_dualmoe.attacks.steps import ce_objective, value_and_gradient
from hf_dualmoe.models.outputs import logits_of

BENCHMARKS = Path(__file__).parents[2] / "training" / "benchmarks"
TINY = ["--device", "cpu", "--repeats", "1", "--width", "0.125", "--image_size", "8", "--batch_size", "6"]


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def by_name(name):
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return by_name


# --- timing ----------------------------------------------------------------------------------------------------------


def test_alternatives_take_turns_after_the_warm_up(load):
    timing, calls = load("speed_timing"), []
    alternatives = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = timing.interleaved(alternatives, repeats=3, device="cpu", warmup=2)
    assert calls == ["a", "b"] * 5
    assert all(len(times[name][clock]) == 3 for name in "ab" for clock in ("wall", "cpu"))


@pytest.mark.parametrize(
    ("limits", "own", "ratio", "holds"),
    [
        ({"at_most": 1.1}, [1.0, 2.2, 9.0], 1.1, True),
        ({"at_most": 1.0}, [1.0, 2.2, 9.0], 1.1, False),
        ({"at_least": 2.0}, [0.5, 0.9, 4.0], 2.0, True),
        ({"at_least": 2.5}, [0.5, 0.9, 4.0], 2.0, False),
        ({}, [1.0, 2.2, 9.0], 1.1, None),
    ],
)
def test_row_is_the_median_of_the_ratios_inside_rounds(load, limits, own, ratio, holds):
    timing = load("speed_timing")
    half = {clock: [0.5, 1.0, 2.0] for clock in ("wall", "cpu")}
    times = {"own": {"wall": [7.0] * 3, "cpu": own}, "b": half, "c": half}
    row = timing.compare("x", times, "own", ["b", "c"], "cpu", **limits)
    assert row["ratio"] == pytest.approx(ratio) and row["holds"] is holds and row["clock"] == "cpu"
    assert timing.compare("x", times, "own", ["b", "c"], "cuda", **limits)["clock"] == "wall"
    assert row["what"] in timing.cells(row)


@pytest.mark.parametrize(
    ("script", "options", "rows"),
    [
        ("speed_moe_step", [], 4),
        ("speed_pgd", ["--steps", "2"], 1),
        ("speed_training_step", ["--steps", "1", "--idle_batches", "1"], 3),
        ("speed_experts", ["--experts", "2", "--batches", "3"], 2),
        ("speed_levers", ["--steps", "1"], 13),
    ],
)
def test_script_writes_what_it_prints(script, options, rows, load, tmp_path, capsys):
    module, threads = load(script), torch.get_num_threads()
    result = module.main([*TINY, *options, "--output", str(tmp_path / "speed.json")])
    torch.set_num_threads(threads)
    written = json.loads((tmp_path / "speed.json").read_text())
    assert written["rows"] == json.loads(json.dumps(result["rows"])) and len(written["rows"]) >= rows
    assert written["environment"]["packages"]["torch"] and written["settings"]["batch_size"] == 6
    printed = capsys.readouterr().out
    assert all(row["what"] in printed and row["ratio"] >= 0 for row in written["rows"])


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


# --- scale -----------------------------------------------------------------------------------------------------------


def test_plan_for_many_devices(load, tmp_path):
    scale = load("speed_scale")
    options = ["--probe_batch", "4", "--memory_gb", "0.02", "--gpus", "1", "2", "64"]
    options += ["--output", str(tmp_path / "scale.json")]
    result = scale.main([*TINY, *options])
    one, two, many = result["plan"]
    assert one["gb_per_step"] == 0 and one["efficiency"] == 1
    assert two["gb_per_step"] == pytest.approx(4e-9 * result["parameters"])  # 2 * (2 - 1) / 2 times the gradients
    assert many["efficiency"] < two["efficiency"] < 1 and many["images_per_second"] > two["images_per_second"]
    assert abs(result["kept"]["error"]) < 0.1
    peaks = [(row["num_experts"], row["batch"]) for row in result["peaks"]]
    experts = peaks[0][0]
    assert peaks[:2] == [(experts, 8), (experts, 16)] and (2 * experts, 8) in peaks
    assert all(row["predicted"] <= 2e7 and abs(row["error"]) < 0.5 for row in result["peaks"])


@pytest.mark.parametrize(
    "path", sorted((BENCHMARKS.parent / "accelerate_configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_accelerate_reads_its_configs(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= config.num_machines >= 1 and config.mixed_precision in ("no", "bf16")
