"""Component attacks and the adaptive union, on hand-made models whose answers are known in closed form.

Those have 12x12 pixels in regions that single parts look at, so that it is known which attack sees what. Other models
are attacked in float64, for the reason given in `test_autoattack`.
"""

import copy
import json
import re

import pytest
import torch
from conftest import assert_same_trace, trace
from torch import nn

from hf_dualmoe import DualMoEForImageClassification, MoEConfig, MoEForImageClassification
from hf_dualmoe.attacks import adaptive_union
from hf_dualmoe.attacks.adaptive_union import worst_case
from hf_dualmoe.attacks.apgd import APGD
from hf_dualmoe.attacks.base import frozen
from hf_dualmoe.attacks.components import attack_experts, attack_router, fixed_expert, soft_logits
from hf_dualmoe.attacks.members import route_members
from hf_dualmoe.attacks.pgd import PGD
from hf_dualmoe.models.outputs import logits_of

EPS, TOY_EPS, SIDE, CLASSES = 0.05, 0.02, 12, 4
TRICK, LEVER = slice(3, 23), slice(44, 144)  # pixels; 0-2 show the class


def linear_moe(experts, router=None, **fields):
    """A float64 mixture of affine experts: a list of (weight (C, D), bias (C,)), and the router's (E, D), (E,)."""
    side = int(experts[0][0].shape[1] ** 0.5)
    sizes = {"image_size": side, "num_channels": 1, "num_labels": len(experts[0][1]), "num_experts": len(experts)}
    config = MoEConfig(backbone="resnet10t", width=[8] * 4, **{**sizes, "image_mean": 0.0, "image_std": 1.0, **fields})
    model = MoEForImageClassification(config)
    model.experts = nn.ModuleList(affine(*expert) for expert in experts)
    if router is not None:
        model.router = affine(*router)
    return model.double().eval()


def linear_dual(standard, robust, alpha=0.75):
    """A dual model of affine mixtures, which `from_models` refuses: no config describes them."""
    parts = [MoEForImageClassification(part.config).double().eval() for part in (standard, robust)]
    dual = DualMoEForImageClassification.from_models(*parts, alpha=alpha)
    dual.standard, dual.robust = standard, robust
    return dual


def affine(weight, bias):
    layer = nn.Linear(weight.shape[1], len(weight))
    layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
    return nn.Sequential(nn.Flatten(), layer)


def readout(gain, lift=0.0, trick=0.0):
    """Class c < 3 scores gain * pixel c; class 3 scores lift + trick * sum of (pixel - 1/2) over TRICK."""
    weight, bias = torch.zeros(CLASSES, SIDE**2), torch.zeros(CLASSES)
    weight[range(3), range(3)] = gain
    weight[3, TRICK] = trick
    bias[3] = lift - trick * 10
    return weight, bias


def lever():
    """Expert 0, until the LEVER pixels rise by 0.4 eps on average: noise never gets there, an attack does."""
    weight, bias = torch.zeros(2, SIDE**2), torch.zeros(2)
    weight[1, LEVER] = 1.0
    bias[1] = -50 - 40 * EPS
    return weight, bias


@pytest.fixture
def shown():
    """Six images (6, 1, 12, 12) of classes 0, 1, 2 that `readout(10)` gets right by a margin of 6, and labels."""
    labels = torch.arange(6) % 3
    images = torch.full((6, SIDE**2), 0.5)
    images[:, :3] = 0.2
    images[range(6), labels] = 0.8
    return images.view(6, 1, SIDE, SIDE).double(), labels


@pytest.fixture
def toy(toy_dual, toy_data):
    """A mixture of two experts, 20 images of which not all fall within TOY_EPS, and labels."""
    model = copy.deepcopy(toy_dual.robust).double()
    return model, toy_data.images[:20].double() / 255, toy_data.labels[:20]


def accuracy(model, images, labels):
    with torch.no_grad(), frozen(model):
        return 100 * (logits_of(model, images).argmax(1) == labels).double().mean().item()


