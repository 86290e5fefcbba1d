"""Each objective against its formula, and the single backward of JTDMoE against two separate ones."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_dualmoe import DualMoEConfig, DualMoEForImageClassification, MoEConfig, MoEForImageClassification
from hf_dualmoe.attacks.base import frozen
from hf_dualmoe.attacks.nfgsm import NFGSM
from hf_dualmoe.attacks.pgd import PGD
from hf_dualmoe.losses.adversarial import (
    at_loss,
    jtdmoe_loss,
    kl_divergence,
    rt_er_loss,
    second_expert,
    standard_loss,
    trades_loss,
)

ATTACK = PGD(eps=0.05, steps=2, keep_best=False, seed=3)  # seeded: the same images whenever it is called
# GroupNorm, so that a formula can be recomputed one term at a time
TINY = {"width": [8, 8, 16, 16], "num_labels": 7, "image_size": 14, "backbone_kwargs": {"norm_layer": "groupnorm1"}}


@pytest.fixture(scope="module")
def moe():
    torch.manual_seed(0)
    return MoEForImageClassification(MoEConfig(**TINY, num_experts=3)).train()


@pytest.fixture(scope="module")
def dual():
    torch.manual_seed(1)
    config = DualMoEConfig(standard=MoEConfig(**TINY, num_experts=2), robust=MoEConfig(**TINY, num_experts=3))
    return DualMoEForImageClassification(config).train()


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(2)
    return torch.rand(11, 3, 14, 14, generator=generator), torch.randint(7, (11,), generator=generator)


def aux(model, output):
    return model.config.router_aux_loss_coef * output.aux_loss


def test_standard_is_cross_entropy(moe, batch):
    images, labels = batch
    expected = moe(images, labels=labels).loss
    assert torch.allclose(standard_loss(moe, images, labels).loss, expected)


def test_at_is_cross_entropy_on_attacked_images(moe, batch):
    images, labels = batch
    attacked = ATTACK(moe, images, labels)
    output = at_loss(moe, images, labels, attack=ATTACK)
    expected = moe(attacked)
    assert torch.equal(output.attacked_images, attacked)
    assert torch.allclose(output.loss, F.cross_entropy(expected.logits, labels) + aux(moe, expected))
    assert torch.equal(output.attacked_logits, expected.logits) and not output.attacked_logits.requires_grad


def test_at_with_clean_images_formula(moe, batch):
    images, labels = batch
    calls = []

    def forward(pixel_values):
        calls.append(len(pixel_values))
        return moe(pixel_values)

    output = at_loss(moe, images, labels, attack=ATTACK, clean_weight=0.3, label_smoothing=0.1, forward=forward)
    assert calls == [22]  # attacked and clean
    attacked = ATTACK(moe, images, labels)
    robust_ce, ce = (F.cross_entropy(moe(x).logits, labels, label_smoothing=0.1) for x in (attacked, images))
    balance = aux(moe, moe(torch.cat([attacked, images])))
    assert torch.allclose(output.loss, 0.7 * robust_ce + 0.3 * ce + balance, atol=1e-5)
    assert torch.allclose(output.terms["robust_ce"], robust_ce, atol=1e-5)
    assert torch.allclose(output.terms["ce"], ce, atol=1e-5)
    assert torch.equal(output.attacked_images, attacked)
    torch.testing.assert_close(output.attacked_logits, moe(attacked).logits)


@pytest.mark.parametrize("clean_weight", [1.0, -0.1, float("nan")])
def test_a_share_of_clean_images_out_of_range_is_refused(moe, batch, clean_weight):
    with pytest.raises(ValueError, match=rf"clean_weight={clean_weight} must be in \[0, 1\)"):
        at_loss(moe, *batch, attack=ATTACK, clean_weight=clean_weight)


def test_trades_formula(moe, batch):
    images, labels = batch
    attack = PGD(eps=0.05, steps=2, objective="kl", keep_best=False, seed=3)
    output = trades_loss(moe, images, labels, attack=attack, trades_lambda=2.5)
    attacked = attack(moe, images, labels)
    p, q = moe(images).logits.softmax(1), moe(attacked).logits.softmax(1)
    kl = (p * (p / q).log()).sum(1).mean()
    ce = F.cross_entropy(moe(images).logits, labels)
    assert torch.allclose(output.terms["kl"], kl, atol=1e-6)
    balance = aux(moe, moe(torch.cat([attacked, images])))
    assert torch.allclose(output.loss, ce + 2.5 * kl + balance, atol=1e-5)


def test_second_expert_is_the_second_highest_score():
    assert second_expert(torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 9.0]])).tolist() == [2, 1]
    with pytest.raises(ValueError, match="num_experts=1"):
        second_expert(torch.zeros(4, 1))


@pytest.mark.parametrize("second_attack", ["own", "shared"])
@pytest.mark.parametrize("second_term", ["kl", "ce"])
def test_rt_er_formula(moe, batch, second_term, second_attack):
    images, labels = batch
    options = {"second_term": second_term, "second_attack": second_attack}
    output = rt_er_loss(moe, images, labels, attack=ATTACK, beta=1.7, **options)

    second = moe.route(images).topk(2, dim=1).indices[:, 1]
    attacked = ATTACK(moe, images, labels)
    attacked_second = attacked
    if second_attack == "own":
        with frozen(moe):
            attacked_second = ATTACK(lambda x: moe(x, expert_index=second), images, labels)
        assert not torch.equal(attacked, attacked_second)
    whole = moe(attacked)
    logits = moe(attacked_second, expert_index=second).logits
    expert = F.cross_entropy(logits, labels)
    if second_term == "kl":
        expert = kl_divergence(logits, moe(images, expert_index=second).logits)
    expected = F.cross_entropy(whole.logits, labels) + 1.7 * expert + aux(moe, whole)
    assert torch.allclose(output.loss, expected, atol=1e-5)
    assert torch.allclose(output.terms[f"expert_{second_term}"], expert, atol=1e-5)


def test_rt_er_smooths_the_labels_of_both_terms(moe, batch):
    images, labels = batch
    options = {"second_term": "ce", "second_attack": "shared", "label_smoothing": 0.2}
    output = rt_er_loss(moe, images, labels, attack=ATTACK, **options)
    attacked, second = ATTACK(moe, images, labels), moe.route(images).topk(2, dim=1).indices[:, 1]
    for name, logits in (
        ("robust_ce", moe(attacked).logits),
        ("expert_ce", moe(attacked, expert_index=second).logits),
    ):
        expected = F.cross_entropy(logits, labels, label_smoothing=0.2)
        assert torch.allclose(output.terms[name], expected, atol=1e-5), name


def test_rt_er_trains_second_expert_too(moe, batch):
    """Without the expert term only the chosen experts get a gradient."""
    images, labels = batch
    model = copy.deepcopy(moe)
    index = torch.full((11,), 1)
    model.router[1].weight.data.zero_()
    model.router[1].bias.data.copy_(torch.tensor([0.0, 2.0, 1.0]))  # first choice 1, second choice 2
    assert torch.equal(model.route(images).argmax(1), index)
    rt_er_loss(model, images, labels, attack=ATTACK).loss.backward()
    touched = [any(p.grad is not None and p.grad.abs().sum() > 0 for p in e.parameters()) for e in model.experts]
    assert touched == [False, True, True]


def test_rt_er_makes_one_forward(moe, batch):
    calls = []

    def forward(pixel_values, **kwargs):
        calls.append(len(pixel_values))
        return moe(pixel_values, **kwargs)

    rt_er_loss(moe, *batch, attack=ATTACK, forward=forward)
    assert calls == [33]  # attacked, clean second, attacked second


def test_jtdmoe_single_backward_equals_two_separate_ones(dual, batch):
    """Each level alone, on its own parameters, against the gradient of the sum, parameter by parameter."""
    images, labels = batch
    alpha, beta = 0.6, 2.0
    model = copy.deepcopy(dual)
    jtdmoe_loss(model, images, labels, attack=ATTACK, alpha=alpha, beta=beta).loss.backward()

    lower = copy.deepcopy(dual)
    rt_er_loss(lower.robust, images, labels, attack=ATTACK, beta=beta).loss.backward()
    upper = copy.deepcopy(dual)
    upper.robust.eval().requires_grad_(False)
    output = upper(images, alpha=alpha)
    (F.cross_entropy(output.logits, labels) + aux(upper.standard, upper.standard(images))).backward()

    compared = 0
    for name, parameter in model.named_parameters():
        other = dict((lower if name.startswith("robust") else upper).named_parameters())[name]
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, other.grad, atol=2e-6), name
            compared += parameter.grad.abs().sum() > 0
    assert compared > 20
    assert all(p.grad is None for n, p in lower.named_parameters() if n.startswith("standard"))


def test_jtdmoe_with_a_vanishing_standard_attack_is_the_plain_one(dual, batch):
    settings = {"alpha": 0.4, "beta": 0.5, "second_term": "ce", "second_attack": "shared"}
    results = []
    for standard_attack in (None, NFGSM(eps=1e-7), NFGSM(eps=0.1)):
        model = copy.deepcopy(dual).train()  # its BatchNorm statistics have not moved
        torch.manual_seed(7)
        results.append(jtdmoe_loss(model, *batch, attack=NFGSM(eps=0.1), standard_attack=standard_attack, **settings))
    plain, vanishing, mild = results
    assert vanishing.loss.item() == pytest.approx(plain.loss.item(), rel=1e-3)
    assert mild.terms["dual_ce"] > vanishing.terms["dual_ce"] * 1.01
    for name in ("robust_ce", "expert_ce"):
        assert mild.terms[name].item() == pytest.approx(plain.terms[name].item(), rel=1e-4)


def test_jtdmoe_standard_attack_reaches_the_standard_model_alone(dual, batch):
    """Between two radii of the mild attack the gradients of F_S differ, those of F_R do not."""
    gradients = []
    for eps in (0.01, 0.1):
        model = copy.deepcopy(dual).train()
        torch.manual_seed(8)
        settings = {"alpha": 0.4, "beta": 0.5, "second_term": "ce", "second_attack": "shared"}
        attacks = {"attack": NFGSM(eps=0.1), "standard_attack": NFGSM(eps=eps)}
        jtdmoe_loss(model, *batch, **attacks, **settings).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        same = torch.allclose(gradient, gradients[1][name], rtol=1e-3, atol=1e-6)
        assert same == name.startswith("robust") or gradient.abs().max() < 1e-6, name


def test_jtdmoe_refuses_alpha_one(dual, batch):
    with pytest.raises(ValueError, match=r"alpha=1.0 must be in \[0, 1\)"):
        jtdmoe_loss(dual, *batch, attack=ATTACK, alpha=1.0)


@pytest.mark.parametrize("loss", [standard_loss, at_loss, trades_loss], ids=lambda f: f.__name__)
def test_objectives_train_any_module(batch, loss):
    images, labels = batch
    torch.manual_seed(4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 14 * 14, 7))
    objective = "kl" if loss is trades_loss else "ce"
    options = {} if loss is standard_loss else {"attack": PGD(steps=2, objective=objective, keep_best=False)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(15):
        output = loss(model, images, labels, **options)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("option", ["second_term", "second_attack"])
def test_unknown_options_are_named(moe, batch, option):
    with pytest.raises(ValueError, match=f"{option}='nonsense' is not one of"):
        rt_er_loss(moe, *batch, attack=ATTACK, **{option: "nonsense"})


def test_losses_leave_no_gradient_of_the_attack(moe, batch):
    """The reference code's attack also wrote parameter gradients (DESIGN, known faults)."""
    model = copy.deepcopy(moe)
    output = rt_er_loss(model, *batch, attack=ATTACK)
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert model.training
    assert output.loss.requires_grad
