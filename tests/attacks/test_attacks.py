import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_trace, trace
from scipy.stats import kstest
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput

from hf_dualmoe.attacks.adaptive_union import worst_case
from hf_dualmoe.attacks.apgd import APGD
from hf_dualmoe.attacks.auto_attack import VERSIONS, autoattack
from hf_dualmoe.attacks.base import frozen
from hf_dualmoe.attacks.fab import FAB
from hf_dualmoe.attacks.nfgsm import NFGSM
from hf_dualmoe.attacks.pgd import FGSM, PGD
from hf_dualmoe.attacks.square import Square
from hf_dualmoe.attacks.steps import OBJECTIVES, project, random_start, value_and_gradient
from hf_dualmoe.models.outputs import logits_of

EPS = {"linf": 0.1, "l2": 1.2}
FAST = [FGSM(eps=EPS[norm], norm=norm, objective=objective) for norm in EPS for objective in ("ce", "margin")]


def whole_union(model, images, labels):
    return autoattack(model, images, labels, eps=0.05, version="tiny", progress=False).adversarial


def adaptive_union(model, images, labels):
    return worst_case(model, images, labels, eps=0.05, steps=2, temperatures=[1.0]).adversarial


EVERY = {
    "PGD": PGD(eps=0.05, steps=2),
    "PGD, last iterate": PGD(eps=0.05, steps=2, keep_best=False),
    "PGD margin, last iterate": PGD(eps=0.05, steps=2, keep_best=False, objective="margin"),
    "FGSM": FGSM(eps=0.05),
    "NFGSM": NFGSM(eps=0.05),
    "APGD": APGD(eps=0.05, steps=2),
    "APGD, targeted": APGD(eps=0.05, steps=2, objective="dlr_targeted", target_classes=3),
    "FAB": FAB(eps=0.05, steps=2, target_classes=2),
    "Square": Square(eps=0.05, queries=3),
    "worst_case": adaptive_union,
    "autoattack": whole_union,
}
by_each = pytest.mark.parametrize("attack", EVERY.values(), ids=list(EVERY))


@pytest.fixture(autouse=True)
def tiny_union(monkeypatch):
    monkeypatch.setitem(VERSIONS, "tiny", {"apgd-ce": {"steps": 2}, "square": {"queries": 3}})


def each(attacks):
    return pytest.mark.parametrize("attack", attacks, ids=repr)


def size(delta, norm):
    """Length (B,) of each perturbation, in double precision."""
    delta = delta.double().flatten(1)
    return delta.abs().amax(dim=1) if norm == "linf" else delta.norm(dim=1)


def assert_valid(attacked, images, attack):
    assert attacked.shape == images.shape and attacked.dtype == images.dtype
    assert not attacked.requires_grad and attacked.isfinite().all()
    assert attacked.min() >= 0 and attacked.max() <= 1
    assert size(attacked.double() - images.double(), attack.norm).max() <= attack.eps + 1e-6


