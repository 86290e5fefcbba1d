"""AutoAttack that searches in bf16: what counts is the fp32 model, and what fp32 would find is not lost on the way."""

import json

import pytest
import torch
from test_autoattack import Killed
from torch import nn

from hf_dualmoe.attacks.auto_attack import VERSIONS, autoattack
from hf_dualmoe.attacks.auto_attack_run import final_attack

EPS = 0.15
SMALL = 0.08  # for a model trained without attacks


@pytest.fixture(autouse=True)
def short_budgets(monkeypatch):
    budgets = {"apgd-ce": {"steps": 10}, "apgd-t": {"steps": 10, "target_classes": 3}, "square": {"queries": 40}}
    monkeypatch.setitem(VERSIONS, "short", budgets)


def union(model, images, labels, attack_dtype="bf16", **settings):
    settings = {"eps": EPS, "version": "short", "progress": False, **settings}
    return autoattack(model, images, labels, attack_dtype=attack_dtype, **settings)


class Switched(nn.Module):
    """One function of the images in fp32, another under autocast; four classes."""

    def __init__(self, full, half):
        super().__init__()
        self.probe, self.full, self.half = nn.Linear(2, 2), full, half
        self.eval()

    def forward(self, images):
        in_half = self.probe(images.new_zeros(1, 2)).dtype == torch.bfloat16
        return (self.half if in_half else self.full)(images)


def lead(images, by):
    """Class 0 leads the next by `by`, less the mean change of the pixels from 1/2; gradients flow."""
    moved = (0.5 - images).flatten(1).mean(dim=1)
    return torch.stack([by - moved, *(torch.full_like(moved, -other) for other in range(3))], dim=1)


def solid(*leads):
    """Which images an attack of radius EPS breaks is known: those whose lead is smaller."""
    images = torch.full((len(leads), 1, 4, 4), 0.5)
    return images, torch.zeros(len(leads), dtype=torch.int64)


def test_an_image_that_falls_in_half_precision_alone_does_not_count():
    model = Switched(lambda x: lead(x, 1.0), lambda x: -lead(x, 1.0))
    result = union(model, *solid(1.0, 1.0, 1.0))
    assert result.robust.all() and result.robust_accuracy == 1 and torch.equal(result.adversarial, solid(1, 1, 1)[0])
    assert result.sources == {"confirmed": 0, "again_in_fp32": 0, "survivors_in_fp32": 0, "not_confirmed": 3}


def test_where_half_precision_fails_at_once_the_same_attack_runs_in_full():
    """The image leaves a search at its first point: the model is wrong there, in bf16, and has no more to find."""
    model = Switched(lambda x: lead(x, 0.1), lambda x: -lead(x, 1.0))
    images, labels = solid(0.1, 0.1)
    result, plain = union(model, images, labels), union(model, images, labels, "fp32")
    assert not result.robust.any() and result.broken_by.tolist() == [1, 1]
    assert torch.equal(result.adversarial, plain.adversarial) and plain.sources == {}
    assert result.sources == {"confirmed": 0, "again_in_fp32": 2, "survivors_in_fp32": 0, "not_confirmed": 0}


def test_what_survives_a_blind_search_is_attacked_in_full():
    model = Switched(lambda x: lead(x, 0.1), lambda x: lead(0.5 + 0 * x, 1.0))
    result = union(model, *solid(0.1, 0.1))
    assert list(result.accuracy) == ["clean", "apgd-ce", "apgd-t", "square", "apgd-t fp32"]
    assert [*result.accuracy.values()] == [1, 1, 1, 1, 0] and result.broken_by.tolist() == [4, 4]
    assert result.sources == {"confirmed": 0, "again_in_fp32": 0, "survivors_in_fp32": 2, "not_confirmed": 0}
    assert result.name.endswith("searched in bf16; each success confirmed in fp32, survivors attacked by apgd-t fp32")
    assert json.loads(json.dumps(result.to_dict()))["sources"] == result.sources
    assert not result.flags["square_stronger"].raised


def test_a_trained_model_is_no_more_robust_than_in_full_precision(trained_digits_moe):
    """By not more than one image: searches of this length differ by that from seed to seed."""
    model, images, labels = trained_digits_moe
    images, labels = images[:30], labels[:30]
    plain, result = (union(model, images, labels, dtype, eps=SMALL) for dtype in ("fp32", "bf16"))
    assert 0.2 < plain.robust_accuracy < 0.8
    assert torch.equal(result.clean_correct, plain.clean_correct)
    assert result.robust.sum() <= plain.robust.sum() + 1
    found = model(result.adversarial).logits.argmax(dim=1) == labels
    assert torch.equal(found, result.robust)  # in fp32
    assert (result.adversarial - images).abs().max() <= SMALL + 1e-6
    attacked = (result.broken_by > 0).sum().item()
    assert sum(result.sources[name] for name in ("confirmed", "again_in_fp32", "survivors_in_fp32")) == attacked
    assert result.sources["confirmed"] > 0.5 * attacked


@pytest.mark.parametrize(
    "classes,name,passes", [(2, "apgd-ce fp32", 3), (3, "apgd-dlr fp32", 3), (9, "apgd-t fp32", 3)]
)
def test_the_last_attack_fits_the_number_of_classes(classes, name, passes):
    found, attack = final_attack(classes, EPS, "linf", seed=4)
    assert found == name and attack.seed == 5 and attack.eps == EPS
    assert attack.restarts * (attack.target_classes if attack.objective == "dlr_targeted" else 1) == passes


def test_a_killed_search_goes_on_in_its_precision(toy_dual, toy_data, tmp_path):
    settings = {"eps": 0.01, "state_file": tmp_path / "state.safetensors"}
    model, images, labels = toy_dual.robust, toy_data.images / 255, toy_data.labels
    expected = union(model, images, labels, eps=0.01, batch_size=7)
    with pytest.raises(KeyboardInterrupt):
        union(Killed(model, at=60), images, labels, batch_size=7, **settings)
    with pytest.raises(ValueError, match="belongs to another run .*attack_dtype: 'bf16' there, 'fp32' here"):
        union(Killed(model), images, labels, "fp32", **settings)
    for batch_size in (7, 100):
        result = union(Killed(model), images, labels, batch_size=batch_size, **settings)
        assert torch.equal(result.broken_by, expected.broken_by) and result.sources == expected.sources
        assert torch.equal(result.adversarial, expected.adversarial)
    assert (expected.broken_by > 0).any() and (expected.broken_by < 0).any()


def test_another_precision_is_refused(trained_digits_moe):
    model, images, labels = trained_digits_moe
    with pytest.raises(ValueError, match="attack_dtype='fp16' is not one of 'fp32', 'bf16'"):
        union(model, images, labels, "fp16")
