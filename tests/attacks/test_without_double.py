"""Attacks on a device without float64, as Apple GPUs are."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_dualmoe.attacks import APGD, FAB, PGD, Square, base, fab, square

ON_THE_CPU = {"aten::rand.generator", "aten::stack", "aten::_to_copy"}  # what Square draws before it is moved


class WithoutDouble(TorchDispatchMode):
    """Stands for a device that has neither float64 nor frexp."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.name()
        doubles = any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(out))
        if "frexp" in name or (doubles and name not in ON_THE_CPU):
            raise NotImplementedError(f"{name} in float64")
        return out


@pytest.fixture
def no_double(monkeypatch):
    for module in (fab, square):
        monkeypatch.setattr(module, "widest_float", lambda device: torch.float32)


def test_apple_gpus_have_no_wider_float_than_float32():
    assert base.widest_float(torch.device("mps")) == torch.float32
    assert base.widest_float(torch.device("cpu")) == base.widest_float(torch.device("cuda")) == torch.float64


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", [PGD, APGD, FAB, Square])
def test_attacks_need_no_double_precision(kind, norm, no_double, resnet_moe, images, labels):
    size = {"queries": 20} if kind is Square else {"steps": 5}
    attack = kind(eps=0.1 if norm == "linf" else 0.5, norm=norm, **size)
    attack(resnet_moe, images, labels)  # Square keeps its patterns, which it makes on the CPU
    with WithoutDouble():
        found = attack(resnet_moe, images, labels)
    delta = (found - images).flatten(1)
    assert (delta.abs().amax(dim=1) if norm == "linf" else delta.norm(dim=1)).max() <= attack.eps + 1e-5
    assert found.min() >= 0 and found.max() <= 1
