"""Sanity checks: an honest model passes all; models that hide their gradients, or misbehave, are named."""

import copy
import json
from dataclasses import asdict

import pytest
import torch
from torch import nn

from hf_dualmoe.data.datasets import load_splits
from hf_dualmoe.evaluation.sanity import (
    Check,
    gap_check,
    large_radius_check,
    monotone_check,
    run_sanity_checks,
    suspicious,
    worst_case_check,
)

EPS = 0.12
NAMES = {
    *("batch_size", "eps_monotone", "steps_monotone", "large_eps", "stronger_attack"),
    *("random_output", "probability_output", "zero_gradients", "square_stronger", "changing_model"),
}


class After(nn.Module):
    """A model with a function after its logits."""

    def __init__(self, model, after):
        super().__init__()
        self.model, self.after = model, after
        self.eval()

    def forward(self, images):
        return self.after(self.model(images))


class HardRouter(nn.Module):
    """Routes by arg-max, which has no gradient, to experts that each know one class and hardly look at the image."""

    def __init__(self, model):
        super().__init__()
        self.router = model
        self.experts = nn.Parameter(5 * torch.eye(10))
        self.eval()

    def forward(self, images):
        route = self.router(images).argmax(dim=1)
        return self.experts[route] + 1e-3 * images.flatten(1)[:, :10]


