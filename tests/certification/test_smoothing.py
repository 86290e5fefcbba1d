"""Randomized smoothing: coverage by simulation, classifiers with known probabilities, the dual rule, abstentions."""

import math
from statistics import NormalDist

import pytest
import torch
from scipy.stats import binomtest
from torch import nn

from hf_dualmoe import DualMoEForImageClassification
from hf_dualmoe.certification.certifier import Certificates
from hf_dualmoe.certification.smoothing import (
    Votes,
    certify_votes,
    lower_probability,
    noise_block,
    sample_votes,
    smoothed_certificates,
    smoothed_radius,
)

PHI = NormalDist()


class HalfSpace(nn.Module):
    """Class 1 where <w, x - 1/2> > offset, so that all its smoothed probabilities are known (far from clipping)."""

    def __init__(self, offset=0.0, classes=3):
        super().__init__()
        self.register_buffer("weight", torch.tensor([3.0, -4.0, 0.0, 0.0]) / 5)
        self.offset, self.classes = offset, classes
        self.rows = []

    def forward(self, images):
        self.rows.append(len(images))
        score = (images.flatten(1) - 0.5) @ self.weight - self.offset
        return torch.stack([torch.zeros_like(score), score, *[score - 100] * (self.classes - 2)], dim=1)


def points(distances):
    """Images (B, 1, 2, 2) at given distances from the half-space's border."""
    weight = HalfSpace().weight
    return (0.5 + torch.tensor(distances)[:, None] * weight).view(-1, 1, 2, 2)


def test_lower_bound_is_clopper_pearson():
    cases = (0, 50, 0.999), (1, 50, 0.999), (40, 50, 0.9), (999, 1000, 0.999), (1000, 1000, 0.999)
    for count, n, confidence in cases:
        expected = binomtest(count, n, alternative="greater").proportion_ci(confidence, method="exact").low
        found = float(lower_probability(torch.tensor([count]), n, confidence))
        assert found == pytest.approx(expected, rel=1e-4) and found <= expected


@pytest.mark.parametrize("probability", [0.3, 0.55, 0.9, 0.97])
def test_coverage_by_simulation(probability):
    """The bound exceeds the truth in at most 1 - confidence of many experiments, and not in much fewer."""
    generator = torch.Generator().manual_seed(0)
    experiments, n, confidence = 4000, 200, 0.9
    hits = torch.binomial(
        torch.full((experiments,), float(n)), torch.full((experiments,), probability), generator=generator
    )
    wrong = float((lower_probability(hits, n, confidence) > probability).double().mean())
    assert 0.03 < wrong < 0.1 + 3 * math.sqrt(0.1 * 0.9 / experiments)


def test_certificates_of_a_known_classifier_are_right_as_often_as_stated():
    """True smoothed radius of a half-space: the distance to its border. At 90 % confidence some exceed it, few do."""
    sigma, distance, confidence = 0.05, 0.04, 0.9
    images = points([distance]).expand(600, 1, 2, 2)
    model = HalfSpace().eval()
    votes = sample_votes(model, images, sigma=sigma, n0=20, n=100, seed=1)
    certificates = certify_votes(votes, confidence=confidence)
    wrong = (certificates.radius > distance) | ((certificates.prediction != 1) & ~certificates.radius.isnan())
    share = float(wrong.double().mean())
    assert 0.02 < share < 0.1 + 3 * math.sqrt(0.1 * 0.9 / 600)
    precise = certify_votes(sample_votes(model, images[:5], sigma=sigma, n=20_000), confidence=0.999)
    assert (precise.radius <= distance).all() and (precise.radius > 0.93 * distance).all()


def test_radius_formula():
    probability = torch.tensor([0.5, 0.6, 0.99], dtype=torch.float64)
    expected = [0.5 * PHI.inv_cdf(p) for p in (0.5, 0.6, 0.99)]
    assert smoothed_radius(probability, 0.5).tolist() == pytest.approx(expected, abs=1e-5)
    assert (smoothed_radius(probability, 0.5) <= torch.tensor(expected, dtype=torch.float64)).all()
    needed = PHI.inv_cdf(1 / 1.6)
    dual = smoothed_radius(probability, 0.5, alpha=0.8)
    assert dual.tolist() == pytest.approx([0.5 * (PHI.inv_cdf(p) - needed) for p in (0.5, 0.6, 0.99)], abs=1e-5)
    assert float(smoothed_radius(torch.zeros(1), 0.5)) == -math.inf


@pytest.mark.parametrize("alpha", [0.6, 0.8, 0.95])
def test_dual_rule_by_brute_force(alpha):
    """With the exact q of a half-space and the worst F_S, F_D keeps class 1 inside the radius and loses it outside."""
    sigma, distance = 0.2, 0.3
    radius = float(smoothed_radius(torch.tensor([PHI.cdf(distance / sigma)]).double(), sigma, alpha))
    assert radius > 0

    def class_one_wins(moved):
        q = PHI.cdf((distance - moved) / sigma)  # moved straight to the border: the worst direction
        return alpha * q > (1 - alpha) * 1.0 + alpha * (1 - q)  # F_S is sure of the runner-up

    assert all(class_one_wins(radius * share) for share in (0.0, 0.5, 0.9, 1.0))
    assert not class_one_wins(1.001 * radius)


