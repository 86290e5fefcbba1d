"""Guarantees of attacks, on images and radii drawn by hypothesis: ball, box, order and company."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_dualmoe import DualMoEForImageClassification, MoEConfig, MoEForImageClassification
from hf_dualmoe.attacks.apgd import APGD
from hf_dualmoe.attacks.auto_attack import autoattack
from hf_dualmoe.attacks.components import attack_experts, attack_router
from hf_dualmoe.attacks.fab import FAB
from hf_dualmoe.attacks.nfgsm import NFGSM
from hf_dualmoe.attacks.pgd import FGSM, PGD
from hf_dualmoe.attacks.square import Square

SIZE, LABELS, BATCH = 5, 4, 6
NORMS = ("linf", "l2")


def experts(model, images, labels, *, eps, norm, ids=None):
    return attack_experts(model, images, labels, attack=PGD(eps=eps, norm=norm, steps=2, seed=1), ids=ids)


def router(model, images, labels, *, eps, norm, ids=None):
    return attack_router(model, images, labels, eps=eps, norm=norm, steps=2, ids=ids)


def called(make):
    """A call of the attack that `make` makes of a radius and a norm."""
    return lambda model, images, labels, *, eps, norm, ids=None: make(eps, norm)(model, images, labels, ids=ids)


ATTACKS = {
    "PGD ce": called(lambda eps, norm: PGD(eps=eps, norm=norm, steps=3, restarts=2, seed=1)),
    "PGD margin": called(lambda eps, norm: PGD(eps=eps, norm=norm, steps=2, objective="margin", seed=1)),
    "PGD kl, last": called(
        lambda eps, norm: PGD(eps=eps, norm=norm, steps=2, objective="kl", keep_best=False, seed=1)
    ),
    "PGD, long steps": called(lambda eps, norm: PGD(eps=eps, norm=norm, steps=2, step_size=1e3, seed=1)),
    "FGSM": called(lambda eps, norm: FGSM(eps=eps, norm=norm)),
    "APGD ce": called(lambda eps, norm: APGD(eps=eps, norm=norm, steps=4, objective="ce")),
    "APGD dlr": called(lambda eps, norm: APGD(eps=eps, norm=norm, steps=4, objective="dlr")),
    "APGD dlr_targeted": called(
        lambda eps, norm: APGD(eps=eps, norm=norm, steps=4, objective="dlr_targeted", target_classes=2)
    ),
    "FAB": called(lambda eps, norm: FAB(eps=eps, norm=norm, steps=3)),
    "Square": called(lambda eps, norm: Square(eps=eps, norm=norm, queries=6)),
    "RA-E": experts,
    "RA-R": router,
}
TRAINING_ONLY = {"NFGSM": lambda eps: NFGSM(eps=eps), "NFGSM kl": lambda eps: NFGSM(eps=eps, objective="kl")}
QUICK = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def models():
    """A mixture with hard routing, one with all experts mixed, and a dual model of both, in double precision."""
    found = {}
    for name, top_k in (("hard", 1), ("mixed", 3)):
        torch.manual_seed(top_k)
        kwargs = {"hidden_sizes": [8], "logit_scale": 8.0}
        config = MoEConfig(
            **{"backbone": "lipschitz_mlp", "backbone_kwargs": kwargs, "image_size": SIZE, "num_labels": LABELS},
            **{"num_experts": 3, "router_top_k": top_k},
        )
        found[name] = MoEForImageClassification(config).eval().double()
    parts = copy.deepcopy((found["mixed"], found["hard"]))
    found["dual"] = DualMoEForImageClassification.from_models(*parts, alpha=0.7).eval()
    return found


KINDS = st.sampled_from(["uniform", "black and white", "almost black", "flat", "integers"])


@st.composite
def batches(draw, dtype=torch.float64):
    """Images (B, 3, SIZE, SIZE) in [0, 1] of several kinds, saturated and flat ones too, and labels."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    images = torch.rand(BATCH, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    kind = draw(KINDS)
    if kind == "black and white":
        images = images.round()
    elif kind == "almost black":
        images = images * 1e-7
    elif kind == "flat":
        images = torch.full_like(images, draw(st.sampled_from([0.0, 0.5, 1.0])))
    elif kind == "integers":
        images = (255 * images).round() / 255
    return images.to(dtype), torch.randint(LABELS, (BATCH,), generator=generator)


@torch.no_grad()
def mostly_right(model, images, labels):
    """Labels that the model gives to two images of three: some attacks leave what is wrong already as it is."""
    return torch.where(torch.arange(BATCH) % 3 > 0, model(images).logits.argmax(dim=1), labels)


