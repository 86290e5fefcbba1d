"""The dial: sweep against single measurements, choices on made-up sweeps, calibrated mixing where it helps."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_dualmoe.attacks.adaptive_union import worst_case
from hf_dualmoe.attacks.pgd import PGD
from hf_dualmoe.data.datasets import ImageTensorDataset
from hf_dualmoe.evaluation.batches import correct_mask
from hf_dualmoe.evaluation.calibration import _Candidate, _Mixture, calibrate_robust_logits
from hf_dualmoe.evaluation.dial import (
    AlphaChoice,
    DialedModel,
    choose_alpha,
    dial_attack,
    sweep_alpha,
)

SWEEP = [
    {"alpha": 0.0, "sa": 95.0, "ra": 2.0},
    {"alpha": 0.5, "sa": 93.0, "ra": 30.0},
    {"alpha": 0.7, "sa": 90.0, "ra": 48.5},
    {"alpha": 0.8, "sa": 90.0, "ra": 49.0},
    {"alpha": 0.9, "sa": 86.0, "ra": 50.0},
    {"alpha": 1.0, "sa": 84.0, "ra": 50.0},
]


@pytest.fixture
def model(toy_dual):
    return toy_dual


@pytest.fixture
def dataset(toy_data):
    return toy_data


ATTACK = PGD(eps=0.02, steps=3, seed=0)


# --- sweep -----------------------------------------------------------------------------------------------------------


def test_sweep_attacks_each_alpha_at_that_alpha(model, dataset):
    sweep = sweep_alpha(model, dataset, attack=ATTACK, alphas=(1.0, 0.0, 0.6), batch_size=9, progress=False)
    assert [point["alpha"] for point in sweep] == [1.0, 0.0, 0.6]
    for point in sweep:
        dialed = DialedModel(model, point["alpha"])
        clean, attacked = correct_mask(dialed, dataset), correct_mask(dialed, dataset, attack=ATTACK)
        assert point["sa"] == pytest.approx(100 * float(clean.double().mean()))
        assert point["ra"] == pytest.approx(100 * float((clean & attacked).double().mean()))
    assert sweep[1]["sa"] == pytest.approx(100 * 18 / 23) and sweep[1]["ra"] < sweep[1]["sa"]
    assert model.config.alpha == 0.6 and not model.training


@pytest.mark.parametrize("alphas", [(), (0.5, 1.2), (-0.1,), (float("nan"),)])
def test_sweep_refuses_alphas(model, dataset, alphas):
    with pytest.raises(ValueError, match=r"alphas=.* each in \[0, 1\]"):
        sweep_alpha(model, dataset, attack=ATTACK, alphas=alphas, progress=False)


# --- choice ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "floors,alpha,rule",
    [
        ({"min_sa": 93.0}, 0.5, "highest RA with SA of at least 93 %"),
        ({"min_sa": 90.0}, 0.8, "highest RA"),
        ({"min_sa": 80.0}, 1.0, "highest RA"),  # a tie: the larger alpha
        ({"min_ra": 30.0}, 0.5, "highest SA with RA of at least 30 %"),
        ({"min_ra": 48.0}, 0.8, "highest SA"),  # a tie: the larger alpha
        ({"min_ra": 49.5}, 0.9, "highest SA"),
        ({}, 0.8, "highest SA with RA at most 1.5 points below the highest of the dial"),
        ({"min_sa": 93.00001}, 0.5, "highest RA"),  # rounding, as accuracies are computed in float32
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_choice_follows_its_rule_in_any_order(floors, alpha, rule, order):
    choice = choose_alpha(SWEEP[::order], **floors)
    point = next(point for point in SWEEP if point["alpha"] == alpha)
    assert isinstance(choice, AlphaChoice)
    assert (choice.alpha, choice.sa, choice.ra) == (alpha, point["sa"], point["ra"])
    assert rule in choice.rule


def test_the_default_rule_compares_with_the_highest_of_the_dial():
    """Not with F_R alone: 0.7 is no place to be where 0.9 is that much better on the same images."""
    points = [(0.7, 92.0, 48.6), (0.8, 90.0, 49.1), (0.9, 86.0, 50.5), (1.0, 84.0, 50.0)]
    sweep = [{"alpha": alpha, "sa": sa, "ra": ra} for alpha, sa, ra in points]
    assert choose_alpha(sweep).alpha == 0.8


@pytest.mark.parametrize("num_classes,objective", [(2, "margin"), (3, "dlr")])
def test_dials_are_chosen_with_the_dlr_loss_where_there_are_three_classes(num_classes, objective):
    attack = dial_attack(num_classes, eps=0.1, norm="l2", seed=5)
    assert (attack.eps, attack.norm, attack.steps, attack.seed) == (0.1, "l2", 20, 5)
    assert attack.members == (f"whole {objective}", "alpha=0.5", "alpha=0.9", "soft T=1")


def test_the_dial_attack_judges_each_position_with_these_members_of_the_union(model, dataset):
    attack, images, labels = dial_attack(4, eps=0.02, steps=3, seed=1), dataset.images / 255, dataset.labels
    found = attack(DialedModel(model, 0.9), images, labels)
    assert model.config.alpha == 0.6
    turned = copy.deepcopy(model)
    turned.set_alpha(0.9)
    settings = {"eps": 0.02, "steps": 3, "seed": 1, "members": attack.members, "own_accuracy": False}
    expected = worst_case(turned, images, labels, **settings)
    assert list(expected.union) == ["clean", "whole dlr", "alpha=0.5", "alpha=0.9", "soft T=1"]
    assert torch.equal(found, expected.adversarial)
    assert 0 < (found - images).abs().max() <= 0.02 + 1e-6


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"min_sa": 96.0}, r"min_sa=96.0 cannot be reached: the best SA of the sweep is 95.00 %, at alpha = 0\."),
        ({"min_ra": 51}, r"min_ra=51 cannot be reached: the best RA of the sweep is 50.00 %"),
        ({"min_ra": 50, "min_sa": 80}, "give one floor"),
        ({"sweep": []}, "sweep is empty"),
    ],
)
def test_choice_says_what_cannot_be_done(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_alpha(**{"sweep": SWEEP, **arguments})


# --- calibrated mixing -----------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Logits = scale * three of the pixels."""

    dtype = torch.float32

    def __init__(self, scale, pixels):
        super().__init__()
        self.scale, self.pixels = nn.Parameter(torch.tensor(scale)), pixels

    def forward(self, images):
        return SimpleNamespace(logits=self.scale * images.flatten(1)[:, self.pixels])