def test_votes_depend_on_neither_batches_nor_neighbours():
    model, images = HalfSpace().eval(), points([0.01, -0.02, 0.03, 0.05])
    ids = torch.tensor([7, 3, 9, 1])
    options = {"sigma": 0.05, "n0": 30, "n": 250}
    whole = sample_votes(model, images, **options, ids=ids, batch_size=10_000)
    assert len(set(whole.counts.tolist())) > 1
    for batch_size in (1, 70, 128):
        again = sample_votes(model, images, **options, ids=ids, batch_size=batch_size)
        assert torch.equal(again.counts, whole.counts) and torch.equal(again.selected, whole.selected)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(
        sample_votes(model, images[order], **options, ids=ids[order], batch_size=50).counts, whole.counts[order]
    )
    other = sample_votes(model, images, **options, ids=ids, seed=1)
    assert not torch.equal(other.counts, whole.counts)


def test_batches_are_as_large_as_asked_and_samples_as_many():
    model = HalfSpace().eval()
    votes = sample_votes(model, points([0.02]), sigma=0.05, n0=30, n=250, batch_size=128)
    assert max(model.rows) <= 128 and sum(model.rows) == 280 and votes.num_samples == 250
    assert noise_block((1, 2, 2), 0, 0, 0, 0).ne(noise_block((1, 2, 2), 0, 0, 1, 0)).all()  # selection is separate


def test_noise_is_drawn_where_the_image_is(monkeypatch):
    devices = []
    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *args, **kw: (devices.append(kw.pop("device")), draw(*args, **kw))[1])
    sample_votes(HalfSpace().eval(), points([0.02]), sigma=0.05, n0=10, n=10)
    assert devices and all(torch.device(device) == torch.device("cpu") for device in devices)
    with pytest.raises((RuntimeError, AssertionError)):  # a generator of that device, which this machine lacks
        noise_block((1, 2, 2), 0, 0, 0, 0, device="xpu")


def test_the_class_is_chosen_on_other_noise_than_is_counted():
    seen = []

    def classifier(images):
        seen.append(images)
        return images.flatten(1)

    sample_votes(classifier, points([0.0]), sigma=0.1, n0=10, n=10)
    chosen_on, counted = seen
    assert not torch.isin(counted, chosen_on).any()


def test_noisy_images_stay_in_range():
    seen = []

    def classifier(images):
        seen.append(images)
        return torch.stack([images.flatten(1).sum(dim=1), torch.zeros(len(images))], dim=1)

    sample_votes(classifier, torch.rand(2, 1, 4, 4), sigma=1.0, n=50)
    values = torch.cat([x.flatten() for x in seen])
    assert values.min() == 0 and values.max() == 1


def test_too_few_samples_and_wavering_votes_abstain():
    votes = Votes(torch.tensor([1, 1]), torch.tensor([6, 6]), 6, 0.25)  # 0.001 ** (1/6) = 0.32 even if all agree
    found = certify_votes(votes)
    assert found.status == ["abstain"] * 2 and found.radius.isnan().all() and found.prediction.tolist() == [-1, -1]
    votes = Votes(torch.tensor([0, 0, 0]), torch.tensor([500, 560, 1000]), 1000, 0.25)
    found = certify_votes(votes)
    assert found.status == ["abstain", "certified", "certified"] and found.confidence == 0.999
    assert found.rule == ["", "smoothing", "smoothing"] and found.norm == "l2"
    dual = certify_votes(votes, alpha=0.8)
    assert dual.status == ["abstain", "abstain", "certified"] and dual.rule[2] == "dual over smoothing"
    assert float(dual.radius[2]) < float(found.radius[2])


def test_dual_model_is_certified_through_its_robust_part(toy_dual, toy_data):
    images, robust = toy_data.images / 255, toy_dual.robust
    dual = DualMoEForImageClassification.from_models(toy_dual.standard, robust, alpha=0.8)
    options = {"sigma": 0.05, "n0": 20, "n": 60}
    own, through = (smoothed_certificates(model, images[:4], **options) for model in (robust, dual))
    assert isinstance(through, Certificates)
    votes = sample_votes(robust, images[:4], **options)
    assert torch.equal(through.radius.nan_to_num(), certify_votes(votes, alpha=0.8).radius.nan_to_num())
    assert torch.equal(own.radius.nan_to_num(), certify_votes(votes).radius.nan_to_num())
    assert (~own.radius.isnan()).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0.0}, "sigma=0.0 must be finite and > 0"),
        ({"sigma": -1.0}, "sigma=-1.0"),
        ({"sigma": math.nan}, "sigma=nan"),
        ({"n": 0}, "n=0 must be an integer of at least 1"),
        ({"n0": 0}, "n0=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"confidence": 1.0}, r"confidence=1.0 must be in \(0, 1\)"),
        ({"alpha": 0.8}, "no dial"),
    ],
    ids=repr,
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        smoothed_certificates(HalfSpace().eval(), points([0.1]), **{"sigma": 0.1, **options})


def test_bad_models(make_dual, images):
    with pytest.raises(ValueError, match="train mode"):
        smoothed_certificates(HalfSpace().train(), points([0.1]), sigma=0.1)
    for alpha in (0.5, 0.0):
        with pytest.raises(ValueError, match=r"must be in \(1/2, 1\]"):
            smoothed_certificates(make_dual(), images, sigma=0.1, alpha=alpha)
    with pytest.raises(ValueError, match="NaN or infinite"):
        sample_votes(lambda x: torch.full((len(x), 2), math.nan), points([0.1]), sigma=0.1)
    with pytest.raises(ValueError, match=r"counts=\[7\] must lie in"):
        lower_probability(torch.tensor([7]), 6)
    with pytest.raises(ValueError, match="probability="):
        smoothed_radius(torch.tensor([1.2]), 0.1)