class CountingCalls(nn.Module):
    """Keeps statistics of what it is shown although it is in eval mode."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("seen", torch.zeros(()))
        self.eval()

    def forward(self, images):
        self.seen += len(images)
        return self.model(images)


@pytest.fixture(scope="module")
def trained():
    """A small network with BatchNorm that has learned the digits."""
    torch.manual_seed(0)
    train = load_splits("digits").train
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(train.images / 255), train.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.zero_grad()
    return model.eval()


@pytest.fixture
def digits(trained):
    """A copy of that network, and 60 images that it has not seen."""
    return copy.deepcopy(trained), load_splits("digits").test.take(60)


def checks_of(model, dataset, **settings):
    defaults = {"eps": EPS, "steps": 16, "square_queries": 40, "num_images": 30, "progress": False}
    return run_sanity_checks(model, dataset, **{**defaults, **settings})


@pytest.mark.parametrize("norm,eps", [("linf", EPS), ("l2", 0.4)])
def test_an_honest_model_passes_and_comes_back_as_it_was(digits, norm, eps):
    model, dataset = digits
    model.train()
    before = copy.deepcopy(model.state_dict())
    checks = checks_of(model, dataset, norm=norm, eps=eps)
    assert suspicious(checks) == []
    assert set(checks) == NAMES
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    ra = checks["eps_monotone"].values["ra"]
    assert ra[0] > 80 and ra[0] > ra[2] and checks["large_eps"].values["ra"] <= ra[-1]
    assert checks["steps_monotone"].values["steps"] == [1, 5, 16]
    assert checks["steps_monotone"].values["ra"][-1] == ra[2] == checks["stronger_attack"].values["pgd"]
    assert checks["stronger_attack"].values["gap"] >= 0
    assert checks["zero_gradients"].values["correct"] > 20
    assert json.loads(json.dumps({name: asdict(check) for name, check in checks.items()}))["batch_size"]["passed"]


def test_results_do_not_depend_on_the_batch_size(digits):
    model, dataset = digits
    small, large = (
        checks_of(model, dataset, batch_size=size, num_images=12, steps=3, square_queries=5) for size in (7, 256)
    )
    for name in ("eps_monotone", "steps_monotone", "large_eps", "stronger_attack", "square_stronger"):
        assert small[name] == large[name]


def one_hot(logits):
    return 100.0 * nn.functional.one_hot(logits.argmax(dim=1), 10)


def dishonest(model):
    """Name -> model, and the checks that must name it."""
    return {
        "rounded": (After(model, lambda z: z.round()), {"zero_gradients", "square_stronger", "large_eps"}),
        "one_hot": (After(model, one_hot), {"zero_gradients", "square_stronger", "large_eps", "stronger_attack"}),
        "saturated": (After(model, lambda z: 1e4 * z), {"zero_gradients", "stronger_attack", "large_eps"}),
        "hard_router": (HardRouter(model), {"square_stronger", "large_eps"}),
        "noisy": (After(model, lambda z: z + 0.1 * torch.randn_like(z)), {"random_output", "batch_size"}),
        "probabilities": (After(model, lambda z: z.softmax(dim=1)), {"probability_output"}),
        "counting": (CountingCalls(model), {"changing_model"}),
        "batch_mean": (After(model, lambda z: z - z.mean(dim=0)), {"batch_size"}),
    }


CASES = ["rounded", "one_hot", "saturated", "hard_router", "noisy", "probabilities", "counting", "batch_mean"]


@pytest.mark.parametrize("case", CASES)
def test_a_dishonest_model_is_named(digits, case):
    model, dataset = digits
    wrapped, expected = dishonest(model)[case]
    checks = checks_of(wrapped, dataset)
    reasons = suspicious(checks)
    assert expected <= {reason.split(":")[0] for reason in reasons}, reasons
    if case == "one_hot":
        assert "not run: no gradient flows" in checks["eps_monotone"].message
    if case == "counting":  # all attacks still work on it
        assert {reason.split(":")[0] for reason in reasons} == expected


# --- judgements ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "accuracies,num_images,passed",
    [
        ([90, 50, 50, 10], 1000, True),
        ([90, 50, 51, 10], 1000, True),  # the tolerance is one point ...
        ([90, 50, 51.1, 10], 1000, False),
        ([90, 50, 54, 10], 25, True),  # ... or one image
        ([90, 50, 54.1, 10], 25, False),
        ([90, 50, 50.9, 51.8], 1000, False),  # small rises add up
        ([10, 90], 1000, False),
    ],
)
def test_monotone_check(accuracies, num_images, passed):
    check = monotone_check(accuracies, range(len(accuracies)), "eps", num_images)
    assert check.passed is passed
    assert ("rises" in check.message) is not passed
    assert check.values["ra"] == accuracies and check.values["eps"] == list(range(len(accuracies)))


@pytest.mark.parametrize("stronger,passed", [(43.1, True), (43.0, False), (60.0, True)])
def test_gap_check(stronger, passed):
    assert gap_check(50.0, stronger).passed is passed


@pytest.mark.parametrize("standing,classes,passed", [(5, 10, True), (6, 10, False), (1, 200, False), (0, 200, True)])
def test_large_radius_check(standing, classes, passed):
    check = large_radius_check(torch.arange(100) < standing, 0.5, classes)
    assert check.passed is passed and check.values["ra"] == pytest.approx(standing)
    assert check.values["interval"][0] <= standing <= check.values["interval"][1]


def test_worst_case_check():
    assert worst_case_check({"whole": 40.0, "expert 0": 50.0, "union": 40.0}).passed
    assert not worst_case_check({"whole": 40.0, "expert 0": 39.0, "union": 40.0}).passed
    for keys in ({"whole": 40.0}, {"union": 40.0}):
        with pytest.raises(ValueError, match="expected 'union' and at least one member"):
            worst_case_check(keys)


def test_suspicious_names_what_failed():
    assert suspicious({"a": Check(True, "fine"), "b": Check(False, "broken")}) == ["b: broken"]


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"eps": 0.0}, "eps=0.0 must be > 0"),
        ({"eps": 8.0}, "eps=8.0"),
        ({"norm": "l1"}, "norm='l1'"),
        ({"steps": 0}, "steps=0 must be an integer"),
        ({"num_images": 0}, "num_images=0"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_settings_out_of_range_are_refused(digits, settings, message):
    with pytest.raises(ValueError, match=message):
        checks_of(*digits, **settings)


def test_a_model_that_returns_nan_is_refused(digits):
    model, dataset = digits
    with pytest.raises(ValueError, match="NaN"):
        checks_of(After(model, lambda z: z * float("nan")), dataset)
