"""Lipschitz constants: against whole matrices, observed gradients and measured slopes; 1-Lipschitz backbones."""

import math

import pytest
import timm
import torch
from conftest import shake
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

from hf_dualmoe import MoEConfig, MoEForImageClassification
from hf_dualmoe.certification.lipschitz import (
    ELEMENTWISE,
    NORMS,
    NotApplicableError,
    Residual,
    adaptive_pool_norm,
    average_pool_norm,
    chain_constant,
    conv_norm,
    dual_norm,
    lipschitz_bound,
    matrix_norm,
    max_pool_norm,
)
from hf_dualmoe.models.lipschitz_dualmoe import PairSort

ORDERS = {"l2": 2, "linf": math.inf, "l1": 1}
SHAPE = (2, 12, 12)


def matrix_of(layer, shape):
    """The matrix (outputs, inputs) of an affine layer, column by column."""
    pixels = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return (layer(pixels) - layer(torch.zeros(1, *shape, dtype=torch.float64))).flatten(1).t()


CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 5, "padding": 2, "stride": 2, "groups": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 7, "padding": 3, "stride": 2},
    {"kernel_size": 3, "padding": 4},
    {"kernel_size": 2, "stride": 3},
    {"kernel_size": (1, 3), "padding": (0, 1), "stride": (2, 1)},
]


@pytest.mark.parametrize("dense", [True, False], ids=["whole matrix", "frequencies"])
@pytest.mark.parametrize("settings", CONVOLUTIONS, ids=repr)
def test_convolution_norms_bound_the_whole_matrix(settings, dense, monkeypatch):
    if not dense:
        monkeypatch.setattr("hf_dualmoe.certification.operator_norms.DENSE_LIMIT", 0)
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 6, **settings).double().requires_grad_(False)
    matrix, shape = matrix_of(conv, (2, 8, 9)), (8, 9)
    names = ("stride", "padding", "dilation", "groups")
    for norm, order in ORDERS.items():
        bound = conv_norm(conv.weight, norm, shape, **{name: getattr(conv, name) for name in names})
        true = float(torch.linalg.matrix_norm(matrix, ord=order))
        exact = norm != "l2" or (dense and len(matrix) <= 1024)
        assert true <= bound <= true * (1.00001 if exact else 1.3)