@pytest.fixture
def linear():
    """A linear classifier of 7 classes on 3x10x10 images near mid-grey, as a plain callable; its images and labels."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 7, generator=generator)
    images = 0.5 + 0.02 * torch.randn(13, 3, 10, 10, generator=generator)

    def model(x):
        return (x.flatten(1) - 0.5) @ weight.to(x.dtype)

    return SimpleNamespace(model=model, weight=weight, images=images, labels=model(images).argmax(dim=1))


def recorded(model):
    """The same model, and the list that will hold the images of each call."""
    calls = []

    def wrapper(x):
        calls.append(x.detach().clone())
        return model(x)

    return wrapper, calls


# --- every attack ----------------------------------------------------------------------------------------------------


@each([PGD(eps=EPS[norm], norm=norm, objective=name) for norm in EPS for name in ("ce", "margin", "kl")] + FAST)
def test_attack_raises_the_loss_and_the_error_rate(attack, trained_digits_moe):
    model, images, labels = trained_digits_moe
    torch.manual_seed(1)
    attacked = attack(model, images, labels)
    with torch.no_grad():
        clean, worst = model(images).logits, model(attacked).logits
    assert F.cross_entropy(worst, labels) > F.cross_entropy(clean, labels) + 0.5
    right, robust = clean.argmax(dim=1) == labels, worst.argmax(dim=1) == labels
    assert right.float().mean() > 0.9 and robust.float().mean() < right.float().mean() - 0.2
    if isinstance(attack, PGD):
        assert not (robust & ~right).any()  # keep_best: an image that is lost stays lost


@pytest.mark.parametrize("stronger", [{"steps": 6}, {"steps": 3, "restarts": 3}], ids=["more-steps", "more-restarts"])
@pytest.mark.parametrize("objective", ["ce", "margin", "kl"])
def test_more_effort_is_never_worse(objective, stronger, trained_digits_moe):
    model, images, labels = trained_digits_moe
    score = []
    for effort in ({"steps": 3}, stronger):
        attack = PGD(eps=0.06, step_size=0.03, objective=objective, seed=2, **effort)
        with torch.no_grad():
            logits, clean = model(attack(model, images, labels)).logits, model(images).logits
        score.append((logits.argmax(dim=1) != labels, OBJECTIVES[objective](logits, labels, clean)))
    (weak_wrong, weak), (strong_wrong, strong) = score
    assert not (weak_wrong & ~strong_wrong).any()
    same = weak_wrong == strong_wrong
    assert (strong[same] >= weak[same] - 1e-4).all() and strong.mean() > weak.mean()


@each([PGD(seed=3), PGD(seed=3, keep_best=False), FGSM()])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_attack_opens_its_own_gradient_scope(mode, attack, trained_digits_moe):
    model, images, labels = trained_digits_moe
    expected = attack(model, images, labels)
    with mode():
        attacked = attack(model, images.clone(), labels.clone())
    assert torch.equal(attacked, expected) and not attacked.is_inference()


# --- the model comes back as it was ----------------------------------------------------------------------------------


def half_frozen(model):
    """Training mode, but one expert held still by the caller, and gradients of an earlier backward pass around."""
    model.train()
    model.experts[1].eval()
    model.experts[1].layer2.train()
    model.experts[1].requires_grad_(False)
    model.router[-1].bias.grad = torch.ones(3)
    return model


@pytest.mark.filterwarnings("ignore:The model is in train mode")
@by_each
def test_attack_leaves_no_trace_in_the_model(attack, trained_digits_moe):
    model, images, labels = trained_digits_moe
    images = images[:12]
    before = trace(half_frozen(model))
    attack(model, images, labels[:12])
    assert_same_trace(model, before)
    assert not images.requires_grad and images.grad is None


@pytest.mark.parametrize("call", [1, 3])
def test_attack_that_raises_midway_leaves_no_trace(call, trained_digits_moe):
    model, images, labels = trained_digits_moe
    half_frozen(model)
    count = []

    def fail(*_):
        count.append(1)
        if len(count) == call:
            raise KeyboardInterrupt("stopped by hand")

    model.router.register_forward_pre_hook(fail)
    before, random_state = trace(model), torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        PGD(seed=6)(model, images, labels)
    assert_same_trace(model, before)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_model_is_still_while_it_is_attacked(trained_digits_moe):
    model, images, labels = trained_digits_moe
    half_frozen(model)
    seen = []
    model.trunk.register_forward_pre_hook(
        lambda *_: seen.append(
            any(m.training for m in model.modules()) or any(p.requires_grad for p in model.parameters())
        )
    )
    PGD(steps=2)(model, images, labels)
    assert len(seen) == 4 and not any(seen)


@pytest.mark.parametrize("seed", [None, 7])
def test_global_random_state(seed, trained_digits_moe):
    model, images, labels = trained_digits_moe
    before = torch.get_rng_state()
    first, second = (PGD(steps=2, seed=seed, keep_best=False)(model, images, labels) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before) == (seed is not None)
    assert torch.equal(first, second) == (seed is not None)
    torch.set_rng_state(before)
    again = PGD(steps=2, seed=seed, keep_best=False)(model, images, labels)
    assert torch.equal(first, again)


def test_frozen_with_a_seed_forks_the_random_state(resnet_moe):
    before = torch.get_rng_state()
    draws = []
    for seed in (8, 8, 9):
        with pytest.raises(ArithmeticError), frozen(resnet_moe, seed=seed):
            draws.append(torch.rand(5))
            raise ArithmeticError
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    with frozen(resnet_moe):
        unforked = torch.rand(5)
    torch.set_rng_state(before)
    assert torch.equal(torch.rand(5), unforked)


# --- random start ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 10], ids=["global", "seeded"])
def test_linf_start_is_uniform_and_not_shifted(seed):
    torch.manual_seed(11)
    images = torch.tensor([0.45, 0.5, 0.55]).view(1, 3, 1, 1).expand(2000, 3, 2, 1)
    noise = (random_start(images, 0.1, "linf", seed=seed) - images).flatten(1)
    for column in noise.T:
        assert kstest(column.numpy(), "uniform", args=(-0.1, 0.2)).pvalue > 1e-3
    assert noise.mean(dim=0).abs().max() < 4 * 0.1 / math.sqrt(3 * 2000)
    assert torch.corrcoef(noise.T).fill_diagonal_(0).abs().max() < 0.1


@pytest.mark.parametrize("seed", [None, 12], ids=["global", "seeded"])
def test_l2_start_is_uniform_in_the_ball(seed):
    torch.manual_seed(13)
    images = torch.full((2000, 1, 2, 2), 0.5)
    noise = (random_start(images, 0.3, "l2", seed=seed) - images).flatten(1)
    radius = noise.norm(dim=1)
    assert kstest(((radius / 0.3) ** 4).numpy(), "uniform").pvalue > 1e-3
    direction = noise / radius[:, None]
    for column in direction.T:  # in 4 dimensions (1 + u)/2 of a unit vector's coordinate u is Beta(3/2, 3/2)
        assert kstest(((1 + column) / 2).numpy(), "beta", args=(1.5, 1.5)).pvalue > 1e-3
    assert torch.corrcoef(torch.cat([direction, radius[:, None]], dim=1).T).fill_diagonal_(0).abs().max() < 0.1


def test_start_of_an_attack_is_centred_on_the_images(make_moe, images, labels):
    model, calls = recorded(make_moe("resnet", num_experts=2))  # its image_mean is about 0.45
    images = 0.3 + 0.4 * images
    PGD(eps=0.05, steps=1, keep_best=False, seed=14)(model, images, labels)
    noise = (calls[0] - images).transpose(0, 1).flatten(1)
    assert noise.abs().max() <= 0.05 + 1e-6 and noise.abs().max() > 0.0499
    for channel in noise:
        assert kstest(channel[:3000].numpy(), "uniform", args=(-0.05, 0.1)).pvalue > 1e-3
    PGD(eps=0.05, steps=1, keep_best=False, random_start=False)(model, images, labels)
    assert torch.equal(calls[1], images)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_seeded_noise_depends_on_the_image_number_alone(norm):
    images = torch.full((13, 3, 4, 5), 0.5)
    ids = torch.arange(100, 113)
    whole = random_start(images, 0.1, norm, seed=15, ids=ids)
    order = torch.randperm(13)
    assert torch.equal(random_start(images[order], 0.1, norm, seed=15, ids=ids[order]), whole[order])
    parts = [random_start(images[b : b + 1], 0.1, norm, seed=15, ids=ids[b : b + 1]) for b in range(13)]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.flatten(1).unique(dim=0).shape[0] == 13
    assert not torch.equal(random_start(images, 0.1, norm, seed=16, ids=ids), whole)
    assert torch.equal(
        random_start(images, 0.1, norm, seed=15), random_start(images, 0.1, norm, seed=15, ids=torch.arange(13))
    )


def test_every_restart_starts_elsewhere(linear):
    model, calls = recorded(linear.model)
    PGD(eps=0.05, steps=2, restarts=3, seed=18)(model, linear.images, linear.labels)
    starts = [calls[1], calls[4], calls[7]]  # one clean pass, then two steps and the last iterate of each restart
    assert all((a - b).abs().max() > 0.05 for a, b in zip(starts, starts[1:] + starts[:1], strict=True))


# --- steps, objectives, bookkeeping ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "passes"),
    [(PGD(steps=5, keep_best=False), 5), (PGD(steps=5), 7), (PGD(steps=5, restarts=2), 13), (FGSM(), 1)],
)
def test_number_of_forward_passes(attack, passes, linear):
    calls = []

    def model(x):
        calls.append(torch.is_grad_enabled())
        return linear.model(x)

    attack(model, linear.images, linear.labels)
    assert len(calls) == passes
    steps = attack.steps * attack.restarts if isinstance(attack, PGD) else 1
    assert sum(calls) == steps  # the other passes keep no graph


@pytest.mark.parametrize(("step_size", "expected"), [(None, 2.5 * 0.08 / 5), (0.01, 0.01)], ids=["default", "own"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_length_of_a_step(norm, step_size, expected, linear):
    model, calls = recorded(linear.model)
    attack = PGD(eps=0.08, steps=5, step_size=step_size, norm=norm, random_start=False, keep_best=False)
    attack(model, linear.images, linear.labels)
    torch.testing.assert_close(
        size(calls[1] - calls[0], norm), torch.full((13,), expected).double(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fgsm_is_one_closed_form_step(norm, trained_digits_moe):
    model, images, labels = trained_digits_moe
    x = images.clone().requires_grad_(True)
    with frozen(model):
        gradient = torch.autograd.grad(F.cross_entropy(model(x).logits, labels, reduction="sum"), x)[0]
    direction = gradient.sign() if norm == "linf" else gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    attacked = FGSM(eps=EPS[norm], norm=norm)(model, images, labels)
    torch.testing.assert_close(attacked, (images + EPS[norm] * direction).clamp(0, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("objective", ["ce", "margin"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_reaches_the_worst_case_of_a_linear_model(norm, objective):
    generator = torch.Generator().manual_seed(19)
    weight, images = torch.randn(60, 2, generator=generator), torch.rand(13, 3, 4, 5, generator=generator)
    if norm == "l2":
        images = 0.4 + 0.2 * images  # the box plays no part
    labels = torch.arange(13) % 2
    slope = (weight[:, 1] - weight[:, 0]) * (1 - 2 * labels[:, None])  # of wrong minus right logit, (13, 60)
    direction = slope.sign() if norm == "linf" else slope / slope.norm(dim=1, keepdim=True)
    expected = (images + 0.1 * direction.view_as(images)).clamp(0, 1)
    attack = PGD(eps=0.1, steps=30, step_size=0.05, norm=norm, objective=objective, seed=20)
    attacked = attack(lambda x: x.flatten(1) @ weight, images, labels)
    worst = ((expected - images).flatten(1) * slope).sum(dim=1)
    reached = ((attacked - images).flatten(1) * slope).sum(dim=1)
    torch.testing.assert_close(reached, worst, atol=1e-4, rtol=1e-3)
    assert (reached <= worst + 1e-5).all()


def test_best_iterate_is_kept_only_where_asked_for():
    def model(x):  # the objective peaks at 0.53; steps of 0.1 jump over it, 0.5 -> 0.6 -> 0.5 -> 0.6
        return torch.stack([torch.zeros(len(x)), -100 * (x.flatten(1)[:, 0] - 0.53) ** 2], dim=1)

    images, labels = torch.full((2, 1, 1, 1), 0.5), torch.zeros(2, dtype=torch.int64)
    settings = {"eps": 0.1, "steps": 3, "step_size": 0.1, "random_start": False}
    last = PGD(**settings, keep_best=False)(model, images, labels)
    torch.testing.assert_close(last, torch.full_like(images, 0.6))
    assert torch.equal(PGD(**settings)(model, images, labels), images)
    better = PGD(**{**settings, "step_size": 0.04})(model, images, labels)  # 0.54, then 0.50 and 0.54 again
    torch.testing.assert_close(better, torch.full_like(images, 0.54))
    single = PGD(**{**settings, "step_size": 0.04, "steps": 1})(model, images, labels)  # the last iterate counts too
    torch.testing.assert_close(single, torch.full_like(images, 0.54))


def test_best_prefers_a_misclassified_iterate_to_a_higher_objective():
    def model(x):  # 0.54: class 1 wins, cross-entropy 0.8; 0.6: class 0 wins just before four others, 1.6
        z = x.flatten(1)
        return torch.cat([0 * z, 0.1 - 1000 * (z - 0.54) ** 2, (-0.05 - 60 * (0.6 - z)).expand(-1, 4)], dim=1)

    images, labels = torch.full((1, 1, 1, 1), 0.5), torch.zeros(1, dtype=torch.int64)
    settings = {"eps": 0.1, "steps": 3, "step_size": 0.04, "random_start": False}
    last, best = (PGD(**settings, keep_best=keep)(model, images, labels) for keep in (False, True))
    assert last.item() == pytest.approx(0.6) and best.item() == pytest.approx(0.54)
    assert F.cross_entropy(model(last), labels) > F.cross_entropy(model(best), labels)


def test_objectives_by_hand():
    logits, labels = torch.tensor([[2.0, -4.0, -3.0], [0.5, 3.0, -1.0]]), torch.tensor([0, 2])
    clean = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(OBJECTIVES["ce"](logits, labels), -logits.softmax(1)[[0, 1], labels].log())
    torch.testing.assert_close(OBJECTIVES["margin"](logits, labels), torch.tensor([-5.0, 4.0]))
    p, q = clean.softmax(dim=1), logits.softmax(dim=1)  # TRADES: sum of clean * log(clean / attacked)
    torch.testing.assert_close(OBJECTIVES["kl"](logits, labels, clean), (p * (p / q).log()).sum(dim=1))


def test_kl_attack_does_not_look_at_the_labels(trained_digits_moe):
    model, images, labels = trained_digits_moe
    attack = PGD(eps=0.1, objective="kl", keep_best=False, seed=21)
    attacked = attack(model, images, labels)
    assert torch.equal(attacked, attack(model, images, (labels + 1) % 10))
    assert not torch.equal(attacked, PGD(eps=0.1, keep_best=False, seed=21)(model, images, labels))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_gives_the_nearest_point(norm):
    generator = torch.Generator().manual_seed(22)
    images = torch.rand(13, 3, 4, 5, generator=generator)
    inside = images + 0.001 * torch.randn(images.shape, generator=generator)
    torch.testing.assert_close(project(inside, images, 0.5, norm), inside.clamp(0, 1))
    outside = images + torch.randn(images.shape, generator=generator)
    delta = outside - images
    shrunk = (
        delta.clamp(-0.2, 0.2) if norm == "linf" else delta * (0.2 / delta.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    )
    torch.testing.assert_close(project(outside, images, 0.2, norm), (images + shrunk).clamp(0, 1))


# --- numbers that break ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_gradients_of_a_large_batch_do_not_vanish(dtype):
    generator = torch.Generator().manual_seed(23)
    weight = (1e-3 * torch.randn(12, 3, generator=generator)).to(dtype)
    images, labels = torch.rand(512, 12, generator=generator), torch.zeros(512, dtype=torch.int64)
    confident = torch.tensor([6.0, 0.0, 0.0])

    def model(x):
        return (x.to(dtype) @ weight).float() + confident

    def mean_objective(logits, labels, reference):
        return OBJECTIVES["ce"](logits, labels, reference) / len(labels)

    gradient, _, _ = value_and_gradient(model, images, labels, OBJECTIVES["ce"])
    assert gradient.any(dim=1).all()
    if dtype == torch.float16:  # what the paper's code does: a batch mean, whose gradient is flushed
        leaf = images.clone().requires_grad_(True)
        assert not torch.autograd.grad(mean_objective(model(leaf), labels, None).sum(), leaf)[0].any()
    assert value_and_gradient(model, images, labels, mean_objective)[0].any(dim=1).all()  # scaled on its way
    attacked = PGD(eps=0.1, steps=3, random_start=False, keep_best=False)(model, images, labels)
    assert ((attacked - images).abs().amax(dim=1) > 0.05).all()


def spoiled_gradient(model, value):
    """The same model, with the gradient of pixel 4 of image 2 replaced by `value`."""

    def wrapper(x):
        if x.requires_grad:

            def spoil(gradient):
                gradient = gradient.clone()
                gradient[2].view(-1)[4] = value
                return gradient

            x.register_hook(spoil)
        return model(x)

    return wrapper


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("random", [True, False], ids=["random-start", "from-image"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_broken_gradient_falls_back_to_clean_pixels(norm, random, value, linear):
    attack = PGD(eps=0.05, steps=4, norm=norm, random_start=random, keep_best=False, seed=24 if random else None)
    attacked = attack(spoiled_gradient(linear.model, value), linear.images, linear.labels)
    assert_valid(attacked, linear.images, attack)
    others = torch.arange(13) != 2
    expected = attack(linear.model, linear.images, linear.labels)
    assert torch.equal(attacked[others], expected[others])
    if math.isnan(value) and not (random and norm == "linf"):  # sign(nan) is 0: there the pixel stays at its start
        assert attacked[2].view(-1)[4] == linear.images[2].view(-1)[4]
    if norm == "linf":
        assert (attacked[2] != linear.images[2]).sum() >= 299


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_replaces_broken_values_by_clean_pixels(norm):
    images = torch.full((2, 1, 1, 3), 0.5)
    perturbed = torch.tensor([[0.51, math.nan, 0.5], [math.inf, 0.49, -math.inf]]).view_as(images)
    expected = torch.tensor([[0.51, 0.5, 0.5], [0.5, 0.49, 0.5]]).view_as(images)
    torch.testing.assert_close(project(perturbed, images, 0.1, norm), expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_zero_gradient_leaves_the_start(norm, linear):
    attack = PGD(eps=0.05, steps=3, norm=norm, random_start=False, keep_best=False)
    attacked = attack(lambda x: 0 * linear.model(x), linear.images, linear.labels)
    torch.testing.assert_close(attacked, linear.images)


# --- wrong input -----------------------------------------------------------------------------------------------------


BALLS = (PGD, FGSM, APGD, FAB, Square)
WRONG_SETTINGS = [
    ((*BALLS, NFGSM), {"eps": 8}, ["eps=8", "8/255"]),
    ((*BALLS, NFGSM), {"eps": -0.1}, ["eps=-0.1", ">= 0"]),
    ((*BALLS, NFGSM), {"eps": math.nan}, ["eps=nan"]),
    (BALLS, {"eps": math.inf, "norm": "l2"}, ["eps=inf", "finite"]),
    (BALLS, {"norm": "l1"}, ["norm='l1'", "'linf', 'l2'"]),
    ((PGD, FGSM), {"objective": "dlr"}, ["objective='dlr'", "'ce', 'margin', 'kl'"]),
    ((APGD, NFGSM), {"objective": "x"}, ["objective='x'", "'ce'"]),
    ((PGD, APGD, FAB), {"steps": 0}, ["steps=0", "at least 1"]),
    ((PGD,), {"steps": 2.5}, ["steps=2.5"]),
    ((PGD, APGD), {"restarts": 0}, ["restarts=0", "at least 1"]),
    ((APGD, FAB), {"target_classes": 0}, ["target_classes=0", "at least 1"]),
    ((Square,), {"queries": 0}, ["queries=0", "at least 1"]),
    ((PGD,), {"step_size": 0.0}, ["step_size=0.0", "> 0"]),
    ((PGD,), {"step_size": math.nan}, ["step_size=nan"]),
    ((PGD,), {"step_size": math.inf}, ["step_size=inf"]),
    ((PGD,), {"restarts": 2, "keep_best": False}, ["restarts=2", "keep_best=True"]),
    ((PGD,), {"restarts": 2, "random_start": False}, ["restarts=2", "random_start=True"]),
    ((PGD,), {"objective": "kl", "random_start": False}, ["objective='kl'", "random_start=True"]),
    ((FGSM,), {"objective": "kl"}, ["objective='kl' has no gradient at the image itself"]),
    ((NFGSM,), {"objective": "kl", "noise": 0}, ["noise > 0"]),
    ((NFGSM,), {"noise": -1}, ["noise=-1"]),
    ((NFGSM,), {"noise": math.nan}, ["noise"]),
]


@pytest.mark.parametrize(("attacks", "settings", "expected"), WRONG_SETTINGS, ids=str)
def test_wrong_setting_is_refused_by_name(attacks, settings, expected):
    for attack in attacks:
        with pytest.raises(ValueError) as error:
            attack(**settings)
        for text in expected:
            assert text in str(error.value)


def with_value(images, value):
    images = images.clone()
    images[3, 1, 2, 5] = value
    return images


WRONG_BATCH = {
    "uint8": (lambda x, y: ((255 * x).byte(), y), ["torch.uint8", "float"]),
    "empty": (lambda x, y: (x[:0], y[:0]), ["(0, 3, 10, 10)", "non-empty"]),
    "nan": (lambda x, y: (with_value(x, math.nan), y), ["nan", "[0, 1]"]),
    "above-1": (lambda x, y: (with_value(x, 1.5), y), ["1.5]", "[0, 1]"]),
    "below-0": (lambda x, y: (with_value(x, -0.5), y), ["[-0.5", "[0, 1]"]),
    "label-shape": (lambda x, y: (x, y[:5]), ["(5,)", "(13,)"]),
    "label-dtype": (lambda x, y: (x, y.float()), ["torch.float32", "int64"]),
    "label-range": (lambda x, y: (x, y + 7), ["labels", "[0, 7)"]),
    "label-negative": (lambda x, y: (x, torch.full_like(y, -100)), ["[-100, -100]", "[0, 7)"]),
}


@pytest.mark.parametrize("case", WRONG_BATCH)
@by_each
def test_wrong_batch_is_refused(attack, case, linear):
    build, expected = WRONG_BATCH[case]
    with pytest.raises(ValueError) as error:
        attack(linear.model, *build(linear.images, linear.labels))
    for text in expected:
        assert text in str(error.value)


@pytest.mark.parametrize("name", ["PGD", "APGD", "APGD, targeted", "FAB", "Square", "worst_case", "autoattack"])
def test_wrong_model_is_refused(name, linear):
    with pytest.raises(ValueError, match="NaN or infinite on clean images"):
        EVERY[name](lambda x: linear.model(x) * math.nan, linear.images, linear.labels)
    with pytest.raises(ValueError, match=r"logits of shape \(13, 3, 10\)"):
        EVERY[name](lambda x: x[:, :, 0], linear.images, linear.labels)


def test_settings_cannot_change_after_the_checks():
    attack = PGD()
    with pytest.raises(AttributeError):
        attack.eps = 8
    assert attack.eps == 8 / 255


# --- models of other people ------------------------------------------------------------------------------------------

RETURNS = {
    "tuple": lambda logits: (logits, "hidden states"),
    "list": lambda logits: [logits],
    "dict": lambda logits: {"logits": logits, "loss": None},
    "ModelOutput": lambda logits: ImageClassifierOutput(logits=logits),
    "object": lambda logits: SimpleNamespace(logits=logits),
}


@pytest.mark.parametrize("kind", RETURNS)
def test_logits_are_found_in_what_a_model_returns(kind, linear):
    def model(images):
        return RETURNS[kind](linear.model(images))

    assert torch.equal(logits_of(model, linear.images), linear.model(linear.images))
    attack = PGD(eps=0.05, steps=2, seed=0)
    expected = attack(linear.model, linear.images, linear.labels)
    assert torch.equal(attack(model, linear.images, linear.labels), expected)

    class Returning(nn.Sequential):  # with a BatchNorm that can be folded away
        def forward(self, images):
            return RETURNS[kind](super().forward(images))

    network = Returning(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 7)).eval()
    plain = nn.Sequential(*network).eval()
    found, wanted = (attack(m, linear.images, linear.labels) for m in (network, plain))
    assert torch.allclose(found, wanted, atol=1e-6) and (found - linear.images).abs().max() > 0.04


@pytest.mark.parametrize("output", [None, {}, (), {"scores": 1}, BaseModelOutput(last_hidden_state=torch.ones(2, 3))])
def test_output_without_logits_is_named(output):
    with pytest.raises(ValueError, match=f"model returned a {type(output).__name__}; expected logits"):
        logits_of(lambda images: output, torch.rand(2, 3))


class Trained(nn.Module):
    """A network behind something that autograd cannot pass; its own weights have gradients."""

    def __init__(self, before):
        super().__init__()
        self.before, self.last = before, nn.Linear(300, 7)

    def forward(self, images):
        return self.last(self.before(images).flatten(1))


BLIND = {
    "no_grad": lambda linear: torch.no_grad()(linear.model),
    "inference_mode": lambda linear: torch.inference_mode()(linear.model),
    "integers": lambda linear: lambda images: linear.model((255 * images).to(torch.uint8) / 255),
    "numpy": lambda linear: lambda images: torch.from_numpy(linear.model(images.detach()).numpy()),
    "detached": lambda linear: Trained(torch.detach),
    "weights": lambda linear: Trained(torch.detach).__call__,  # a callable: its weights are not frozen
}


@pytest.mark.parametrize("blind", BLIND)
@pytest.mark.parametrize("name", ["PGD", "FGSM", "NFGSM", "APGD", "FAB", "worst_case"])
def test_model_without_gradients_is_refused_in_a_sentence(name, blind, linear):
    model = BLIND[blind](linear)
    with torch.no_grad():
        labels = model(linear.images).argmax(dim=1)
    with pytest.raises(ValueError, match="model gives no gradient of its logits with respect to the images"):
        EVERY[name](model, linear.images, labels)
    assert EVERY["Square"](model, linear.images, labels).shape == linear.images.shape