class Toy(nn.Module):
    """A dual model of two linear classifiers, each with pixels of its own."""

    def __init__(self, standard_pixels=slice(3, 6)):
        super().__init__()
        self.standard, self.robust = Linear(200.0, standard_pixels), Linear(1.0, slice(0, 3))
        self.normalize_standard, self.normalize_robust = nn.Identity(), nn.Identity()
        self.config = SimpleNamespace(mixing="probs", robust_logit_map=None, standard_logit_map=None)
        self.eval()


@pytest.fixture(scope="module")
def toy_images():
    """40 images (1, 2, 3): F_S is always right and always fragile at eps = 0.1.

    F_R is right and stays so on 28, where its logits are 0.95, 0.45, 0.45; on 12 it is wrong with 0.5, 0.2, 0.2. Its
    margin on the former under attack is that on the latter clean, so that only a map of the logits tells them apart.
    """
    labels = torch.arange(40) % 3
    hard = torch.arange(40) >= 28
    images = torch.full((40, 2, 3), 0.45)
    images[torch.arange(40), 0, labels] = 0.95
    images[hard, 0] = 0.2
    images[hard, 0, (labels[hard] + 1) % 3] = 0.5
    images[torch.arange(40), 1, labels] = 0.52
    return ImageTensorDataset((255 * images[:, None]).round().to(torch.uint8), labels, ["a", "b", "c"])


TOY_ATTACK = PGD(eps=0.1, steps=10, seed=0)
GRID = {"scales": (1.0, 16.0), "clamps": (None, 0.0), "powers": (1.0, 4.0), "alphas": (0.6, 0.8, 0.96)}


def test_calibration_finds_the_map_that_helps(toy_images):
    toy = Toy()
    result = calibrate_robust_logits(toy, toy_images, attack=TOY_ATTACK, **GRID, batch_size=17, progress=False)
    assert result["robust"] == pytest.approx({"sa": 70, "ra": 70}) and result["ra_floor"] == pytest.approx(68.95)
    assert result["before"]["robust_logit_map"] is None and result["before"]["alpha"] == 0.96
    assert result["before"]["sa"] == pytest.approx(70)  # at a dial where F_S may not decide anything
    assert result["accepted"] and result["robust_logit_map"]["power"] == 4.0
    assert result["alpha"] == result["after"]["alpha"]
    assert (result["after"]["sa"], result["after"]["ra"]) == pytest.approx((100, 70))
    assert result["gain_sa"] == pytest.approx(30.0) and result["gain_ra"] == pytest.approx(0.0)
    assert json.loads(json.dumps(result))["attack"]["steps"] == 10
    assert toy.config.robust_logit_map is None and toy.standard.scale.requires_grad


def test_calibration_admits_that_nothing_was_gained(toy_images):
    toy = Toy(standard_pixels=slice(0, 3))  # F_S knows no more than F_R
    result = calibrate_robust_logits(toy, toy_images, attack=TOY_ATTACK, **GRID, progress=False)
    assert not result["accepted"] and result["gain_sa"] == 0.0
    assert result["robust_logit_map"] == result["before"]["robust_logit_map"] is None
    assert result["alpha"] == result["before"]["alpha"]