def pgd_accuracy(model, images, labels):
    attacks = [PGD(eps=EPS, steps=30, restarts=3, seed=0, objective=name) for name in ("ce", "margin")]
    return min(accuracy(model, attack(model, images, labels), labels) for attack in attacks)


# --- what the union finds and plain attacks miss ---------------------------------------------------------------------


def test_union_finds_the_expert_that_is_wrong_everywhere(shown):
    model = linear_moe([readout(10, 2), readout(0, 5)], lever())
    result = worst_case(model, *shown, eps=EPS, steps=10)
    assert pgd_accuracy(model, *shown) == 100
    assert [result.members[name] for name in ("whole ce", "whole dlr", "expert 0", "expert 1")] == [100] * 4
    assert [result.members[name] for name in ("route", "route to expert 1")] == [0] * 2
    assert result.members["route to expert 0"] == 100
    assert result.members["soft T=1"] == 0
    assert result.accuracy == 0 and result.clean_correct.all()


@pytest.mark.parametrize("scale", [1, 1e3])
def test_only_an_attack_on_both_breaks_an_expert_behind_the_route(shown, scale):
    """Expert 1 is right when clean and breaks on the TRICK pixels; scores of any scale must not hide it."""
    weight, bias = lever()
    model = linear_moe([readout(10, 2), readout(1, trick=2)], (scale * weight, scale * bias))
    result = worst_case(model, *shown, eps=EPS, steps=20)
    assert pgd_accuracy(model, *shown) == 100
    assert [result.members[name] for name in ("whole ce", "route", "expert 0", "expert 1")] == [100] * 4
    assert result.members["route to expert 1"] == 0 and result.accuracy == 0
    assert min(value for name, value in result.members.items() if name.startswith("soft")) == 0


def test_every_expert_is_tried_not_the_nearest_and_the_weakest_alone(shown):
    """The nearest expert is sound, the weakest on clean images never breaks; the third breaks where nobody looked."""
    (weight, bias), images = lever(), shown[0]
    router = torch.stack([weight[0], weight[1], weight[1], weight[1]]), torch.stack([bias[0], *[bias[1]] * 3])
    router[0][3, TRICK] = 2.0  # also lifts expert 3 over the others
    router[1][1] += 5 * EPS
    router[1][3] -= 20.5
    weakest = readout(10, 7)  # 8 against 7: of a range of 8 the least margin, and 0.5 is left of it at eps
    model = linear_moe([readout(10, 2), readout(10, 2), weakest, readout(1, trick=2)], router)
    result = worst_case(model, *shown, eps=EPS, steps=20)
    assert (model.route(images).argsort(dim=1, descending=True) == torch.tensor([0, 1, 2, 3])).all()
    assert result.members["route to expert 3"] == 0 and result.accuracy == 0
    assert [result.members[f"route to expert {i}"] for i in range(3)] == [100] * 3


def independent_attack(model, images, labels, eps, steps=40):
    """(B,) bool: what stands when Adam, for every expert in turn, raises min(route lead, margin), in clean ranges."""
    stands = model(images).logits.argmax(1) == labels
    index = torch.arange(len(images))
    for expert in range(model.config.num_experts):
        chosen = torch.full_like(labels, expert)
        units = [z.detach().max(1).values - z.detach().min(1).values for z in both(model, images, chosen)]
        delta = torch.zeros_like(images, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=eps / 5)
        for _ in range(steps):
            point = (images + eps * delta.div(eps).tanh()).clamp(0, 1)
            with torch.no_grad():
                stands &= model(point).logits.argmax(1) == labels
            scores, logits = both(model, point, chosen)
            others = [i for i in range(scores.shape[1]) if i != expert]
            lead = (scores[:, expert] - scores[:, others].max(1).values) / units[0]
            wrong = logits.masked_fill(nn.functional.one_hot(labels, logits.shape[1]).bool(), -1e9).max(1).values
            margin = (wrong - logits[index, labels]) / units[1]
            adam.zero_grad()
            (-torch.minimum(lead, margin).sum()).backward()
            adam.step()
    return stands


def both(model, images, expert):
    return model.route(images), model(images, expert_index=expert).logits


