"""The theorems behind the certificates by brute force: floors of margins on toys in the plane."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_dualmoe.certification.lipschitz import LipschitzBound
from hf_dualmoe.certification.margin_floors import (
    HardGateFloor,
    NetworkFloor,
    SoftGateFloor,
    largest_radius,
    logit_margins,
    probability_margins,
    soft_gate_slope,
)
from hf_dualmoe.certification.operator_norms import dual_norm
from hf_dualmoe.certification.theorems import dual_radius, hard_gate_radius, margin_radius


class Toy:
    """A mixture of affine experts and an affine gate on the plane; float64."""

    def __init__(self, seed, experts=3, classes=4, scale=2.0):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.weight, self.bias = scale * draw(experts, classes, 2), draw(experts, classes)
        self.gate, self.gate_bias = draw(experts, 2), draw(experts)
        self.point = draw(1, 2)

    def logits(self, points):
        return torch.einsum("ecd,bd->bec", self.weight, points) + self.bias

    def scores(self, points):
        return points @ self.gate.t() + self.gate_bias

    def soft(self, points):
        return (self.scores(points).softmax(dim=1)[:, :, None] * self.logits(points).softmax(dim=2)).sum(dim=1)

    def hard(self, points):
        index = self.scores(points).argmax(dim=1)
        return self.logits(points)[torch.arange(len(points)), index].softmax(dim=1)

    def floors(self, classes):
        bounds = [
            LipschitzBound("l2", math.nan, dual_norm(weight[:, None] - weight[None], "l2")) for weight in self.weight
        ]
        logits = self.logits(self.point)
        return [NetworkFloor(logits[:, i], classes, bound) for i, bound in enumerate(bounds)]

    def pairs(self):
        return dual_norm(self.gate[:, None] - self.gate[None], "l2")

    def routes(self):
        scores = self.scores(self.point)
        first = scores.argmax(dim=1)
        gaps = scores.gather(1, first[:, None]) - scores
        return torch.where(self.pairs()[first] > 0, gaps / self.pairs()[first], 0.0)


def disc(point, radius, count=2000):
    """Points of the disc around a point (1, 2), its border included."""
    angles = torch.rand(count, dtype=torch.float64) * 2 * math.pi
    lengths = radius * torch.cat([torch.ones(count // 2), torch.rand(count - count // 2)]).double()
    return point + torch.stack([angles.cos() * lengths, angles.sin() * lengths], dim=1)


def radius_of(floor, threshold=0.0):
    batch = torch.zeros(1, dtype=torch.float64)
    return float(largest_radius(lambda r: (floor(r) > threshold).all(dim=1), 50.0, batch))


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_mixture_floors_by_brute_force(kind):
    """Floors hold on the whole disc, at several radii; at the certified one no class changes, and it is not tiny."""
    torch.manual_seed(0)
    ratios = []
    for seed in range(20):
        toy = Toy(seed)
        model = getattr(toy, kind)
        classes = model(toy.point).argmax(dim=1)
        experts = toy.floors(classes)
        if kind == "hard":
            floor = HardGateFloor(toy.routes(), experts)
        else:
            floor = SoftGateFloor(toy.scores(toy.point), toy.pairs(), experts)
        parts = [floor] if kind == "hard" else [floor.theorem, floor.box]
        for radius in (0.0, 0.05, 0.3, 1.0):
            probabilities = model(disc(toy.point, radius))
            margins = probabilities[:, classes] - probabilities
            margins[:, classes] = math.inf
            for part in parts:
                assert (margins >= part(torch.tensor([radius]).double()) - 1e-9).all(), (seed, radius)
        certified = radius_of(floor)
        if certified > 0:
            assert (model(disc(toy.point, certified)).argmax(dim=1) == classes).all()
            larger = [
                f for f in (1.5, 2, 4, 8, 16) if (model(disc(toy.point, f * certified)).argmax(1) != classes).any()
            ]
            ratios.append(larger[0] if larger else math.inf)
    assert len(ratios) >= 14 and sum(r <= (4 if kind == "hard" else 16) for r in ratios) >= 7


def test_soft_gate_theorem_is_reached_by_constant_experts():
    """Two experts sure of different classes, whatever they see: the gate alone moves the margin, as fast as D says."""
    toy = Toy(0, experts=2, classes=2, scale=0.0)
    toy.bias = torch.tensor([[40.0, 0.0], [0.0, 40.0]]).double()
    toy.gate_bias = (toy.gate[1] - toy.gate[0]) @ toy.point[0] * torch.tensor([1.0, 0.0]).double() + torch.tensor(
        [0.01, 0]
    )
    classes = toy.soft(toy.point).argmax(dim=1)
    floor = SoftGateFloor(toy.scores(toy.point), toy.pairs(), toy.floors(classes))
    for radius in (0.002, 0.1):
        probabilities = toy.soft(disc(toy.point, radius, 20_000))
        least = float((probabilities[:, classes[0]] - probabilities[:, 1 - classes[0]]).min())
        for part in (floor.theorem, floor.box):
            bound = float(part(torch.tensor([radius]).double())[0, 1 - classes[0]])
            assert least - 0.05 * float(toy.pairs().max()) * radius < bound <= least + 1e-9


def test_soft_gate_theorem_as_stated():
    """m_j changes by at most D per unit, with every constant taken from the toy itself."""
    torch.manual_seed(0)
    for seed in range(20):
        toy = Toy(seed, scale=1.0)
        classes = toy.soft(toy.point).argmax(dim=1)
        slope = soft_gate_slope(
            toy.scores(toy.point).softmax(dim=1),
            toy.pairs().amax(dim=1) / 4,
            torch.ones(3).double(),
            torch.stack([dual_norm(w[:, None] - w[None], "l2").max() / 2 for w in toy.weight]),
        )
        start = toy.soft(toy.point)[:, classes] - toy.soft(toy.point)
        points = disc(toy.point, 2.0)
        change = (toy.soft(points)[:, classes] - toy.soft(points) - start).abs().amax(dim=1)
        distance = (points - toy.point).norm(dim=1)
        assert (change <= slope * distance + 1e-12).all() and (change > 0.02 * slope * distance).any()
        start[:, classes] = math.inf
        radius = float(margin_radius(start, slope))
        assert (toy.soft(disc(toy.point, radius)).argmax(dim=1) == classes).all()


def test_one_linear_network_is_certified_exactly():
    """The radius is the distance to the nearest decision boundary: just outside, the class changes."""
    for seed in range(20):
        toy = Toy(seed, experts=1)
        classes = toy.hard(toy.point).argmax(dim=1)
        radius = radius_of(toy.floors(classes)[0])
        assert (toy.hard(disc(toy.point, radius)).argmax(dim=1) == classes).all()
        assert (toy.hard(disc(toy.point, 1.01 * radius + 1e-3, 20_000)).argmax(dim=1) != classes).any()


def test_probability_margins_hold_and_are_reached():
    torch.manual_seed(0)
    for _ in range(50):
        logits = 3 * torch.randn(1, 5, dtype=torch.float64)
        classes = torch.randint(5, (1,))
        floors = logit_margins(logits, classes) - torch.rand(1, 5).double()
        bound = probability_margins(floors)
        others = torch.arange(5) != classes
        worse = floors[:, others] + 2 * torch.rand(500, 4).double() * (
            torch.rand(500, 4) < 0.5
        )  # margins above floors
        full = torch.zeros(500, 5).double()
        full[:, others] = -worse
        probabilities = full.softmax(dim=1)
        margins = (probabilities[:, classes] - probabilities)[:, others]
        assert (margins >= bound[:, others] - 1e-12).all()
        full[:, others] = -floors[:, others]
        reached = full[:1].softmax(dim=1)
        reached = (reached[:, classes] - reached)[:, others]
        positive = floors[:, others] >= 0
        assert torch.allclose(reached[positive], bound[:, others][positive], atol=1e-12)


def test_dual_rule_by_brute_force_with_the_worst_standard_model():
    """F_S says whatever is worst: F_D keeps its class in the radius; just outside, the rule has no slack left."""
    torch.manual_seed(0)
    tight = 0
    for seed in range(40):
        toy = Toy(seed, experts=1)
        classes = toy.hard(toy.point).argmax(dim=1)
        alpha = 0.55 + 0.4 * (seed % 5) / 5
        floor = toy.floors(classes)[0]
        radius = radius_of(floor, (1 - alpha) / alpha)
        if radius <= 0:
            continue

        def worst(points, toy=toy, classes=classes, alpha=alpha):
            robust = toy.hard(points)
            runner_up = robust.scatter(1, classes.expand(len(points), 1), -1).argmax(dim=1)
            return (1 - alpha) * F.one_hot(runner_up, 4) + alpha * robust

        assert (worst(disc(toy.point, radius)).argmax(dim=1) == classes).all()
        tight += bool((worst(disc(toy.point, 1.05 * radius + 1e-3, 20_000)).argmax(dim=1) != classes).any())
    assert tight >= 5


def test_dual_radius_uses_the_better_rule():
    robust, standard = torch.tensor([[math.inf, 0.8, 0.9]]), torch.tensor([[math.inf, 0.5, 0.7]])
    one = torch.tensor([1.0])
    alone = dual_radius(robust, one, 0.8)
    assert float(alone) == pytest.approx(0.8 - 0.25)
    joint = dual_radius(robust, one, 0.8, standard, 2 * one)
    assert float(joint) == pytest.approx((0.2 * 0.5 + 0.8 * 0.8) / (0.2 * 2 + 0.8))
    assert float(dual_radius(robust, one, 0.8, standard, 1e6 * one)) == pytest.approx(float(alone))
    assert float(dual_radius(robust, one, 0.3, standard, one)) == pytest.approx(0.7 * 0.5 + 0.3 * 0.8)


def test_hard_gate_radius_is_the_supremum():
    torch.manual_seed(0)
    for _ in range(50):
        routes, own = torch.rand(1, 4).double(), torch.rand(1, 4).double() - 0.2
        routes[0, 0] = 0
        grid = torch.linspace(0, 1.2, 24_001).double()
        holds = ((routes > grid[:, None]) | (own > grid[:, None])).all(dim=1)
        last = float(grid[holds.long().cumprod(0).bool()].max()) if holds[0] else 0.0
        assert max(float(hard_gate_radius(routes, own)), 0.0) == pytest.approx(last, abs=1e-4)