def test_non_overlapping_convolution_is_exact_by_frequencies(monkeypatch):
    monkeypatch.setattr("hf_dualmoe.certification.operator_norms.DENSE_LIMIT", 0)
    conv = nn.Conv2d(3, 5, 4, stride=4)
    singular = torch.linalg.matrix_norm(conv.weight.detach().double().flatten(1), ord=2)
    assert conv_norm(conv.weight, "l2", (16, 16), stride=(4, 4)) == pytest.approx(float(singular), rel=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_norms_are_rounded_up(norm):
    matrix = torch.randn(40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    true = float(torch.linalg.matrix_norm(matrix, ord=ORDERS[norm]))
    assert true * (1 + 1e-7) < matrix_norm(matrix, norm) < true * (1 + 1e-5)


def test_dual_norm_is_reached():
    vector = torch.tensor([3.0, -4.0, 1.0], dtype=torch.float64)
    unit = {"l2": vector / vector.norm(), "linf": vector.sign(), "l1": torch.tensor([0.0, -1.0, 0.0]).double()}
    for norm, direction in unit.items():
        assert torch.linalg.vector_norm(direction, ord=ORDERS[norm]) == pytest.approx(1)
        assert float(dual_norm(vector, norm)) == pytest.approx(float(vector @ direction))


@pytest.mark.parametrize("norm", NORMS)
def test_pooling_norms(norm):
    shape = (1, 1, 7, 9)
    averages = nn.AvgPool2d(2), nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(2, 2, ceil_mode=True)
    layers = [(pool, average_pool_norm(pool, norm, shape)) for pool in averages]
    layers += [(nn.AdaptiveAvgPool2d(size), adaptive_pool_norm((size, size), norm, shape)) for size in (4, 1)]
    for layer, bound in layers:
        true = float(torch.linalg.matrix_norm(matrix_of(layer, shape[1:]), ord=ORDERS[norm]))
        assert true <= bound <= 1.3 * true + 1e-6, layer
    pool = nn.MaxPool2d(3, 2, 1)
    a, b = torch.rand(2, 500, 1, 7, 9, dtype=torch.float64).unbind(0)
    b = torch.where(torch.rand_like(b) < 0.9, a, b)
    change = [torch.linalg.vector_norm(d.flatten(1), ord=ORDERS[norm], dim=1) for d in (pool(a) - pool(b), a - b)]
    assert (change[0] <= max_pool_norm(pool, norm, shape) * change[1] + 1e-12).all()
    one = torch.zeros(1, 1, 7, 9)
    one[0, 0, 3, 3] = 1  # lies in 2 x 2 windows: the bound is reached
    assert torch.linalg.vector_norm(pool(one), ord=ORDERS[norm]) == pytest.approx(max_pool_norm(pool, norm, shape))


@pytest.mark.parametrize("name", sorted(set(ELEMENTWISE) - {"PairSort", "Flatten", "DropPath", "DropBlock2d"}))
def test_slopes_of_activations(name):
    layer = getattr(nn, name)().eval()
    points = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    values = layer(points[None, :, None, None] if name == "Dropout2d" else points).flatten()
    steepest = float(((values[1:] - values[:-1]) / (points[1:] - points[:-1])).abs().max())
    assert 0.98 * ELEMENTWISE[name](layer) <= steepest <= ELEMENTWISE[name](layer) + 1e-6


def test_pair_sort_is_nonexpansive_in_every_norm():
    a, b = torch.randn(2, 1000, 6, dtype=torch.float64).unbind(0)
    sort = PairSort()
    assert torch.equal(sort(a).sort(dim=1).values, a.sort(dim=1).values)  # a permutation
    for order in ORDERS.values():
        before, after = (torch.linalg.vector_norm(d, ord=order, dim=1) for d in (a - b, sort(a) - sort(b)))
        assert (after <= before + 1e-12).all() and (after < 0.99 * before).any()


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    plain = nn.Sequential(
        *(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.GELU(), nn.AvgPool2d(3), nn.Flatten()),
        *(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.LeakyReLU(0.2), nn.Linear(16, 5)),
    )
    sizes = {"in_chans": 2, "num_classes": 5}
    networks = {
        "plain": plain,
        "no linear head": nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "resnet": timm.create_model("resnet18", channels=[8, 8, 16, 16], stem_width=8, **sizes),
        "bottleneck": timm.create_model("resnet26d", channels=[4, 4, 8, 8], **sizes),
        "orthogonal": nn.Sequential(nn.Flatten(), orthogonal(nn.Linear(288, 16)), PairSort(), nn.Linear(16, 5)),
    }
    for name, network in networks.items():
        if name != "orthogonal":
            shake(network)
        network.eval()
    return networks


@pytest.mark.parametrize("norm", NORMS)
def test_branches_of_a_residual_block_add_up(norm):
    """x + 3 x: observed gradients of whole networks stay far below their bounds, and would not tell."""
    triple = nn.Linear(4, 4, bias=False)
    triple.weight.data = 3 * torch.eye(4)
    assert chain_constant([Residual([[triple], []])], norm, {}) == pytest.approx(4, rel=1e-4)


@pytest.mark.parametrize("name", ["plain", "no linear head", "resnet", "bottleneck", "orthogonal"])
def test_bounds_against_the_largest_gradient_observed(networks, name):
    """Gradient norms, raised by ascent along the gradient, stay below the bound; and are not absurdly far."""
    network = networks[name].double()
    torch.manual_seed(1)
    images = torch.rand(12, *SHAPE, dtype=torch.float64)
    for norm in NORMS:
        bound = lipschitz_bound(network, SHAPE, norm)
        assert bound.margins.shape == (5, 5) and (bound.margins.diagonal() == 0).all()
        largest = torch.zeros(5)
        for j in range(1, 5):
            points = images
            for _ in range(4):
                points = points.detach().requires_grad_(True)
                outputs = network(points)
                gradient = torch.autograd.grad((outputs[:, 0] - outputs[:, j]).sum(), points)[0]
                size = dual_norm(gradient.flatten(1), norm)
                assert (size <= bound.margins[0, j]).all(), (norm, j)
                largest[j] = max(largest[j], float(size.max()))
                points = points + 0.3 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp_min(1e-9)
        if name in ("orthogonal", "no linear head"):
            assert (largest[1:] >= 0.05 * bound.margins[0, 1:]).all()


def test_bound_is_exact_for_a_linear_network():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(18, 4)).eval()
    weight = network[1].weight.detach().double()
    for norm in NORMS:
        bound = lipschitz_bound(network, (2, 3, 3), norm)
        assert bound.outputs == pytest.approx(float(torch.linalg.matrix_norm(weight, ord=ORDERS[norm])), rel=1e-5)
        expected = dual_norm(weight[1] - weight[3], norm)
        assert float(expected) < float(bound.margins[1, 3]) < 1.00001 * float(expected)


def test_folding_and_changes_of_weights_are_seen():
    """A BatchNorm that scales up is not ignored, whether folded or alone."""
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(400)).eval()
    before = lipschitz_bound(network, SHAPE).outputs
    network[1].running_var.fill_(0.25)
    assert lipschitz_bound(network, SHAPE).outputs == pytest.approx(2 * before, rel=1e-3)
    network[3].weight.data[7] = -10
    assert lipschitz_bound(network, SHAPE).outputs == pytest.approx(20 * before, rel=1e-3)


class PaddedConv(nn.Conv2d):
    def forward(self, images):
        return 100 * super().forward(images)


