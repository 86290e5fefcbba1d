"""How often an attack makes a device wait: counted on a CPU, by the operations that need an answer from it.

What the model itself waits for, such as the sizes of the groups that a hard route makes, is not the attack's.
"""

import sys

import pytest
import torch
from test_worst_case import EPS, lever, linear_moe, readout, shown  # noqa: F401 - a fixture
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dualmoe.attacks import square
from hf_dualmoe.attacks.adaptive_union import worst_case
from hf_dualmoe.attacks.apgd import APGD
from hf_dualmoe.attacks.fab import FAB
from hf_dualmoe.attacks.square import Square

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "bincount"}


class Waits(TorchDispatchMode):
    """Counts them; an index by a mask is a `nonzero` below this level."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        masks = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        waiting = name in WAITS or any(mask is not None and mask.dtype == torch.bool for mask in masks)
        self.count += waiting and not in_model()
        return function(*args, **(kwargs or {}))


def in_model():
    """Whether code of the model is running."""
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.endswith("_dualmoe.py"):
        frame = frame.f_back
    return frame is not None


def waits(work, *args, **kwargs):
    with Waits() as found:
        work(*args, **kwargs)
    return found.count


@pytest.fixture
def soft():
    """A mixture of all its experts, whose own forward does not wait."""
    return linear_moe([readout(10, 2), readout(10, 2)], lever(), router_top_k=2)


def per_step(attack, few, many):
    """Waits that a step costs: the difference of two runs, one of which is longer."""
    return (waits(attack, many) - waits(attack, few)) / (many - few)


def test_mask_index_counts():
    x = torch.arange(3)
    assert waits(lambda: x[x > 1]) == 1 and waits(lambda: x[x]) == 0 and waits(lambda: x.sum().item()) == 1


def test_apgd_waits_once_a_step(soft, shown):  # noqa: F811
    def attack(steps):
        APGD(eps=1e-3, steps=steps)(soft, *shown)

    assert per_step(attack, 10, 30) <= 1


def test_fab_waits_once_a_step(soft, shown):  # noqa: F811
    def attack(steps):
        FAB(eps=1e-3, steps=steps, target_classes=1)(soft, *shown)

    assert per_step(attack, 10, 30) <= 1


def test_square_waits_twice_a_step(soft, shown, monkeypatch):  # noqa: F811
    """Each query of the images, which never fall, is a step; a list of one size ends with one more look."""

    monkeypatch.setattr(square, "LARGEST", 0.01)  # one size for all of them

    def attack(queries):
        Square(eps=1e-3, queries=queries)(soft, *shown)

    assert per_step(attack, 20, 60) <= 2


def test_worst_case_waits_once_a_step(soft, shown):  # noqa: F811
    members = ["whole ce", "route to expert 1", "expert 0", "soft T=1"]

    def attack(steps):
        worst_case(soft, *shown, eps=1e-3, steps=steps, members=members)

    assert per_step(attack, 10, 30) <= len(members)


def test_waiting_does_not_grow_with_the_images_that_leave(soft, shown):  # noqa: F811
    """With a radius that breaks them one after the other, a step waits as often."""
    images, labels = shown
    images = images.repeat(8, 1, 1, 1) + 0.2 * torch.linspace(-1, 1, 48).view(-1, 1, 1, 1) * (images[:1] > 0.7)
    images, labels = images.clamp(0, 1), labels.repeat(8)
    most = waits(lambda: APGD(eps=0.3, steps=20)(soft, images, labels))
    assert most <= 20 + waits(lambda: APGD(eps=0.3, steps=1)(soft, images, labels))
    assert worst_case(soft, images, labels, eps=EPS, steps=2, members=["whole ce"]).clean_correct.any()