def radii(norm):
    return st.sampled_from([0.0, 1e-6, 1 / 255, 8 / 255, 0.5, 1.0] + [30.0] * (norm == "l2")) | st.floats(1e-9, 1.0)


def length(delta, norm):
    delta = delta.double().flatten(1)
    return delta.abs().amax(dim=1) if norm == "linf" else delta.norm(dim=1)


def assert_in_box(attacked, images):
    assert attacked.shape == images.shape and attacked.dtype == images.dtype and not attacked.requires_grad
    assert attacked.isfinite().all() and attacked.min() >= 0 and attacked.max() <= 1


# --- ball and box ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ATTACKS)
def test_every_image_lies_in_the_ball_and_in_the_box(name, norm, models):
    @QUICK
    @given(batch=batches(), eps=radii(norm), model=st.sampled_from(["hard", "mixed", "dual"]))
    def check(batch, eps, model):
        images, labels = batch[0], mostly_right(models[model], *batch)
        attacked = ATTACKS[name](models[model], images, labels, eps=eps, norm=norm)
        assert_in_box(attacked, images)
        assert length(attacked - images, norm).max() <= eps + 1e-6
        assert eps > 0 or torch.equal(attacked, images)

    check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_images_too(norm, dtype, models):
    model = copy.deepcopy(models["hard"]).float()

    @QUICK
    @given(batch=batches(dtype), eps=radii(norm), name=st.sampled_from(["PGD ce", "APGD ce", "Square", "FAB"]))
    def check(batch, eps, name):
        attacked = ATTACKS[name](lambda x: model(x.float()).logits, *batch, eps=eps, norm=norm)
        assert_in_box(attacked, batch[0])
        assert length(attacked.double() - batch[0].double(), norm).max() <= eps + 1e-6

    check()


@pytest.mark.parametrize("name", TRAINING_ONLY)
def test_the_training_attack_stays_in_its_wider_ball_and_in_the_box(name, models):
    @QUICK
    @given(batch=batches(), eps=radii("linf"))
    def check(batch, eps):
        attacked = TRAINING_ONLY[name](eps)(models["mixed"], *batch)
        assert_in_box(attacked, batch[0])
        assert length(attacked - batch[0], "linf").max() <= 3 * eps + 1e-6

    check()


@pytest.mark.parametrize("norm", NORMS)
def test_the_union_too(norm, models):
    @settings(QUICK, max_examples=2)
    @given(batch=batches(), eps=radii(norm))
    def check(batch, eps):
        seen = []

        def watched(images):
            seen.append(images.detach().clone())
            return models["hard"](images).logits

        options = {"eps": eps, "norm": norm, "version": "fast", "progress": False, "seed": 0}
        attacked = autoattack(watched, *batch, **options).adversarial
        assert_in_box(attacked, batch[0])
        assert length(attacked - batch[0], norm).max() <= eps + 1e-6
        assert all(images.min() >= 0 and images.max() <= 1 for images in seen)

    check()


# --- order and batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ATTACKS)
def test_an_image_is_attacked_alike_in_any_order_and_company(name, norm, models):
    @settings(QUICK, max_examples=3)
    @given(batch=batches(), order=st.permutations(range(BATCH)), cut=st.integers(1, BATCH - 1))
    def check(batch, order, cut):
        images, labels = batch
        labels = mostly_right(models["dual"], images, labels)
        ids = 100 + 7 * torch.arange(BATCH)
        attack = ATTACKS[name]
        whole = attack(models["dual"], images, labels, eps=0.2, norm=norm, ids=ids)
        for rows in (order[:cut], order[cut:]):
            part = attack(models["dual"], images[rows], labels[rows], eps=0.2, norm=norm, ids=ids[rows])
            torch.testing.assert_close(part, whole[rows], rtol=0, atol=1e-9)

    check()


@pytest.mark.parametrize("name", ["PGD ce", "APGD ce", "APGD dlr_targeted", "Square"])
def test_the_noise_of_an_image_follows_its_number(name, models):
    images = torch.rand(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = mostly_right(models["mixed"], images, torch.zeros(BATCH, dtype=torch.int64))
    first, second, again = (
        ATTACKS[name](models["mixed"], images, labels, eps=0.01, norm="linf", ids=torch.arange(BATCH) + number)
        for number in (0, 1, 0)
    )
    assert torch.equal(first, again) and not torch.allclose(first, second, atol=1e-6)