class ReLU(nn.Module):
    def forward(self, images):
        return 100 * images


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (timm.create_model("test_vit", num_classes=5, img_size=12, in_chans=2, patch_size=4), "self-attention"),
        (nn.MultiheadAttention(12, 2), "self-attention"),
        (nn.LayerNorm(12), "no Lipschitz constant is known for the layer LayerNorm"),
        (PaddedConv(2, 4, 3), "no Lipschitz constant is known for the layer PaddedConv"),
        (ReLU(), "no Lipschitz constant is known for the layer ReLU"),
        (timm.layers.BatchNormAct2d(2), "BatchNormAct2d"),
        (nn.BatchNorm2d(2, track_running_stats=False), "without running statistics"),
        (nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), "'reflect'"),
        (nn.Conv2d(2, 4, 3, padding="same"), "'same'"),
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), "overlapping"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_has_no_theorem_gets_no_number(layer, message):
    from hf_dualmoe.certification.lipschitz import layer_norm_bound

    with pytest.raises(NotApplicableError, match=message):
        layer_norm_bound(layer.eval(), "l2", (1, *SHAPE))


def test_train_mode_and_unknown_norms_are_refused():
    network = nn.Sequential(nn.Flatten(), nn.Linear(288, 5), nn.Dropout()).eval()
    network[2].train()
    with pytest.raises(ValueError, match="model is in train mode"):
        lipschitz_bound(network, SHAPE)
    with pytest.raises(ValueError, match="norm='l3' is not one of 'l2', 'linf', 'l1'"):
        lipschitz_bound(network.eval(), SHAPE, "l3")


# --- 1-Lipschitz backbones -------------------------------------------------------------------------------------------

BACKBONES = {
    "lipschitz_mlp": {"hidden_sizes": [32, 24], "logit_scale": 3.0},
    "lipschitz_cnn": {"channels": [6, 8], "depth": 1, "hidden_size": 16, "logit_scale": 3.0},
}


def lipschitz_moe(backbone, **fields):
    torch.manual_seed(0)
    sizes = {"image_size": 12, "num_channels": 2, "num_labels": 5, "num_experts": 2, "backbone": backbone}
    config = MoEConfig(**{**sizes, "backbone_kwargs": BACKBONES[backbone], **fields})
    return MoEForImageClassification(config).eval()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbone_is_one_lipschitz_times_its_scale(backbone):
    expert = lipschitz_moe(backbone).experts[0]
    bound = lipschitz_bound(expert, SHAPE)
    assert 0.1 < bound.outputs < 3.0 * 1.0001
    assert (bound.margins <= 3.0 * math.sqrt(2) * 1.0001).all()
    slopes = []
    for image in torch.rand(8, 1, *SHAPE):
        jacobian = torch.autograd.functional.jacobian(expert, image).flatten(0, 1).flatten(1)
        slopes.append(float(torch.linalg.matrix_norm(jacobian, ord=2)))
    assert 0.1 * bound.outputs < max(slopes) <= bound.outputs


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbone_trains_saves_and_loads(backbone, tmp_path):
    pytest.importorskip("deel.torchlip")
    model = lipschitz_moe(backbone)
    images, labels = torch.rand(40, *SHAPE), torch.arange(40) % 5
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(15):
        loss = model.train()(images, labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    model.eval()
    most = 3.0 * (1.01 if backbone == "lipschitz_mlp" else 1.3)  # iterations stop early; the bound knows
    assert all(2.0 < lipschitz_bound(expert, SHAPE).outputs < most for expert in model.experts)
    model.save_pretrained(tmp_path)
    loaded = MoEForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model(images).logits)


def test_backbone_without_deel_runs_but_does_not_train(monkeypatch):
    monkeypatch.setattr("hf_dualmoe.models.lipschitz_dualmoe.bjorck_normalization", None)
    model = lipschitz_moe("lipschitz_mlp")
    assert model(torch.rand(3, *SHAPE)).logits.shape == (3, 5)
    with pytest.raises(ImportError, match="pip install deel-torchlip"):
        model.train()(torch.rand(3, *SHAPE))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone_kwargs": {"hidden_sizes": [31]}}, r"hidden_sizes=\[31\] must be a list of even sizes"),
        ({"backbone_kwargs": {"hidden_size": 32}}, "does not accept the arguments"),
        ({"backbone_kwargs": {"logit_scale": 0}}, "logit_scale=0 must be a finite number > 0"),
        ({"width": 0.5}, "takes no width=0.5"),
        ({"shared_stages": 1}, "shared_stages=1 needs a timm ResNet or ViT"),
        ({"backbone": "lipschitz_cnn", "backbone_kwargs": {"channels": [8] * 5}}, "too often"),
        ({"backbone": "lipschitz_cnn", "backbone_kwargs": {"depth": 0}}, "depth=0 must be an integer"),
    ],
    ids=repr,
)
def test_backbone_refuses_bad_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        lipschitz_moe(**{"backbone": "lipschitz_mlp", **fields})
