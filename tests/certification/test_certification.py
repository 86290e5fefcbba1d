"""Certificates: attacked inside every radius, checked by exact cases; refusals; training."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import shake
from sklearn.datasets import load_digits
from torch import nn

from hf_dualmoe import DualMoEForImageClassification, MoEConfig, MoEForImageClassification
from hf_dualmoe.attacks.steps import per_image, steepest
from hf_dualmoe.certification.certifier import Certificates, Certifier, certify
from hf_dualmoe.certification.margin_floors import FLOAT_ERROR, logit_margins, soft_gate_slope
from hf_dualmoe.certification.operator_norms import NORMS, dual_norm
from hf_dualmoe.certification.report import certify_dataset
from hf_dualmoe.certification.route_radii import effective_router_weight, route_radii
from hf_dualmoe.certification.smoothing import sample_votes
from hf_dualmoe.certification.theorems import dual_radius, margin_radius
from hf_dualmoe.data.datasets import ImageTensorDataset
from hf_dualmoe.losses.certified import (
    backbone_slope,
    certified_loss,
    gate_constants,
    gate_lipschitz_penalty,
    margin_penalty,
    route_margin_penalty,
    route_margins,
)

ORDERS = {"l2": 2, "linf": math.inf, "l1": 1}
NUM_IMAGES = 130


def fit(model, images, labels, steps, l2):
    """Train what eval mode applies, by plain gradient steps: needs no deel-torchlip, and the norms leave 1."""
    layers = [m for m in model.modules() if hasattr(m, "applied_weight")]
    for layer in layers:
        layer.applied_weight.requires_grad_(True)
    tensors = [tensor for layer in layers for tensor in (layer.applied_weight, layer.bias)]
    optimizer = torch.optim.Adam(tensors, lr=5e-3, weight_decay=l2)
    for step in range(steps):
        rows = torch.arange(step % 8, len(images), 8)
        logits, scores = model.expert_logits(images[rows])
        experts = F.one_hot(scores.argmax(dim=1), scores.shape[1])  # each learns its own images alone
        losses = torch.stack([F.cross_entropy(z, labels[rows], reduction="none") for z in logits.unbind(1)], dim=1)
        loss = (experts * losses).sum() / len(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for layer in layers:
        layer.applied_weight.requires_grad_(False)
        layer.bias.grad = None


@pytest.fixture(scope="module")
def digits():
    """(training images, training labels, test images, test labels), (N, 1, 8, 8) in [0, 1]."""
    data = load_digits()
    images, labels = torch.tensor(data.images / 16, dtype=torch.float32)[:, None], torch.tensor(data.target)
    return images[:1400], labels[:1400], images[1400 : 1400 + NUM_IMAGES], labels[1400 : 1400 + NUM_IMAGES]


@pytest.fixture(scope="module")
def trained(digits):
    """A hard-routed mixture of three experts on real digits; an image is routed to the nearest of three means."""
    torch.manual_seed(0)
    sizes = {"image_size": 8, "num_channels": 1, "num_labels": 10, "num_experts": 3, "image_mean": 0.3}
    backbone = {"backbone": "lipschitz_mlp", "backbone_kwargs": {"hidden_sizes": [64], "logit_scale": 3.0}}
    model = MoEForImageClassification(MoEConfig(**sizes, **backbone, image_std=0.5)).eval()
    images, labels, _, _ = digits
    with torch.no_grad():
        means = torch.stack([((images[labels % 3 == i] - 0.3) / 0.5).mean(dim=0).flatten() for i in range(3)])
        model.router[-1].weight.copy_(means)
        model.router[-1].bias.copy_(-means.square().sum(dim=1) / 2)
    fit(model, images, labels, steps=250, l2=2e-3)
    return model


@pytest.fixture(scope="module")
def trained_dual(trained, digits):
    """F_S: a small ResNet that fits the digits and has no bound worth anything."""
    torch.manual_seed(1)
    config = MoEConfig(
        **{"image_size": 8, "num_channels": 1, "num_labels": 10, "num_experts": 1},
        **{"backbone": "resnet10t", "width": [8] * 4},
    )
    standard = MoEForImageClassification(config)
    images, labels, _, _ = digits
    optimizer = torch.optim.Adam(standard.parameters(), lr=1e-2)
    for step in range(12):
        loss = standard(images[step::8], labels[step::8]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    standard.zero_grad()
    return DualMoEForImageClassification.from_models(standard.eval(), copy.deepcopy(trained), alpha=0.8)


@pytest.fixture
def moe(trained):
    return copy.deepcopy(trained)


@pytest.fixture
def soft(moe):
    moe.config.router_top_k = 3
    return moe


@pytest.fixture
def dual(trained_dual):
    return copy.deepcopy(trained_dual)


# --- attacks inside the radius ---------------------------------------------------------------------------------------


def move(perturbed, images, radius, norm):
    """Project onto the ball of each image's own radius (B,), then onto [0, 1]."""
    delta = perturbed - images
    if norm == "linf":
        delta = torch.minimum(torch.maximum(delta, -per_image(radius, images)), per_image(radius, images))
    else:
        size = delta.flatten(1).norm(dim=1).clamp_min(1e-12)
        delta = delta * per_image((radius / size).clamp_max(1), images)
    return (images + delta).clamp(0, 1)


