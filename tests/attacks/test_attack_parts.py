"""The parts of APGD, FAB and Square against the papers, hand-made cases and brute force."""

import pytest
import torch

from hf_dualmoe.attacks import apgd
from hf_dualmoe.attacks.apgd import APGD, Ascent, PassCounter, checkpoints, dlr_objective, targeted_dlr_objective
from hf_dualmoe.attacks.fab import box_projection
from hf_dualmoe.attacks.square import eta, window, window_size
from hf_dualmoe.attacks.steps import image_noise, steepest

# --- APGD ------------------------------------------------------------------------------------------------------------


def test_checkpoints_are_those_of_the_paper():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_apgd_halves_its_step_towards_a_known_optimum(monkeypatch):
    """Class 0 leads by 1 + 50 |x - 0.53|^2: never broken, and weakest at 0.53."""
    seen = []

    def model(images):
        seen.append(images.detach().flatten())
        lead = 1 + 50 * (images - 0.53).square().flatten(1).sum(dim=1)
        return torch.stack([lead, torch.zeros_like(lead)], dim=1)

    images, labels = torch.tensor([0.5, 0.57]).view(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64)
    attacked = APGD(eps=0.1, steps=100)(model, images, labels)
    assert (attacked - 0.53).abs().max() < 0.1 / 2**5
    moves = (torch.stack(seen)[2:] - torch.stack(seen)[1:-1]).abs()  # without the clean image
    assert moves[:20].amax() > 0.05 and moves[-3:].amax() < 0.1 / 2**4

    def plain(x):  # one step of the first size, 2 * eps
        return (x + 0.2 * (0.53 - x).sign()).clamp(images.flatten() - 0.1, images.flatten() + 0.1)

    first, second, third = seen[1:4]
    torch.testing.assert_close(second, plain(first))
    blend = second + 0.75 * (plain(second) - second) + 0.25 * (second - first)
    torch.testing.assert_close(third, blend.clamp(images.flatten() - 0.1, images.flatten() + 0.1))
    seen.clear()
    monkeypatch.setattr(apgd, "RHO", 0.0)  # only condition 2 is left
    APGD(eps=0.1, steps=20)(model, images, labels)
    patient = (torch.stack(seen)[2:] - torch.stack(seen)[1:-1]).abs()[-3:].amax()
    seen.clear()
    monkeypatch.setattr(apgd, "RHO", 1.0)
    APGD(eps=0.1, steps=20)(model, images, labels)
    assert (torch.stack(seen)[2:] - torch.stack(seen)[1:-1]).abs()[-3:].amax() < patient


def test_a_checkpoint_sends_stuck_images_back_to_their_best_point_with_half_the_step():
    start, value = torch.zeros(4, 2), torch.zeros(4)
    index = torch.arange(4)
    ascent = Ascent.begin(index, start, index, index, start=start, gradient=start, value=value, step=0.2)
    ascent.accept(torch.full((4, 2), 0.1), torch.full((4, 2), 1.0), torch.tensor([1.0, 1.0, 1.0, 1.0]))
    ascent.accept(torch.full((4, 2), 0.2), torch.full((4, 2), 2.0), torch.tensor([2.0, 0.5, 0.5, 0.5]))
    ascent.rises = torch.tensor([8, 7, 8, 8])  # image 1: too few rises out of 10
    ascent.peak_before = torch.tensor([1.0, 0.0, 1.0, 1.0])  # images 2 and 3: no new peak ...
    ascent.halved = torch.tensor([True, True, False, True])  # ... but 3 has just been halved
    ascent.review(10)
    torch.testing.assert_close(ascent.step, torch.tensor([0.2, 0.1, 0.1, 0.2]))
    torch.testing.assert_close(ascent.current[:, 0], torch.tensor([0.2, 0.1, 0.1, 0.2]))
    assert ascent.gradient[:, 0].tolist() == [2, 1, 1, 2] and ascent.value.tolist() == [2, 1, 1, 0.5]
    assert ascent.halved.tolist() == [False, True, True, False] and ascent.rises.tolist() == [0, 0, 0, 0]
    assert ascent.peak_before.tolist() == [2, 1, 1, 1]


def test_dlr_is_blind_to_shift_and_scale_and_safe_at_zero():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 6, generator=generator), torch.arange(50) % 6
    target = (labels + 1) % 6
    for objective in (dlr_objective, targeted_dlr_objective):
        expected = objective(logits, labels, target)
        for other in (1e-6 * logits, 1e6 * logits, 3 + 2 * logits, logits.log_softmax(dim=1)):
            torch.testing.assert_close(objective(other, labels, target), expected, rtol=1e-3, atol=1e-3)
        for ties in (torch.zeros(2, 6), torch.tensor([[1.0, 1, 1, 1, 0, 0], [5, 5, 5, 5, 5, 4]])):
            ties.requires_grad_(True)
            value = objective(ties, torch.tensor([0, 1]), torch.tensor([1, 2]))
            gradient = torch.autograd.grad(value.sum(), ties)[0]
            assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
    ranked = logits.sort(dim=1, descending=True).values
    rows = torch.arange(50)
    wrong = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    torch.testing.assert_close(
        dlr_objective(logits, labels), (wrong - logits[rows, labels]) / (ranked[:, 0] - ranked[:, 2])
    )
    torch.testing.assert_close(
        targeted_dlr_objective(logits, labels, target),
        (logits[rows, target] - logits[rows, labels]) / (ranked[:, 0] - ranked[:, 2:4].mean(dim=1)),
    )