def test_nothing_that_the_union_leaves_falls_to_an_attack_written_without_it(trained_digits_moe):
    model, images, labels = trained_digits_moe
    model, images, labels = model.double(), images[:20].double(), labels[:20]
    stands = independent_attack(model, images, labels, eps=2 * EPS)
    result = worst_case(model, images, labels, eps=2 * EPS, steps=20, own_accuracy=False)
    assert 0 < stands.sum() < result.clean_correct.sum()  # neither nothing nor everything falls
    assert not (result.robust & ~stands).any()


def test_saturated_standard_model_is_found(shown):
    """alpha = 0.4: F_S decides, but its probabilities are flat in float32: gradients of the mixture do not see it."""
    standard = linear_moe([tuple(1e3 * part for part in readout(1, trick=2))])
    dual = linear_dual(standard, linear_moe([readout(10, 2)]), alpha=0.4)
    result = worst_case(dual, *shown, eps=EPS, steps=20, alphas=[0.0, 0.9])
    assert pgd_accuracy(dual, *shown) == 100
    assert [result.members[name] for name in ("whole ce", "whole dlr", "alpha=0.9", "robust")] == [100] * 4
    assert result.members["standard"] == result.members["alpha=0"] == result.accuracy == 0


def test_both_components_together_break_what_neither_breaks_alone(shown):
    """alpha = 0.75: F_S must break, and F_R, which cannot break, must come within a third; the one sees only TRICK."""
    standard = linear_moe([tuple(1e3 * part for part in readout(1, trick=2))])
    weight, bias = readout(10, 2.0)
    weight[3, LEVER] = 1.0
    bias[3] -= 50
    dual = linear_dual(standard, linear_moe([(weight, bias)]), alpha=0.75)
    result = worst_case(dual, *shown, eps=EPS, steps=20)
    assert pgd_accuracy(dual, *shown) == 100
    assert [result.members[name] for name in ("whole ce", "standard", "robust", "alpha=0.99")] == [100] * 4
    assert result.members["standard + robust"] == 0 and result.accuracy == 0


def test_soft_routing_inside_the_robust_part_of_a_dual(shown):
    standard, robust = linear_moe([readout(10, 2)]), linear_moe([readout(10, 2), readout(0, 5)], lever())
    dual = linear_dual(standard, robust, alpha=0.75)
    result = worst_case(dual, *shown, eps=EPS, steps=10)
    assert result.members["whole ce"] == result.members["robust"] == 100
    assert result.members["soft T=1"] == result.members["route to expert 1"] == result.members["route"] == 0


def test_soft_logits_near_the_hard_route_and_near_an_equal_mixture(resnet_moe, images, make_dual):
    logits, _ = resnet_moe.expert_logits(images)
    hard, equal = resnet_moe(images).logits.softmax(1), logits.softmax(2).mean(1)
    torch.testing.assert_close(soft_logits(resnet_moe, images, 1e-4).softmax(1), hard)
    torch.testing.assert_close(soft_logits(resnet_moe, images, 1e4).softmax(1), equal, atol=1e-3, rtol=0)
    dual = make_dual(alpha=0.6)
    output = dual(images)
    torch.testing.assert_close(soft_logits(dual, images, 1e-4), output.logits)


# --- the union as a whole --------------------------------------------------------------------------------------------


def test_restarts_and_members_of_the_union_start_elsewhere(toy, monkeypatch):
    starts, draw = [], adaptive_union.random_start

    def recorded(*args, **kwargs):
        starts.append(draw(*args, **kwargs))
        return starts[-1]

    monkeypatch.setattr(adaptive_union, "random_start", recorded)
    worst_case(*toy, eps=1e-6, steps=1, restarts=2, members=["whole ce", "whole dlr"])
    assert len({len(start) for start in starts}) == 1  # nothing falls at such a radius
    assert len(starts) == 4 == len(torch.stack(starts).unique(dim=0))