def strongest(model, images, classes, radius, norm, steps=8):
    """Which images (B,) change their class under attacks inside their own radius (B,).

    Every expert in turn is attacked while the route is pulled towards it, as hard routing hides it from plain PGD.
    """
    experts = model.robust if hasattr(model, "robust") else model
    changed = torch.zeros(len(images), dtype=torch.bool)
    for target in range(experts.config.num_experts):
        for pull in (0.0, 1.0):
            index = torch.full_like(classes, target)
            points = move(images + per_image(radius, images) * (torch.rand_like(images) - 0.5), images, radius, norm)
            for _ in range(steps):
                points = points.detach().requires_grad_(True)
                logits = model(points, expert_index=index).logits
                right = logits.gather(1, classes[:, None]).squeeze(1)
                wrong = logits.scatter(1, classes[:, None], -torch.inf).amax(dim=1)
                scores = experts.route(points)
                flip = (scores[:, target] - scores.amax(dim=1)).clamp_max(0)
                gradient = torch.autograd.grad((wrong - right + pull * flip).sum(), points)[0]
                step = per_image(0.4 * radius, images) * steepest(gradient, norm)
                points = move(points.detach() + step, images, radius, norm)
                changed |= model(points).logits.argmax(dim=1) != classes
    return changed


def constant_model(label):
    """A standard model that is sure of one class whatever it sees."""
    sizes = {"image_size": 8, "num_channels": 1, "num_labels": 10, "num_experts": 1}
    model = MoEForImageClassification(
        MoEConfig(**sizes, backbone="lipschitz_mlp", backbone_kwargs={"hidden_sizes": [2]})
    ).eval()
    last = model.experts[0][-1]
    last.applied_weight.zero_()
    with torch.no_grad():
        last.bias.copy_(60.0 * F.one_hot(torch.tensor(label), 10))
    return model


def test_dual_rule_holds_against_a_standard_model_that_is_sure_of_another_class(moe, digits):
    """The rule, not the joint bound, which would see that this F_S is constant. Radii here have little to spare."""
    _, _, images, _ = digits
    for label in (8, 1):
        dual = DualMoEForImageClassification.from_models(constant_model(label), copy.deepcopy(moe), alpha=0.7)
        certifier = Certifier(dual)
        assert any("joint" in rule for rule in certifier(images).rule)
        certifier.standard = None
        certificates = certifier(images)
        good = ~certificates.radius.isnan()
        radius = certificates.radius[good].float()
        assert good.sum() > 50
        arguments = images[good], certificates.prediction[good]
        assert not strongest(dual, *arguments, radius, "l2").any()
        assert strongest(dual, *arguments, 2 * radius, "l2").any()


@pytest.fixture
def named_model(request, moe, dual):
    if "soft" in request.param:
        (dual.robust if "dual" in request.param else moe).config.router_top_k = 3
    if request.param == "joint":
        dual = DualMoEForImageClassification.from_models(copy.deepcopy(moe), moe, alpha=0.4)
        dual.standard.experts[0].load_state_dict(dual.standard.experts[1].state_dict())
    return moe if request.param in ("hard", "soft") else dual