def test_broken_images_stop_costing_passes():
    """Class 0 leads by the mean pixel - 0.4: half of the images fall at once and leave, half never fall."""

    def model(images):
        lead = images.flatten(1).mean(dim=1) - 0.4
        return torch.stack([lead, torch.zeros_like(lead)], dim=1)

    images = torch.tensor([0.401, 0.5]).repeat(20).view(40, 1, 1, 1).expand(40, 3, 4, 5)
    counter = PassCounter(model)
    attacked = APGD(eps=0.05, steps=50)(counter, images, torch.zeros(40, dtype=torch.int64))
    assert model(attacked).argmax(dim=1).tolist() == [1, 0] * 20
    assert counter.forward_rows == counter.gradient_rows + 40 + 20
    assert counter.gradient_rows < 0.6 * 50 * len(images)


# --- FAB -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_box_projection_is_the_shortest_step_that_stays_in_the_box(norm):
    generator = torch.Generator().manual_seed(0)
    points, normal = torch.rand(40, 2, generator=generator), torch.randn(40, 2, generator=generator)
    gap = 0.4 * torch.randn(40, generator=generator)
    step = box_projection(points, normal, gap, norm)
    assert (points + step).min() >= -1e-6 and (points + step).max() <= 1 + 1e-6
    first = torch.linspace(0, 1, 20_001)[None] - points[:, :1]  # every point of the box on the line, in two dimensions
    second = (gap[:, None] - normal[:, :1] * first) / normal[:, 1:]
    inside = (points[:, 1:] + second >= 0) & (points[:, 1:] + second <= 1)
    grid = torch.stack([first, second], dim=-1)
    length = grid.abs().amax(dim=-1) if norm == "linf" else grid.norm(dim=-1)
    reachable = inside.any(dim=1)
    assert 20 < reachable.sum() < 40
    best = length.where(inside, torch.tensor(torch.inf)).amin(dim=1)
    torch.testing.assert_close((normal * step).sum(dim=1)[reachable], gap[reachable], atol=1e-5, rtol=1e-5)
    size = step.abs().amax(dim=1) if norm == "linf" else step.norm(dim=1)
    torch.testing.assert_close(size[reachable], best[reachable], atol=1e-3, rtol=1e-3)
    progress = (normal * step).sum(dim=1)[~reachable]  # as far as the box lets it
    room = torch.where(normal * gap[:, None].sign() > 0, 1 - points, points)
    torch.testing.assert_close(progress.abs(), (normal.abs() * room).sum(dim=1)[~reachable])


# --- Square ----------------------------------------------------------------------------------------------------------


def test_square_parts_are_those_of_the_paper():
    shape = torch.Size((1, 3, 32, 32))
    starts = (1, 11, 12, 52, 202, 502, 1002, 2002, 4002, 6002, 8002)
    sides = [window_size(query, 10_000, shape, "linf") for query in starts]
    assert sides == [29, 29, 20, 14, 10, 7, 5, 4, 3, 2, 1]
    assert window_size(6, 5_000, shape, "linf") == window_size(11, 10_000, shape, "linf")
    few, more = ([window_size(q, n, shape, "linf") for q in range(1, 200)] for n in (200, 1000))
    assert few == more and few[0] == 29 and few[-1] == 5  # small budgets stop before the smallest squares
    assert window_size(9_999, 10_000, shape, "l2") == 3
    assert window_size(1, 10_000, torch.Size((1, 1, 5, 9)), "linf") == 5
    for side in (1, 2, 5, 6):
        pattern = eta(side)
        assert pattern.shape == (side, side) and pattern.norm() == pytest.approx(1)
        assert (pattern[: side // 2] > 0).all() and (pattern[side // 2 :] < 0).all()
    corners = window(torch.tensor([[0.0, 0.0], [0.999, 0.999]]), 2, torch.Size((1, 1, 4, 6)))
    assert corners.tolist() == [[0, 1, 6, 7], [16, 17, 22, 23]]


@pytest.mark.parametrize("scale", [1, 1e-25, 1e-38])
def test_the_steepest_step_has_unit_length_however_small_the_gradient(scale):
    """The cross-entropy of a confident model has gradients whose squares are zero in float32."""
    gradient = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    gradient[0] = 0
    step = steepest(scale * gradient, "l2")
    direction = gradient[1:] / gradient[1:].flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert (step[0] == 0).all()
    torch.testing.assert_close(step[1:], direction, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("normal", [False, True])
def test_processes_draw_together_what_one_draws_and_hold_one_part(normal, monkeypatch):
    images, kind, drawn = torch.zeros(15, 3, 8, 8), "randn" if normal else "rand", []
    torch.manual_seed(0)
    whole = image_noise(images, normal=normal)
    draw = getattr(torch, kind)
    monkeypatch.setattr(torch, kind, lambda shape, **kw: (drawn.append(shape[0]), draw(shape, **kw))[1])
    parts, after = [], set()
    for rank in range(3):
        torch.manual_seed(0)
        parts.append(image_noise(images[:5], normal=normal, shard=(rank, 3)))
        after.add(torch.randperm(1000)[0].item())
    assert torch.equal(torch.cat(parts), whole)
    assert len(after) == 1 and set(drawn) == {5}  # generators stay equal; no draw is larger than a part