def test_calibration_does_not_accept_what_a_real_attack_breaks(toy_images, monkeypatch):
    """An estimate that sees no attack picks a mapped F_S; that is more accurate, but the measurement turns it down."""

    def blind(run, logit_map, alpha):
        return _Candidate(logit_map, alpha, sa=50 * alpha if logit_map is None else 100 - 40 * alpha, ra=100.0)

    monkeypatch.setattr("hf_dualmoe.evaluation.calibration._Calibration._estimate", blind)
    settings = {**GRID, "alphas": (0.05,), "progress": False}
    result = calibrate_robust_logits(Toy(), toy_images, attack=TOY_ATTACK, **settings)
    assert (result["before"]["alpha"], result["after"]["alpha"]) == (1.0, 0.05)
    assert result["after"]["estimated_ra"] == 100.0 and result["after"]["ra"] == 0.0
    assert result["gain_sa"] == pytest.approx(30) and result["gain_ra"] == pytest.approx(-70)
    assert not result["accepted"] and result["robust_logit_map"] is None and result["alpha"] == 1.0


class OnlyMargin(PGD):
    """Finds nothing unless it is asked for the margin, as it is for F_R alone."""

    def __call__(self, model, images, labels, *, ids=None):
        return super().__call__(model, images, labels, ids=ids) if self.objective == "margin" else images


def test_calibration_counts_the_attack_on_the_robust_model_against_the_mixtures(toy_images):
    attack = OnlyMargin(eps=0.4, steps=10, seed=0)
    settings = {"scales": (1.0,), "clamps": (None,), "powers": (1.0,), "alphas": (1.0,), "progress": False}
    result = calibrate_robust_logits(Toy(), toy_images, attack=attack, **settings)
    assert result["robust"]["ra"] == result["before"]["ra"] == 0.0 and result["before"]["sa"] == pytest.approx(70)


class Helpful(PGD):
    """Changes each image into one that F_R takes for what it is."""

    def __call__(self, model, images, labels, *, ids=None):
        return torch.zeros_like(images).flatten(1).scatter(1, labels[:, None], 1.0).view_as(images)


def test_calibration_counts_no_image_as_robust_that_is_wrong_when_clean(toy_images):
    settings = {"scales": (1.0,), "clamps": (None,), "powers": (1.0,), "alphas": (1.0,), "progress": False}
    result = calibrate_robust_logits(Toy(), toy_images, attack=Helpful(), **settings)
    assert result["before"]["ra"] == result["before"]["sa"] == pytest.approx(70)


def test_calibration_measures_the_model_that_it_proposes(model, dataset):
    """Both settings, applied to the real model, have the reported SA, and at least the reported worst-case RA."""
    grid = {"scales": (0.5, 8.0), "clamps": (None, 0.1), "powers": (2.0,), "alphas": (0.3, 0.7)}
    state = copy.deepcopy(model.config.to_dict())
    result = calibrate_robust_logits(model, dataset, attack=ATTACK, **grid, batch_size=10, progress=False)
    assert model.config.to_dict() == state
    for part in (result["before"], result["after"]):
        other = copy.deepcopy(model)
        other.config.robust_logit_map = part["robust_logit_map"]
        other.set_alpha(part["alpha"])
        clean, attacked = correct_mask(other, dataset), correct_mask(other, dataset, attack=ATTACK)
        assert part["sa"] == pytest.approx(100 * float(clean.double().mean()))
        assert part["ra"] <= 100 * float((clean & attacked).double().mean()) + 1e-6


@pytest.mark.parametrize("logit_map", [None, {"scale": 3.0, "clamp": 0.2, "power": 2.0}])
def test_the_mixture_that_is_searched_is_that_of_the_model(model, dataset, logit_map):
    other = copy.deepcopy(model)
    other.config.standard_logit_map = {"scale": 0.7}
    images = dataset.images / 255
    with torch.no_grad():
        found = _Mixture(other, _Candidate(logit_map, 0.4))(images)
        other.config.robust_logit_map = logit_map
        torch.testing.assert_close(found, other(images, alpha=0.4).logits)


@pytest.mark.parametrize(
    "changed,message",
    [
        ({"scales": ()}, r"scales=\(\) must hold at least one"),
        ({"powers": (1.0, 0.0)}, r"powers=\(1.0, 0.0\).* each > 0"),
        ({"clamps": ()}, r"clamps=\(\)"),
        ({"alphas": (2.0,)}, r"alphas=\[2.0\]"),
        ({"ra_share": 0.0}, "ra_share=0.0"),
        ({"ra_share": 1.5}, "ra_share=1.5"),
    ],
)
def test_calibration_refuses_settings_out_of_range(toy_images, changed, message):
    with pytest.raises(ValueError, match=message):
        calibrate_robust_logits(Toy(), toy_images, attack=TOY_ATTACK, **{**GRID, **changed}, progress=False)


def test_calibration_needs_a_mixture_of_probabilities(toy_images):
    toy = Toy()
    toy.config.mixing = "logits"
    with pytest.raises(ValueError, match="mixing='logits'"):
        calibrate_robust_logits(toy, toy_images, attack=TOY_ATTACK, progress=False)