@pytest.mark.parametrize(
    ("named_model", "norm"),
    [(name, norm) for name in ("hard", "soft", "joint") for norm in ("l2", "linf")]
    + [("dual", "l2"), ("dual soft", "linf")],
    indirect=["named_model"],
)
def test_no_attack_succeeds_inside_a_certified_radius(named_model, norm, digits):
    _, _, images, labels = digits
    certificates = Certifier(named_model, norm)(images)
    assert torch.equal(certificates.prediction, named_model(images).logits.argmax(dim=1))
    good = ~certificates.radius.isnan()
    assert good.sum() >= 100
    images, classes = images[good], certificates.prediction[good]
    radius = certificates.radius[good].float()
    torch.manual_seed(0)
    assert not strongest(named_model, images, classes, radius, norm, steps=6).any()
    assert strongest(named_model, images[:60], classes[:60], 6 * radius[:60], norm, steps=6).float().mean() > 0.3


def test_certificates_are_not_vacuous(moe, dual, digits):
    _, _, images, labels = digits
    accuracy = Certifier(moe)(images).certified_accuracy(labels, [0.01, 0.1, 0.2, 10.0])
    assert accuracy[0] > 85 and accuracy[1] > 70 and accuracy[2] > 40 and accuracy[3] == 0
    curves = [Certifier(dual)(images, alpha=a).certified_accuracy(labels, [0.05, 0.1]) for a in (0.6, 0.8, 1.0)]
    assert curves[0] < curves[1] < curves[2]


def test_certificates_do_not_depend_on_the_batch(moe, digits):
    _, _, images, _ = digits
    certifier = Certifier(moe)
    whole = certifier(images[:40]).radius
    parts = torch.cat([certifier(part).radius for part in images[:40].split(7)])
    assert torch.allclose(whole, parts, rtol=1e-4, equal_nan=True)


def test_alpha_of_zero_is_the_standard_model_alone(moe, digits):
    """0 times the infinite margin of a class over itself counts as 0: nothing was certified here before."""
    images = digits[2][:40]
    other = copy.deepcopy(moe)
    with torch.no_grad():
        other.experts[0][-1].bias.add_(torch.linspace(0, 1, 10))
    dual = DualMoEForImageClassification.from_models(other, moe, alpha=0.0)
    alone, found = certify(other, images), certify(dual, images)
    assert (~alone.radius.isnan()).sum() > 30 and set(found.rule) - {""} == {"joint with hard gate, hard gate"}
    assert torch.allclose(found.radius, alone.radius, atol=1e-3, equal_nan=True)
    assert torch.allclose(
        certify(dual, images, alpha=1.0).radius, certify(moe, images).radius, atol=1e-3, equal_nan=True
    )


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("standard_slope", [2.0, math.inf])
def test_dual_radius_at_the_ends_of_the_dial_and_with_a_boundless_standard_model(alpha, standard_slope):
    margins, slope = torch.tensor([[math.inf, 0.5]]), torch.tensor([2.0])
    found = dual_radius(margins, slope, alpha, margins, torch.tensor([standard_slope]))
    alone = dual_radius(margins, slope, alpha) if alpha else torch.tensor([0.5 / standard_slope])
    assert float(found) == pytest.approx(0.25 if alpha and standard_slope == 2.0 else float(alone))


def test_gates_that_underflow_leave_a_certificate(soft, digits):
    """A gate of 0 times the infinite margin of a class over itself: nothing was certified here before."""
    images = digits[2][:60]
    with torch.no_grad():
        soft.router[-1].weight.mul_(100)
        soft.router[-1].bias.mul_(100)
    assert (soft.route(images).double().softmax(dim=1) == 0).any()
    found = certify(soft, images)
    good = ~found.radius.isnan()
    assert good.sum() > 40
    arguments = images[good], found.prediction[good], found.radius[good].float(), "l2"
    assert not strongest(soft, *arguments, steps=6).any()


# --- arithmetic ------------------------------------------------------------------------------------------------------


def as_dataset(images, labels):
    return ImageTensorDataset((255 * images).byte(), labels, list("0123456789"))