def test_union_is_pointwise_and_below_every_member(toy):
    model, images, labels = toy
    result = worst_case(model, images, labels, eps=TOY_EPS, steps=4, restarts=2, temperatures=[1.0])
    clean = result.clean_correct
    assert result.accuracy <= min(result.members.values()) <= max(result.members.values()) <= result.union["clean"]
    assert list(result.union.values()) == sorted(result.union.values(), reverse=True)
    assert result.accuracy == list(result.union.values())[-1] < result.union["clean"]
    with torch.no_grad():
        assert torch.equal(model(images).logits.argmax(1) == labels, clean)
        right = model(result.adversarial).logits.argmax(1) == labels
    assert torch.equal(right, result.robust)
    assert torch.equal(result.adversarial[result.robust], images[result.robust])
    assert list(result.members) == [
        *("whole ce", "whole dlr", "route"),
        *(f"{way}expert {i}" for way in ("route to ", "") for i in range(2)),
        "soft T=1",
    ]


@pytest.mark.parametrize("norm, eps", [("linf", TOY_EPS), ("l2", 0.2)])
def test_every_image_shown_to_the_model_lies_in_the_ball_and_the_box(toy, norm, eps):
    model, images, labels = toy
    right = (model(images).logits.argmax(1) == labels).nonzero().flatten().tolist()  # others are not attacked
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for i in right[:3]:
        seen.clear()
        worst_case(model, images[i : i + 1], labels[i : i + 1], eps=eps, norm=norm, steps=4)
        delta = (torch.cat(seen) - images[i]).flatten(1)
        distance = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
        assert 0.9 * eps < distance.max() <= eps + 1e-6
        assert torch.cat(seen).min() >= 0 and torch.cat(seen).max() <= 1


def test_result_depends_on_seed_and_ids_not_on_the_batch(toy):
    model, images, labels = toy
    settings = {"eps": TOY_EPS, "steps": 4, "temperatures": [1.0]}
    whole = worst_case(model, images, labels, **settings)
    small = worst_case(model, images, labels, batch_size=7, **settings)
    ids = torch.arange(6, 16)
    part = worst_case(model, images[6:16], labels[6:16], ids=ids, **settings)
    torch.testing.assert_close(small.adversarial, whole.adversarial)
    torch.testing.assert_close(part.adversarial, whole.adversarial[6:16])
    assert small.members == whole.members and small.passes == whole.passes
    assert not torch.equal(worst_case(model, images, labels, seed=1, **settings).adversarial, whole.adversarial)


def test_without_own_accuracy_the_union_is_the_same_and_cheaper(toy):
    full = worst_case(*toy, eps=TOY_EPS, steps=4, restarts=2, temperatures=[1.0])
    fast = worst_case(*toy, eps=TOY_EPS, steps=4, restarts=2, temperatures=[1.0], own_accuracy=False)
    assert torch.equal(fast.adversarial, full.adversarial) and torch.equal(fast.robust, full.robust)
    assert fast.union == full.union and fast.members == {}
    assert fast.passes["gradient"] < full.passes["gradient"] and fast.passes["forward"] < full.passes["forward"]


def test_passes_are_counted(shown):
    """Nothing breaks: each of 2 + 5 + 3 members takes 4 gradients, 4 looks and a last one.

    Those on the model itself see with their gradients, but for the end; two first ask an expert for its range.
    """
    model = linear_moe([readout(10, 2), readout(10, 2)], lever())
    result = worst_case(model, *shown, eps=1e-3, steps=4)
    assert result.accuracy == 100
    assert result.passes == {"gradient": 10 * 4, "forward": 1 + 8 * 5 + 2 * 2 + 2}


@pytest.mark.parametrize("num_experts", [2, 3, 8])
def test_the_members_that_route_cost_no_more_than_e_plus_two_of_full_length(shown, num_experts):
    model = linear_moe([readout(10, 2)] * num_experts, tuple(part[[0] * (num_experts - 1) + [1]] for part in lever()))
    steps = [member.steps(20) for member in route_members(model)]
    assert sum(steps) <= 20 * (1 + num_experts + 2) and steps[: 1 + num_experts] == [20] * (1 + num_experts)