def precisions():
    """Which arithmetic torch may use for float32 on each device."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    return [part.fp32_precision for part in (cuda.matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv)]


def test_certificates_are_computed_in_full_float32(moe, digits):
    """As a forward sees it, in the proofs of one batch and of a dataset, and in the votes of smoothing."""
    images, labels = digits[2][:9], digits[3][:9]
    seen = []
    moe.experts[0].register_forward_pre_hook(lambda *_: seen.append(precisions()))
    assert precisions() != ["ieee"] * 4
    certifier = Certifier(moe)
    counts = [len(seen)]
    for run in (
        lambda: certifier(images),
        lambda: sample_votes(moe, images[:1], sigma=0.1, n0=1, n=1),
        lambda: certify_dataset(moe, as_dataset(images, labels), check_names=False, progress=False),
    ):
        run()
        counts.append(len(seen))
    assert counts == sorted(set(counts)) and counts[0] > 0  # each has called it
    assert all(precision == ["ieee"] * 4 for precision in seen)


def test_autocast_is_refused(moe, dual, digits):
    images, labels = digits[2][:3], digits[3][:3]
    certifier = Certifier(moe)
    dataset = as_dataset(images, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for refused in (
            lambda: certifier(images),
            lambda: certify(dual, images),
            lambda: sample_votes(moe, images, sigma=0.1),
            lambda: certify_dataset(moe, dataset, progress=False),
        ):
            with pytest.raises(ValueError, match="autocast is on for cpu"):
                refused()
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    network.forward = torch.autocast("cpu", dtype=torch.bfloat16)(network.forward)  # as accelerate prepares it
    with pytest.raises(ValueError, match="autocast is on for cpu"):
        certify(network, images)


def test_a_dataset_of_another_shape_is_refused_before_anything_is_certified(moe, digits, monkeypatch):
    """A CNN takes images of any size, but its certificates would be about another function."""
    images, labels = digits[2][:3], digits[3][:3]
    monkeypatch.setattr("hf_dualmoe.certification.report.open_measurer", lambda *args, **kwargs: {}["started"])
    larger = as_dataset(images.repeat(1, 1, 2, 2), labels)
    with pytest.raises(ValueError, match="dataset's images are 1 x 16 x 16 .* but the model takes 1 x 8 x 8"):
        certify_dataset(moe, larger, check_names=False, progress=False)


# --- routes ----------------------------------------------------------------------------------------------------------


def route_moe(router, norm_std=(0.25, 0.5), **fields):
    torch.manual_seed(3)
    sizes = {"image_size": 5, "num_channels": 2, "num_labels": 3, "num_experts": 4, "router": router}
    config = MoEConfig(
        **{**sizes, "image_mean": [0.4, 0.5], "image_std": list(norm_std), "router_pool_size": 3, **fields},
        **{"backbone": "lipschitz_mlp", "backbone_kwargs": {"hidden_sizes": [4]}},
    )
    model = MoEForImageClassification(config).eval()
    shake(model.router)
    return model


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("router", ["linear", "pooled"])
def test_stepping_just_inside_and_just_outside_every_route_radius(router, norm):
    model = route_moe(router)
    torch.manual_seed(0)
    images = 0.4 + 0.2 * torch.rand(200, 2, 5, 5)
    double = copy.deepcopy(model).double()
    jacobian = torch.autograd.functional.jacobian(lambda x: double.route(x)[0].double(), images[:1].double())
    weight = jacobian[:, 0].flatten(1).float()  # independent of `effective_router_weight`
    torch.testing.assert_close(weight, effective_router_weight(model).detach().flatten(1), rtol=0, atol=1e-5)
    radii, rounded = (route_radii(model, images, norm, rounding=on) for on in (False, True))
    assert (rounded <= radii).all() and (radii - rounded).max() < 1e-3
    first = model.route(images).argmax(dim=1)
    assert (radii[range(200), first] == 0).all()
    tried = 0
    for expert in range(4):
        difference = weight[expert] - weight[first]
        direction = {  # the step of length 1 that moves their gap the most
            "l2": difference / difference.norm(dim=1, keepdim=True),
            "linf": difference.sign(),
            "l1": difference.sign() * F.one_hot(difference.abs().argmax(dim=1), difference.shape[1]),
        }[norm].view_as(images)
        for factor, overtaken in ((0.999, False), (1.001, True)):
            points = images + factor * per_image(radii[:, expert], images) * direction
            possible = ((points >= 0) & (points <= 1)).flatten(1).all(dim=1) & (radii[:, expert] > 0.01)
            if not possible.any():
                continue
            scores = model.route(points[possible])
            lead = scores[:, expert] - scores.gather(1, first[possible, None]).squeeze(1)
            assert ((lead > 0) == overtaken).all()
            tried += int(possible.sum())
    assert tried >= 20


def test_identical_router_rows():
    model = route_moe("linear")
    with torch.no_grad():
        model.router[-1].weight[:] = 0
        model.router[-1].bias.copy_(torch.tensor([0.0, 1.0, 0.5, 1.0]))
    assert route_radii(model, torch.rand(1, 2, 5, 5)).tolist() == [[math.inf, 0.0, math.inf, 0.0]]  # a tie is not safe


# --- rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_radii_are_rounded_inward(norm):
    """A linear network with known distances: certified radii are a little smaller, never larger."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(18, 4)).eval()
    images = torch.rand(200, 2, 3, 3)
    weight, logits = network[1].weight.detach().double(), network.double()(images.double())
    classes = logits.argmax(dim=1)
    slopes = dual_norm(weight[classes][:, None] - weight[None], norm)
    true = (logit_margins(logits, classes) / slopes.clamp_min(1e-12)).amin(dim=1)
    certificates = certify(network.float(), images, norm=norm)
    found = certificates.radius[true > 1e-3]
    assert (found < true[true > 1e-3]).all() and (found > 0.99 * true[true > 1e-3]).float().mean() > 0.9
    near = certificates.radius[true <= 1e-3]
    assert (near.isnan() | (near < true[true <= 1e-3])).all()


@pytest.mark.parametrize("arch", ["resnet", "vit"])
def test_slack_for_float32_logits_is_ample(make_moe, arch, images):
    model = make_moe(arch)
    double = copy.deepcopy(model).double()
    single, exact = model.expert_logits(images)[0], double.expert_logits(images.double())[0]
    error = (single.double() - exact).abs().amax() / (1 + exact.abs().amax())
    assert error < FLOAT_ERROR / 4


# --- what is not applicable ------------------------------------------------------------------------------------------


def not_applicable(certificates, images):
    """Why no theorem applies; "" where one does, or where something is promised all the same."""
    nothing = certificates.status == ["not applicable"] * len(images) and certificates.rule == [""] * len(images)
    nothing &= bool(certificates.radius.isnan().all()) and not certificates.certified_at(0.0).any()
    return certificates.reason if nothing else ""


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"router": "conv"}, "router='conv' is not affine"),
        ({"router_top_k": 2}, "router_top_k=2 of 4 experts: the gate jumps"),
        ({"backbone_image_size": 10}, "backbone_image_size=10 resizes"),
    ],
    ids=repr,
)
def test_mixtures_without_a_theorem(fields, reason):
    model = route_moe(**{"router": "linear", **fields})
    images = torch.rand(3, 2, 5, 5)
    certificates = certify(model, images)
    assert reason in not_applicable(certificates, images)
    assert (certificates.prediction >= 0).all()


def test_attention_and_half_precision_are_not_applicable(make_moe, images, moe):
    digits = torch.rand(2, 1, 8, 8)
    assert "self-attention" in not_applicable(certify(make_moe("vit"), images), images)
    assert not_applicable(certify(moe, digits), digits) == ""
    assert "bfloat16" in not_applicable(certify(moe.bfloat16(), digits), digits)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("place", "top_k"), [("expert", 1), ("expert", 3), ("last", 1), ("router", 1), ("router", 3), ("norm", 1)]
)
def test_numbers_that_are_none_are_not_applicable(place, value, top_k, moe, digits):
    """These were tracebacks of linear algebra, or certificates that rest on such a weight."""
    images, model = digits[2][:3], moe
    moe.config.router_top_k = top_k
    if place == "norm":
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, eps=0), nn.Flatten(), nn.Linear(72, 3)).eval()
        model[1].running_var[0] = 0 if math.isinf(value) else value
    else:
        weight = {
            "expert": moe.experts[1][1].applied_weight,
            "last": moe.experts[1][-1].applied_weight,
            "router": moe.router[-1].weight.data,
        }
        weight[place][0, 0] = value
    assert "NaN or infinite" in not_applicable(certify(model, images), images)