def test_zero_eps_leaves_the_clean_accuracy_and_mistakes_are_not_robust(toy):
    model, images, labels = toy
    labels = torch.where(torch.arange(20) < 10, (labels + 1) % 4, labels)
    result = worst_case(model, images, labels, eps=0.0, steps=2)
    assert torch.equal(result.robust, model(images).logits.argmax(1) == labels) and 0 < result.accuracy < 100
    assert torch.equal(result.robust, result.clean_correct) and torch.equal(result.adversarial, images)


def test_members_can_be_named_and_the_result_is_fit_for_json(toy):
    result = worst_case(*toy, eps=EPS, steps=1, members=["soft T=1", "whole ce", "no such"])
    assert list(result.members) == ["whole ce", "soft T=1"]
    record = json.loads(json.dumps(result.to_dict()))
    assert record["accuracy"] == result.accuracy and record["num_images"] == 20
    assert record["members"] == result.members and record["passes"] == result.passes
    assert record["settings"]["eps"] == EPS and record["settings"]["temperatures"] == [0.2, 1.0, 5.0]


@pytest.mark.parametrize(
    "fields", [{"router_top_k": 2}, {"router_top_k": 4}, {"router": "features", "shared_stages": 2}]
)
def test_several_experts_per_image_and_shared_trunks(make_moe, images, fields):
    model = make_moe("resnet", **fields)
    images = images[:5]
    labels = model(images).logits.argmax(1)
    result = worst_case(model, images, labels, eps=8 / 255, steps=1, temperatures=[1.0])
    assert len(result.members) == 2 + 1 + 2 * 4 + 1
    assert torch.equal(model(result.adversarial).logits.argmax(1) == labels, result.robust)


def test_members_that_do_not_apply_are_left_out(make_moe, make_dual, native_vit, images, labels):
    def names(model):
        return list(worst_case(model, images[:2], labels[:2], eps=0.0, steps=1, temperatures=[1], alphas=[0.5]).union)

    whole, dual = ["clean", "whole ce", "whole dlr"], ["robust", "standard", "standard + robust", "alpha=0.5"]
    routes = ["route", *(f"{way}expert {i}" for way in ("route to ", "") for i in range(4)), "soft T=1"]
    one, many = make_moe("resnet", num_experts=1), make_moe("resnet")
    join = DualMoEForImageClassification.from_models
    assert names(native_vit) == names(lambda x: native_vit(x).logits) == names(one) == whole
    assert names(make_dual()) == whole + dual + routes
    assert names(join(native_vit, one)) == whole + dual
    assert names(join(many, native_vit)) == whole + dual + ["soft T=1"]


def test_two_classes_have_no_ratio_of_three(shown):
    weight = torch.stack([torch.ones(SIDE**2), -torch.ones(SIDE**2)])
    model, labels = linear_moe([(weight, torch.tensor([-72.0, 72.0]))]), torch.zeros(6, dtype=torch.int64)
    result = worst_case(model, shown[0].clamp_min(0.52), labels, eps=EPS, steps=3)
    assert result.members == {"whole ce": 0, "whole margin": 0}


def test_large_logits_hide_nothing_where_there_are_two_classes(shown):
    """The gradient of the cross-entropy is 0 there: what the union without the margin could not break, it breaks."""
    weight = 1e4 * torch.stack([torch.ones(SIDE**2), -torch.ones(SIDE**2)])
    model, labels = linear_moe([(weight, torch.tensor([-72e4, 72e4]))]), torch.zeros(6, dtype=torch.int64)
    images = shown[0].clamp(0.505, 0.51)
    run = {"eps": EPS, "steps": 3}
    assert worst_case(model, images, labels, **run, members=["whole ce"]).robust.all()
    assert not worst_case(model, images, labels, **run).robust.any()