def test_constants_that_overflow_are_not_applicable():
    layers = [nn.Linear(4, 4) for _ in range(12)]
    for layer in layers:
        nn.init.eye_(layer.weight).data.mul_(1e30)
    images = torch.rand(2, 1, 2, 2)
    found = certify(nn.Sequential(nn.Flatten(), *layers).double().eval(), images.double())
    assert "overflows" in not_applicable(found, images)


def test_resnet_bounds_are_sound_and_reported_even_if_vacuous(make_moe, images):
    certificates = certify(make_moe("resnet"), images)
    assert set(certificates.rule) <= {"hard gate", ""} and certificates.reason == ""
    assert certificates.radius[~certificates.radius.isnan()].max() < 0.1


def test_dual_models_without_a_theorem(dual, digits):
    images = digits[2][:5]
    assert not_applicable(certify(dual, images), images) == ""
    dual.config.mixing = "logits"
    assert "mixing='logits'" in not_applicable(certify(dual, images), images)
    dual.config.mixing, dual.config.robust_logit_map = "probs", {"power": 2.0}
    assert "robust_logit_map" in not_applicable(certify(dual, images), images)


def test_logit_scales_enter_the_certificate(dual, digits):
    """F_R twice as confident: other radii, and attacks still fail."""
    _, _, images, _ = digits
    before = certify(dual, images)
    dual.config.robust_logit_map = {"scale": 2.0}
    after = certify(dual, images)
    assert after.radius.nansum() > 1.05 * before.radius.nansum()
    good = ~after.radius.isnan()
    arguments = images[good][:60], after.prediction[good][:60], after.radius[good][:60].float(), "l2"
    assert not strongest(dual, *arguments, steps=6).any()


def test_alpha_of_one_half_needs_a_bound_of_the_standard_model(make_moe, moe, digits):
    images = digits[2][:20]
    vit = make_moe("vit", image_size=8, num_channels=1, num_labels=10, image_mean=0.3, image_std=0.5, num_experts=1,
                   backbone_kwargs={"patch_size": 4, "embed_dim": 48, "depth": 1, "num_heads": 3})  # fmt: skip
    dual = DualMoEForImageClassification.from_models(vit, moe, alpha=0.5)
    for alpha in (0.0, 0.5):
        assert "the dual rule needs alpha > 1/2" in not_applicable(certify(dual, images, alpha=alpha), images)
    assert "dual over hard gate" in certify(dual, images, alpha=0.9).rule
    same = DualMoEForImageClassification.from_models(copy.deepcopy(moe), moe, alpha=0.3)
    assert "joint with hard gate, hard gate" in certify(same, images).rule


@pytest.mark.parametrize("alpha", [0.5, 0.2, -1.0, 1.01, math.nan])
def test_dual_rule_refuses_alpha(alpha):
    with pytest.raises(ValueError, match=r"must be in \(1/2, 1\]"):
        dual_radius(torch.ones(1, 2), torch.ones(1), alpha)


def test_bad_input(moe, dual, digits):
    images = digits[2][:2]
    with pytest.raises(ValueError, match="train mode"):
        Certifier(moe.train())
    certifier = Certifier(moe.eval())
    moe.experts[1].train()
    with pytest.raises(ValueError, match="train mode"):
        certifier(images)
    moe.eval()
    with pytest.raises(ValueError, match="norm='l7'"):
        Certifier(moe, "l7")
    with pytest.raises(ValueError, match="no dial"):
        certifier(images, alpha=0.9)
    with pytest.raises(ValueError, match=r"alpha=1.5 must be in \[0, 1\]"):
        Certifier(dual)(images, alpha=1.5)
    with pytest.raises(ValueError, match="shape=None"):
        Certifier(nn.Linear(3, 2).eval())
    with pytest.raises(ValueError, match="slope must be > 0"):
        margin_radius(torch.ones(1, 2), torch.zeros(1))
    with pytest.raises(ValueError, match="gate_constants=.* must be finite"):
        soft_gate_slope(torch.ones(1, 2) / 2, torch.tensor([1.0, math.inf]), torch.ones(2), torch.ones(2))


def test_certified_accuracy_counts_right_and_certified_images():
    radius = torch.tensor([0.3, math.nan, 0.5, 0.1]).double()
    found = Certificates.from_radii(torch.tensor([1, 1, 2, 0]), {"a": radius.nan_to_num(-1)}, "l2")
    assert found.status == ["certified", "abstain", "certified", "certified"] and found.rule == ["a", "", "a", "a"]
    assert found.certified_accuracy(torch.tensor([1, 1, 0, 0]), [0.05, 0.2, 0.4]) == [50.0, 25.0, 0.0]


# --- training for certificates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("router", ["linear", "pooled"])
def test_route_margins_are_the_exact_radii_and_differentiable(router, norm):
    model, images = route_moe(router), torch.rand(20, 2, 5, 5)
    margins = route_margins(model, images, norm)
    assert torch.allclose(margins.double(), route_radii(model, images, norm, rounding=False), rtol=1e-3, atol=1e-6)
    before = float(margins.detach().mean())
    optimizer = torch.optim.SGD(model.router.parameters(), lr=0.05)
    for _ in range(20):
        penalty = route_margin_penalty(model, images, radius=2.0, norm=norm)
        optimizer.zero_grad()
        penalty.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.router.parameters())
        optimizer.step()
    after = route_margin_penalty(model, images, radius=2.0, norm=norm)
    assert after < penalty or penalty == 0
    assert float(route_radii(model, images, norm).mean()) > before


def test_gate_lipschitz_penalty_is_the_largest_pair_and_falls():
    model = route_moe("linear")
    weight = effective_router_weight(model).detach().flatten(1)
    assert gate_lipschitz_penalty(model).item() == pytest.approx(torch.pdist(weight).max().item(), rel=1e-5)
    assert torch.equal(gate_constants(model).diagonal(), torch.zeros(4))
    gate_lipschitz_penalty(model).backward()
    before = gate_lipschitz_penalty(model).item()
    model.router[-1].weight.data -= 0.01 * model.router[-1].weight.grad
    assert gate_lipschitz_penalty(model).item() < before


def test_margin_penalty_is_zero_where_all_is_certified():
    logits, labels = torch.tensor([[5.0, 0.0, 1.0], [0.0, 2.0, 1.0]]), torch.tensor([0, 1])
    assert float(margin_penalty(logits, labels, radius=0.5, slope=2.0)) == 0
    assert float(margin_penalty(logits, labels, radius=1.0, slope=2.0)) == pytest.approx(0.25)
    assert float(margin_penalty(logits, 1 - labels, radius=1.0, slope=2.0)) > 1
    for name in ("radius", "slope"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            margin_penalty(logits, labels, **{"radius": 1.0, "slope": 1.0, name: 0})


def test_certified_loss_adds_its_terms_and_reaches_every_part(moe, digits):
    images, labels = digits[2][:50], digits[3][:50]
    weights = {"margin_weight": 0.7, "route_weight": 0.3, "gate_weight": 0.2}
    found = certified_loss(moe, images, labels, radius=0.2, **weights)
    output = moe(images)
    slope = backbone_slope(moe)
    assert slope == pytest.approx(math.sqrt(2) * 3 / 0.5)
    expected = (
        F.cross_entropy(output.logits, labels)
        + 0.01 * output.aux_loss
        + 0.7 * margin_penalty(output.logits, labels, radius=0.2, slope=slope)
        + 0.3 * route_margin_penalty(moe, images, radius=0.2)
        + 0.2 * gate_lipschitz_penalty(moe)
    )
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert set(found.terms) == {"ce", "aux", "margin", "route", "gate"}
    found.loss.backward()
    assert moe.router[-1].weight.grad.abs().sum() > 0 and moe.experts[0][-1].bias.grad.abs().sum() > 0
    moe.config.backbone = "resnet18"
    with pytest.raises(ValueError, match="is no 1-Lipschitz backbone"):
        certified_loss(moe, images, labels, radius=0.2)