def test_model_is_left_as_it_was(make_dual, images, labels):
    dual = make_dual().train()
    dual.robust.experts[1].eval()
    dual.standard.router[1].weight.requires_grad_(False)
    before = trace(dual)
    with torch.inference_mode():
        worst_case(dual, images[:4], labels[:4], eps=EPS, steps=1, temperatures=[1], alphas=[0.5])
    attack_experts(dual, images[:4], labels[:4], attack=PGD(eps=EPS, steps=1))
    attack_router(dual, images[:4], labels[:4], eps=EPS, steps=1)
    assert_same_trace(dual, before)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"eps": 8}, "eps=8 is larger than the whole pixel range [0, 1]; did you mean 8/255?"),
        ({"norm": "l1"}, "norm='l1' is not one of 'linf', 'l2'."),
        ({"steps": 0}, "steps=0 must be an integer of at least 1."),
        ({"restarts": 1.5}, "restarts=1.5 must be an integer of at least 1."),
        ({"batch_size": 0}, "batch_size=0 must be an integer of at least 1."),
        ({"temperatures": []}, "temperatures=[] must hold one or more finite numbers > 0."),
        ({"temperatures": [1.0, 0]}, "temperatures=[1.0, 0] must hold one or more finite numbers > 0."),
        ({"alphas": ()}, "alphas=[] must hold at least one value, each in [0, 1]."),
        ({"alphas": [1.2]}, "alphas=[1.2] must hold at least one value, each in [0, 1]."),
        (
            {"members": ["robust"]},
            "members=['robust']: none applies; expected some of ['whole ce', 'whole dlr', 'route'",
        ),
        ({"ids": torch.arange(3)}, "ids has shape (3,); expected one number per image, (13,)."),
    ],
)
def test_wrong_settings_are_named(resnet_moe, images, labels, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        worst_case(resnet_moe, images, labels, **{"eps": EPS, **settings})


def test_wrong_data_and_broken_models_are_named(resnet_moe, images, labels):
    with pytest.raises(ValueError, match=re.escape("images lie in")):
        worst_case(resnet_moe, 255 * images, labels, eps=EPS)
    with pytest.raises(ValueError, match=re.escape("labels lie in [0, 9]; expected values in [0, 7).")):
        worst_case(resnet_moe, images, labels.clone().fill_(9).scatter(0, torch.tensor([0]), 0), eps=EPS)

    def breaks_under_attack(points):
        logits = torch.cat([points[:, :1].mean((2, 3)), points.mean((2, 3))], dim=1)
        return logits + 1 if any((points[:, None] == images).flatten(2).all(2).any(1)) else logits * torch.nan

    right = breaks_under_attack(images).argmax(1)
    with pytest.raises(ValueError, match="NaN or infinite on images of 'whole ce'"):
        worst_case(breaks_under_attack, images, right, eps=EPS, steps=1)


# --- component attacks -----------------------------------------------------------------------------------------------


@pytest.fixture
def random_linear():
    """random_linear(E, C): a mixture of random affine experts and router on 8x8 pixels in the middle of the range."""

    def make(num_experts, num_classes, seed=0, **fields):
        generator = torch.Generator().manual_seed(seed)

        def draw(rows):
            weight = torch.randn(rows, 64, generator=generator)
            return weight, -weight.sum(1) / 2  # balanced around mid-grey

        return linear_moe([draw(num_classes) for _ in range(num_experts)], draw(num_experts), **fields)

    return make


@pytest.fixture
def grey():
    return 0.3 + 0.4 * torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def test_expert_attack_is_exact_on_linear_experts(random_linear, grey):
    """Two classes: the worst point is a corner that the expert of the clean route points to, wherever routes go."""
    model = random_linear(3, 2)
    labels = model(grey).logits.argmax(1)
    attacked = attack_experts(model, grey, labels, attack=PGD(eps=EPS, steps=10, seed=0))
    route = model.route(grey).argmax(1)
    weight = torch.stack([expert[1].weight for expert in model.experts])[route]  # (B, 2, 64)
    downhill = weight[range(10), 1 - labels] - weight[range(10), labels]
    torch.testing.assert_close(attacked, grey + EPS * downhill.sign().view_as(grey))
    assert len(route.unique()) > 1 and (model.route(attacked).argmax(1) != route).any()


def test_expert_attack_takes_attacks_that_drop_images(random_linear, grey):
    model = random_linear(3, 4)
    labels = model(grey).logits.argmax(1)
    attack = APGD(eps=0.02, steps=20)
    attacked = attack_experts(model, grey, labels, attack=attack)
    route = model.route(grey).argmax(1)
    broken = model(attacked, expert_index=route).logits.argmax(1) != labels
    weight, logits = torch.stack([e[1].weight for e in model.experts])[route], model(grey).logits
    lead = logits.gather(1, labels[:, None]) - logits
    lead /= (weight[range(10), labels][:, None] - weight).abs().sum(2).clamp_min(1e-12)
    radius = lead.scatter(1, labels[:, None], torch.inf).amin(1)
    assert not broken[radius > 0.02].any() and broken[radius < 0.018].all() and (radius > 0.018).any()
    assert not attacked.requires_grad and (attacked - grey).abs().max() <= 0.02 + 1e-9


def test_expert_attack_on_a_dual_fixes_both_routes(random_linear, grey):
    standard, robust = random_linear(3, 4, seed=5), random_linear(2, 4, seed=6)
    dual = linear_dual(standard, robust, alpha=0.5)
    labels, attack = dual(grey).logits.argmax(1), PGD(eps=EPS, steps=6, seed=0)
    for alpha, alone in ((0.0, standard), (1.0, robust)):
        dual.set_alpha(alpha)
        expected = attack_experts(alone, grey, labels, attack=attack)
        torch.testing.assert_close(attack_experts(dual, grey, labels, attack=attack), expected)
    dual.set_alpha(0.5)
    expected = dual.mix(standard.expert_logits(grey)[0][:, 2], robust.expert_logits(grey)[0][:, 1])
    torch.testing.assert_close(fixed_expert(dual, grey, expert=1, standard_expert=2), expected)


def test_router_attack_flips_exactly_beyond_the_route_radius(random_linear, grey):
    """rho = min_k (g_i - g_k) / ||W_i - W_k||_1; with several others, the nearest k need not be second in score."""
    model = random_linear(5, 3, image_std=0.5)
    weight, scores = model.router[1].weight / 0.5, model.route(grey).double()
    route = scores.argmax(1)
    distance = (weight[route][:, None] - weight).abs().sum(2)
    radius = (scores.gather(1, route[:, None]) - scores) / distance
    radius = radius.scatter(1, route[:, None], torch.inf).amin(1).tolist()
    labels = torch.zeros(1, dtype=torch.int64)
    for image, index, rho in zip(grey.split(1), route, radius, strict=True):
        for factor in (0.97, 1.03):
            attacked = attack_router(model, image, labels, eps=factor * rho)
            assert (model.route(attacked).argmax() != index) == (factor > 1)
            assert (attacked - image).abs().max() <= factor * rho + 1e-9


def test_router_attack_of_one_expert_has_no_route_to_change(random_linear, grey):
    labels = torch.zeros(10, dtype=torch.int64)
    assert torch.equal(attack_router(random_linear(1, 3), grey, labels, eps=EPS), grey)


def test_router_attack_on_a_dual_moves_the_robust_part(random_linear, grey):
    standard, robust = random_linear(3, 4, seed=5), random_linear(2, 4, seed=6)
    dual = linear_dual(standard, robust)
    labels = torch.zeros(10, dtype=torch.int64)
    expected = attack_router(robust, grey, labels, eps=EPS)
    assert torch.equal(attack_router(dual, grey, labels, eps=EPS), expected) and not torch.equal(expected, grey)


def test_component_attacks_need_experts(native_vit, make_moe, images, labels):
    dual = DualMoEForImageClassification.from_models(make_moe("resnet"), native_vit)
    attack = PGD(eps=EPS, steps=1)
    for model, part in ((native_vit, "its model is"), (dual, "its robust component is")):
        message = f"model={type(model).__name__} has no experts to attack: {part} no mixture of experts."
        with pytest.raises(ValueError, match=re.escape(message)):
            attack_experts(model, images, labels, attack=attack)
        with pytest.raises(ValueError, match=re.escape(message)):
            attack_router(model, images, labels, eps=EPS)
    with pytest.raises(ValueError, match="did you mean 8/255"):
        attack_router(make_moe("resnet"), images, labels, eps=8)
