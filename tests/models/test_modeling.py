import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import assert_same_tensors, save_and_load
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_dualmoe import MoEConfig, MoEForImageClassification
from hf_dualmoe.attacks.base import frozen
from hf_dualmoe.models.backbones_dualmoe import create_backbone
from hf_dualmoe.models.routing_dualmoe import averaged_loads, gate_weights, load_balancing_loss


def normalize(model, images):
    """What `model` should do to its images before anything else, from the config alone."""
    mean, std = torch.tensor(model.config.image_mean), torch.tensor(model.config.image_std)
    return (images - mean[:, None, None]) / std[:, None, None]


def loop_logits(model, images, index):
    """Logits (B, C) of expert index[b] for image b, one image at a time."""
    hidden = model.trunk(normalize(model, images))
    return torch.cat([model.experts[i](hidden[b : b + 1]) for b, i in enumerate(index.tolist())])


def mixture(model, images, k):
    """Probabilities (B, C) of the renormalised mixture of the k best experts, computed naively."""
    expert_logits, router_logits = model.expert_logits(images)
    weights, index = router_logits.softmax(dim=1).topk(k, dim=1)
    weights = weights / weights.sum(dim=1, keepdim=True)
    chosen = expert_logits.softmax(dim=2).gather(1, index[:, :, None].expand(-1, -1, expert_logits.shape[2]))
    return (weights[:, :, None] * chosen).sum(dim=1)


# --- backbones, stems, widths ----------------------------------------------------------------------------------------

FAMILIES = {
    "resnet-cifar": {"backbone": "resnet18", "width": 0.125},
    "resnet-default": {"backbone": "resnet18", "width": [8, 16, 24, 32], "stem": "default"},
    "bottleneck": {"backbone": "resnet50", "width": [4, 8, 8, 12]},
    "deep-stem": {
        "backbone": "resnet10t",
        "backbone_kwargs": {"stem_width": 8, "channels": [8, 8, 8, 8]},
        "stem": "default",
    },
    "vit": {"backbone": "test_vit", "image_size": 32},
    "convnext": {"backbone": "test_convnext", "image_size": 40},
    "efficientnet": {"backbone": "test_efficientnet"},
    "swin": {
        "backbone": "swin_tiny_patch4_window7_224",
        "backbone_kwargs": {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3], "patch_size": 2},
        "image_size": 28,
    },
    "relpos": {
        "backbone": "vit_relpos_small_patch16_224",
        "backbone_kwargs": {"patch_size": 6, "embed_dim": 24, "depth": 2, "num_heads": 3},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_any_timm_family_runs_and_survives_saving(family, tmp_path):
    config = MoEConfig(**{"image_size": 30, "num_labels": 7, "num_experts": 2, **FAMILIES[family]})
    model = MoEForImageClassification(config).eval()
    loaded = save_and_load(model, tmp_path)
    assert_same_tensors(model, loaded)
    images = torch.rand(5, 3, config.image_size, config.image_size)
    with torch.no_grad():
        logits = model(images).logits
        assert logits.shape == (5, 7) and logits.isfinite().all()
        torch.testing.assert_close(loaded(images).logits, logits)


def test_cifar_stem_keeps_resolution_and_default_stem_is_that_of_timm(tiny_config):
    cifar, default = (create_backbone(tiny_config(stem=stem, width=None)) for stem in ("cifar", "default"))
    x = torch.rand(2, 3, 30, 30)
    assert cifar.forward_intermediates(x, indices=[0], intermediates_only=True)[0].shape == (2, 64, 30, 30)
    assert (cifar.conv1.kernel_size, cifar.conv1.stride, cifar.conv1.padding) == ((3, 3), (1, 1), (1, 1))
    assert isinstance(cifar.maxpool, nn.Identity)
    expected = timm.create_model("resnet18", num_classes=7)
    assert str(default) == str(expected)


WIDTHS = [
    ("resnet18", [8, 12, 20, 36], [8, 12, 20, 36]),
    ("resnet18", 0.25, [16, 32, 64, 128]),
    ("resnet18", 0.01, [8, 8, 8, 8]),
    ("resnet50", [4, 8, 12, 16], [16, 32, 48, 64]),
]


@pytest.mark.parametrize(
    ("backbone", "width", "channels", "stem"),
    [(*case, stem) for case in WIDTHS for stem in ("cifar", "default")]
    + [("resnet18d", 0.125, [8, 16, 32, 64], "cifar")],
)
def test_width_sets_the_channels_of_stem_and_stages(backbone, width, channels, stem):
    network = create_backbone(MoEConfig(backbone=backbone, width=width, stem=stem, num_labels=7)).eval()
    outputs = [network.layer1, network.layer2, network.layer3, network.layer4]
    x = network.maxpool(network.act1(network.bn1(network.conv1(torch.rand(2, 3, 32, 32)))))
    assert x.shape[1] == (width[0] if isinstance(width, list) else max(8, round(64 * width)))
    for stage, expected in zip(outputs, channels, strict=True):
        x = stage(x)
        assert x.shape[1] == expected
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 7)


def test_backbone_image_size_upsamples_inside_the_model(make_moe, images):
    model = make_moe("vit", image_size=15, backbone_image_size=30, num_experts=2)
    small = images[:, :, ::2, ::2]
    large = F.interpolate(normalize(model, small), size=(30, 30), mode="bilinear")
    logits = model(small, expert_index=torch.ones(13, dtype=torch.int64)).logits
    torch.testing.assert_close(logits, model.experts[1](large))
    assert model.router[-1].in_features == 3 * 15 * 15


# --- initialisation and weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet", "vit"])
def test_initialisation_of_timm_survives(arch, tiny_config):
    config = tiny_config(arch, num_experts=2)
    torch.manual_seed(5)
    expected = [create_backbone(config) for _ in range(2)]
    torch.manual_seed(5)
    model = MoEForImageClassification(config)
    for expert, own in zip(model.experts, expected, strict=True):
        assert_same_tensors(own, expert)
    fields = {"img_size": 30, "num_classes": 7, **config.backbone_kwargs}
    if arch == "vit":  # the first expert is exactly what timm itself builds
        torch.manual_seed(5)
        assert_same_tensors(timm.create_model("vit_tiny_patch16_224", **fields), model.experts[0])
    first, second = (next(expert.parameters()) for expert in model.experts)
    assert not torch.equal(first, second)


def test_model_built_on_the_meta_device_can_be_filled(vit_moe, images):
    with torch.device("meta"):
        model = MoEForImageClassification(vit_moe.config).eval()
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu").load_state_dict(vit_moe.state_dict())
    for module in model.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    assert_same_tensors(vit_moe, model)
    torch.testing.assert_close(model(images).logits, vit_moe(images).logits)


@pytest.mark.parametrize("shared_stages", [0, 1])
@pytest.mark.parametrize("source", ["module", "model", "folder"])
def test_upcycling_starts_every_expert_from_one_network(
    source, shared_stages, make_moe, tiny_config, images, tmp_path
):
    single = make_moe("resnet", num_experts=1, shared_stages=1)
    whole = create_backbone(single.config).eval()
    whole.load_state_dict(single.backbone_state_dict())
    torch.testing.assert_close(single(images).logits, whole(normalize(single, images)))
    single.save_pretrained(tmp_path)
    sources = {"module": whole, "model": single, "folder": str(tmp_path)}
    config = tiny_config("resnet", shared_stages=shared_stages, num_experts=3)
    model = MoEForImageClassification.from_backbone(config, init_experts_from=sources[source]).eval()
    expert_logits, _ = model.expert_logits(images)
    torch.testing.assert_close(expert_logits, single(images).logits[:, None].expand(-1, 3, -1))
    pointers = [parameter.data_ptr() for network in (model, whole, single) for parameter in network.parameters()]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("arch", ["resnet", "vit"])
def test_a_mixture_goes_on_from_one_of_the_same_shape(arch, make_moe, images, tmp_path):
    source = make_moe(arch, shared_stages=1, router="pooled")
    source.save_pretrained(tmp_path)
    model = MoEForImageClassification.from_backbone(source.config, init_experts_from=str(tmp_path)).eval()
    assert_same_tensors(source, model)
    torch.testing.assert_close(model(images).logits, source(images).logits)
    other = copy.deepcopy(source.config)
    other.image_mean, other.image_std = [0.1] * 3, [0.9] * 3  # of other data: the weights keep those of their own
    model = MoEForImageClassification.from_backbone(other, init_experts_from=source).eval()
    torch.testing.assert_close(model(images).logits, source(images).logits)
    assert model.config.image_mean == source.config.image_mean and other.image_mean == [0.1] * 3
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in source.parameters()}


@pytest.mark.parametrize(
    ("arch", "fields"),
    [("resnet", {}), ("resnet", {"shared_stages": 4}), ("vit", {"shared_stages": 1}), ("vit", {"shared_stages": 3})],
)
def test_trunk_and_expert_together_are_the_whole_network(arch, fields, make_moe, tiny_config, images):
    whole = make_moe(arch, num_experts=1)
    model = MoEForImageClassification(tiny_config(arch, num_experts=2, **fields)).eval()
    model.load_backbone(whole.experts[0].state_dict())
    torch.testing.assert_close(model(images).logits, whole(images).logits)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_pretrained_weights_of_timm_fill_every_expert(backbone, tmp_path):
    torch.manual_seed(6)
    network = timm.create_model(backbone, num_classes=7)
    save_file(network.state_dict(), tmp_path / "timm.safetensors")
    size = network.pretrained_cfg["input_size"][1]
    config = MoEConfig(backbone=backbone, stem="default", image_size=size, num_labels=7, num_experts=2)
    overlay = {"file": str(tmp_path / "timm.safetensors"), "num_classes": 7}
    model = MoEForImageClassification.from_backbone(config, pretrained=True, pretrained_cfg_overlay=overlay)
    for expert in model.experts:
        assert_same_tensors(network, expert)


@pytest.mark.parametrize(
    ("config_fields", "kwargs", "expected"),
    [
        ({}, {}, "exactly one source"),
        ({}, {"pretrained": True, "init_experts_from": "somewhere"}, "exactly one source"),
        ({}, {"init_experts_from": nn.Linear(3, 2)}, "does not fit backbone='resnet18'.*such as"),
        ({"width": 0.125, "num_labels": 5}, {"init_experts_from": "single"}, "of another shape"),
        ({}, {"init_experts_from": "double"}, "does not fit a mixture with num_experts=4: .* such as experts.2"),
        ({"num_experts": 2, "router": "conv"}, {"init_experts_from": "double"}, "does not fit a mixture.*router"),
        ({}, {"pretrained": True}, "pretrained weights have full width"),
    ],
    ids=str,
)
def test_unfit_source_of_weights_is_refused(config_fields, kwargs, expected, make_moe, tiny_config):
    models = {"single": lambda: make_moe(num_experts=1), "double": lambda: make_moe(num_experts=2)}
    source = kwargs.get("init_experts_from")
    if source in models:
        kwargs = {"init_experts_from": models[source]()}
    with pytest.raises(ValueError, match=expected):
        MoEForImageClassification.from_backbone(tiny_config(**config_fields), **kwargs)


# --- routing and mixing ----------------------------------------------------------------------------------------------

ROUTERS = [(router, shared) for router in ("linear", "pooled", "conv", "features") for shared in (0, 1, 3)]


@pytest.mark.parametrize("arch", ["resnet", "vit"])
@pytest.mark.parametrize(("router", "shared"), [pair for pair in ROUTERS if pair != ("features", 0)])
def test_router_and_shared_stages(arch, router, shared, make_moe, images):
    model = make_moe(arch, router=router, shared_stages=shared, num_experts=3)
    normal = normalize(model, images)
    hidden = model.trunk(normal)
    assert (hidden is normal) == (shared == 0)
    last = model.router[-1]
    if router == "linear":
        expected = normal.flatten(1) @ last.weight.T + last.bias
    elif router == "pooled":
        expected = F.adaptive_avg_pool2d(normal, 4).flatten(1) @ last.weight.T + last.bias
    elif router == "features":
        expected = (hidden.mean(dim=1) if arch == "vit" else hidden.mean(dim=(2, 3))) @ last.weight.T + last.bias
    else:
        convolved = F.relu(model.router[2](F.relu(model.router[0](normal))))
        expected = convolved.mean(dim=(2, 3)) @ last.weight.T + last.bias
    output = model(images, output_router_logits=True)
    torch.testing.assert_close(output.router_logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.route(images), output.router_logits)
    assert torch.equal(output.expert_index, output.router_logits.argmax(dim=1))
    torch.testing.assert_close(output.logits, loop_logits(model, images, output.expert_index), atol=1e-4, rtol=1e-4)


def test_hard_routing_is_exactly_the_chosen_expert(moe, images):
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            output = moe(images)
        assert output.expert_index.unique().numel() > 1
        for i in output.expert_index.unique():
            rows = output.expert_index == i
            assert torch.equal(output.logits[rows], moe.experts[i](moe.normalize(images)[rows]))
    assert output.router_logits is None and output.loss is None


def test_expert_logits_are_those_of_every_expert(moe, images):
    expert_logits, router_logits = moe.expert_logits(images)
    assert expert_logits.shape == (13, 4, 7)
    for i, expert in enumerate(moe.experts):
        torch.testing.assert_close(expert_logits[:, i], expert(normalize(moe, images)))
    torch.testing.assert_close(router_logits, moe.route(images))


@pytest.mark.parametrize(("arch", "k"), [("resnet", 2), ("vit", 3), ("resnet", 4)])
def test_soft_routing_is_the_renormalised_mixture_of_probabilities(arch, k, make_moe, images):
    model = make_moe(arch, router_top_k=k, output_router_logits=True)
    model.router[-1].weight.data *= 0.1  # weights that matter: not one expert alone
    output = model(images)
    probs = output.logits.exp()
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(13))
    torch.testing.assert_close(probs, mixture(model, images, k), atol=1e-5, rtol=1e-4)
    assert torch.equal(output.expert_index, output.router_logits.topk(k, dim=1).indices)
    assert (probs - mixture(model, images, k - 1)).abs().max() > 1e-3


@pytest.mark.parametrize("arch", ["resnet", "vit"])
@pytest.mark.parametrize("k", [1, 3])
def test_expert_index_overrides_the_router_where_it_is_not_minus_one(arch, k, make_moe, images):
    model = make_moe(arch, router_top_k=k)
    free = model(images)
    forced = torch.arange(13) % 5 - 1
    output = model(images, expert_index=forced)
    own = forced == -1
    torch.testing.assert_close(output.logits[own], free.logits[own])
    assert torch.equal(output.expert_index[own], free.expert_index[own])
    expected = loop_logits(model, images[~own], forced[~own])
    torch.testing.assert_close(output.logits[~own].softmax(dim=1), expected.softmax(dim=1), atol=1e-5, rtol=1e-4)
    assert (output.expert_index[~own].view(int((~own).sum()), -1) == forced[~own, None]).all()
    all_free = model(images, expert_index=torch.full((13,), -1))
    torch.testing.assert_close(all_free.logits, free.logits)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("banned", [[], [1], [0, 2, 3]], ids=["all-used", "one-empty", "one-left"])
def test_dispatch_equals_a_loop_over_samples(k, banned, make_moe, images):
    model = make_moe("vit", router_top_k=k)
    model.router[-1].bias.data[banned] -= 1e4
    calls = []
    for i, expert in enumerate(model.experts):
        expert.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    output = model(images)
    assert sorted(calls) == output.expert_index.unique().tolist()  # none with an empty group
    if k == 1:
        assert not set(banned) & set(output.expert_index.tolist())
        torch.testing.assert_close(output.logits, loop_logits(model, images, output.expert_index))
    else:
        logits = torch.stack([loop_logits(model, images, index) for index in output.expert_index.T], dim=1)
        weights = model.route(images).softmax(dim=1).gather(1, output.expert_index)
        probs = (weights[:, :, None] * logits.softmax(dim=2)).sum(dim=1) / weights.sum(dim=1, keepdim=True)
        torch.testing.assert_close(output.logits.exp(), probs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("k", "forced", "rows"), [(1, False, 13), (1, True, 13), (3, False, 39), (3, True, 13)])
def test_experts_see_no_more_rows_than_needed(k, forced, rows, make_moe, images):
    model = make_moe("resnet", router_top_k=k)
    seen = {}
    for i, expert in enumerate(model.experts):
        expert.register_forward_pre_hook(lambda _, args, i=i: seen.setdefault(i, []).append(len(args[0])))
    model(images, expert_index=torch.arange(13) % 4 if forced else None)
    assert all(len(calls) == 1 and calls[0] > 0 for calls in seen.values())
    assert sum(calls[0] for calls in seen.values()) == rows


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(t.numel() for t in tree_leaves(output) if isinstance(t, torch.Tensor)), 0)
        return output


def test_hard_routing_holds_no_tensor_of_all_experts(moe, images):
    with torch.no_grad(), LargestTensor() as one:
        moe.experts[0](moe.normalize(images))
    with torch.no_grad(), LargestTensor() as all_experts:
        moe(images)
    assert 0 < all_experts.numel <= one.numel


def test_single_rows_in_training_mode_leave_batchnorm_alone(make_moe):
    model = make_moe("resnet", image_size=8, num_experts=2).train()  # the last maps have 1x1 pixels
    model.experts[1].layer1.eval()
    before = copy.deepcopy(model)
    model(torch.rand(13, 3, 8, 8), expert_index=torch.tensor([0] + [1] * 12)).logits.sum().backward()
    assert_same_tensors(before.experts[0], model.experts[0])
    assert_same_tensors(before.experts[1].layer1, model.experts[1].layer1)
    assert not torch.equal(before.experts[1].bn1.running_mean, model.experts[1].bn1.running_mean)
    for old, new in zip(before.modules(), model.modules(), strict=True):
        assert old.training == new.training


@pytest.mark.parametrize("shared_stages", [0, 4])
def test_batch_of_one_image_trains(shared_stages, make_moe):
    model = make_moe("resnet", image_size=8, num_experts=2, shared_stages=shared_stages).train()
    loss = model(torch.rand(1, 3, 8, 8), labels=torch.tensor([2])).loss
    loss.backward()
    assert loss.isfinite()


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "fields"),
    [
        ("resnet", {}),
        ("resnet", {"router": "features", "shared_stages": 2}),
        ("vit", {"router": "conv"}),
        ("vit", {"router_top_k": 2, "shared_stages": 1}),
    ],
)
def test_every_parameter_gets_a_gradient_within_a_few_batches(arch, fields, make_moe, labels):
    model = make_moe(arch, router_aux_loss_coef=0.0, **fields).train()
    batches = torch.rand(4, 13, 3, 30, 30, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():  # a fair start for every expert
        model.router[-1].bias -= model.route(batches.flatten(0, 1)).mean(dim=0)
    for images in batches:
        model(images, labels=labels).loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


def test_straight_through_gradient_of_the_router(moe, images):
    weights = torch.randn(13, 7, generator=torch.Generator().manual_seed(8))
    output = moe(images, output_router_logits=True)
    (weights * output.logits).sum().backward()
    gate = output.router_logits.softmax(dim=1)
    value = (weights * output.logits).sum(dim=1, keepdim=True)  # d log a_i / d g = onehot - a, times the logits' value
    by_logit = (value * (F.one_hot(output.expert_index, 4) - gate)).detach()
    torch.testing.assert_close(moe.router[-1].bias.grad, by_logit.sum(dim=0), atol=1e-4, rtol=1e-4)
    expected = by_logit.T @ normalize(moe, images).flatten(1)
    torch.testing.assert_close(moe.router[-1].weight.grad, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("k", [1, 3])
def test_forced_rows_give_the_router_no_gradient(k, make_moe, images):
    model = make_moe("vit", router_top_k=k)
    model(images, expert_index=torch.arange(13) % 4).logits.sum().backward()
    assert model.router[-1].weight.grad is None or not model.router[-1].weight.grad.any()
    forced = torch.full((13,), 2)
    forced[4] = -1
    grads = []
    for rows, index in ((images, forced), (images[4:5], None)):
        model.zero_grad()
        model(rows, expert_index=index).logits[4 if index is not None else 0].square().sum().backward()
        grads.append(model.router[-1].weight.grad)
    assert grads[1].any()
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-4)


def test_frozen_model_has_no_straight_through_path(moe, images):
    images.requires_grad_(True)

    def gradient(**kwargs):
        return torch.autograd.grad(moe(images, **kwargs).logits.square().sum(), images)[0]

    single = gradient(expert_index=moe(images).expert_index)
    assert not torch.allclose(gradient(), single, atol=1e-4)
    with frozen(moe):
        torch.testing.assert_close(gradient(), single)


def test_gradient_checkpointing_of_single_rows_in_training_mode(make_moe, images):
    model = make_moe("resnet").train()
    index = torch.tensor([0] + [1] * 12)
    model(images, expert_index=index).logits.sum().backward()
    expected = model.experts[0].conv1.weight.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(images, expert_index=index).logits.sum().backward()
    torch.testing.assert_close(model.experts[0].conv1.weight.grad, expected)


# --- loss ------------------------------------------------------------------------------------------------------------

GATES = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.3, 0.2], [0.2, 0.7, 0.1], [0.1, 0.15, 0.75]])


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (1, 3 * (2 / 4 * 0.35 + 1 / 4 * 0.3625 + 1 / 4 * 0.2875)),
        # rows of top-2 weights: (2/3, 1/3, 0), (5/8, 3/8, 0), (2/9, 7/9, 0), (0, 1/6, 5/6)
        (2, 3 * (109 / 288 * 0.35 + 119 / 288 * 0.3625 + 5 / 24 * 0.2875)),
        (3, 3 * (0.35**2 + 0.3625**2 + 0.2875**2)),
    ],
    ids=["k=1", "k=2", "k=E"],
)
def test_load_balancing_loss_by_hand(k, expected):
    logits = GATES.log() + torch.tensor([[5.0], [-3.0], [0.0], [1.0]])  # softmax does not see the shift
    assert load_balancing_loss(logits, k).item() == pytest.approx(expected, abs=1e-6)
    assert load_balancing_loss(torch.zeros(0, 4), k).item() == 0


def test_balance_takes_the_loads_that_it_is_given(moe, images):
    with averaged_loads(lambda load: load.new_tensor([0.1, 0.9, 0.0])):
        assert load_balancing_loss(GATES.log()).item() == pytest.approx(3 * (0.1 * 0.35 + 0.9 * 0.3625))
    seen = []
    with averaged_loads(lambda load: seen.append(load) or load):
        moe.train()(images)
        with frozen(moe):
            moe(images)
    moe(images)
    assert len(seen) == 1 and seen[0].sum().item() == pytest.approx(1)


@pytest.mark.parametrize(("k", "given"), [(1, False), (1, True), (2, False), (4, True)])
def test_extra_experts_ride_along(k, given, make_moe, images):
    model = make_moe("resnet", num_experts=4, router_top_k=k, shared_stages=2).eval()
    extra = torch.tensor([-1, 0, 1, 2, 3] + [1] * (len(images) - 5))
    index = torch.tensor([2, -1] + [-1] * (len(images) - 2)) if given else None
    trunk_calls = []
    model.trunk.register_forward_hook(lambda *_: trunk_calls.append(1))
    with torch.no_grad():
        output = model(images, expert_index=index, extra_expert_index=extra)
        assert len(trunk_calls) == 1
        alone = model(images, expert_index=index)
        every, _ = model.expert_logits(images)
    torch.testing.assert_close(output.logits, alone.logits)
    assert alone.extra_logits is None and not output.extra_logits[0].any()
    torch.testing.assert_close(output.extra_logits[1:], every[torch.arange(1, len(images)), extra[1:]])
    with pytest.raises(ValueError, match=r"extra_expert_index lies in \[0, 4\]"):
        model(images, extra_expert_index=extra.clamp_min(0) + (extra == 3))


def test_gate_weights_are_those_of_the_mixture():
    logits = GATES.log()
    assert gate_weights(logits, 1).tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    torch.testing.assert_close(gate_weights(logits, 2)[0], torch.tensor([2 / 3, 1 / 3, 0]))
    torch.testing.assert_close(gate_weights(logits, 3), GATES)


@pytest.mark.parametrize("k", [1, 2])
def test_load_balancing_loss_pushes_towards_balance(k):
    logits = torch.randn(64, 4, generator=torch.Generator().manual_seed(9)) + torch.tensor([2.0, 0, 0, 0])
    logits.requires_grad_(True)
    before = load_balancing_loss(logits, k)
    gradient = torch.autograd.grad(before, logits)[0].sum(dim=0)
    assert gradient[0] > 0 and (gradient[1:] < 0).all()
    for _ in range(50):
        step = torch.autograd.grad(load_balancing_loss(logits, k), logits)[0]
        logits = (logits - 20 * step).detach().requires_grad_()
    assert load_balancing_loss(logits, k) < before - 0.3 * (before.item() - 1)
    assert gate_weights(logits, k).mean(dim=0)[0] < 0.55


@pytest.mark.parametrize("k", [1, 2])
def test_loss_is_cross_entropy_plus_weighted_balance(k, make_moe, images, labels):
    model = make_moe("resnet", router_top_k=k, router_aux_loss_coef=0.25)
    index = torch.tensor([-1] * 6 + [2] * 7)
    output = model(images, labels=labels, expert_index=index, output_router_logits=True)
    balance = load_balancing_loss(output.router_logits[:6], k)  # only the rows that the router decided
    torch.testing.assert_close(output.aux_loss, balance)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels) + 0.25 * balance)


# --- wrong input -----------------------------------------------------------------------------------------------------


def spoil(images, value):
    images = images.clone()
    images[3, 1, 2, 5] = value
    return images


WRONG_INPUT = {
    "no-batch": (lambda x: {"pixel_values": x[0]}, ["(3, 30, 30)", "3, height, width)"]),
    "empty": (lambda x: {"pixel_values": x[:0]}, ["(0, 3, 30, 30)", "batch"]),
    "channels": (lambda x: {"pixel_values": x[:, :2]}, ["(13, 2, 30, 30)", "3, height, width)"]),
    "size": (lambda x: {"pixel_values": x[..., :28]}, ["30x28", "image_size=30"]),
    "uint8": (lambda x: {"pixel_values": (255 * x).byte()}, ["torch.uint8", "divide by 255"]),
    "nan": (lambda x: {"pixel_values": spoil(x, math.nan)}, ["nan", "[0, 1]"]),
    "above-1": (lambda x: {"pixel_values": spoil(x, 1.01)}, ["1.01]", "[0, 1]"]),
    "below-0": (lambda x: {"pixel_values": spoil(x, -0.25)}, ["[-0.25", "[0, 1]", "normalises inside"]),
    "label-range": (lambda x: {"labels": torch.full((13,), 7)}, ["[7, 7]", "[0, 7)"]),
    "label-negative": (lambda x: {"labels": torch.full((13,), -100)}, ["[-100, -100]", "[0, 7)"]),
    "label-dtype": (lambda x: {"labels": torch.zeros(13)}, ["torch.float32", "(13,)", "int64"]),
    "label-shape": (lambda x: {"labels": torch.zeros(12, dtype=torch.int64)}, ["(12,)", "(13,)"]),
    "expert-range": (lambda x: {"expert_index": torch.full((13,), 4)}, ["expert_index", "[4, 4]", "below 4"]),
    "expert-negative": (lambda x: {"expert_index": torch.full((13,), -2)}, ["expert_index", "[-2, -2]", "-1"]),
    "expert-dtype": (lambda x: {"expert_index": torch.zeros(13)}, ["expert_index", "torch.float32", "int64"]),
    "expert-shape": (lambda x: {"expert_index": torch.zeros(5, dtype=torch.int64)}, ["expert_index", "(5,)", "(13,)"]),
}


DUAL_TOO = ("size", "uint8", "nan", "label-range", "expert-dtype")


@pytest.mark.parametrize(
    ("kind", "case"), [*(("moe", case) for case in WRONG_INPUT), *(("dual", case) for case in DUAL_TOO)]
)
def test_wrong_input_is_refused_with_what_is_allowed(kind, case, make_moe, make_dual, images):
    model = make_moe("resnet") if kind == "moe" else make_dual()
    build, expected = WRONG_INPUT[case]
    with pytest.raises(ValueError) as error:
        model(**{"pixel_values": images, **build(images)})
    for text in expected:
        assert text in str(error.value)


def test_pixels_a_rounding_error_above_one_are_accepted(resnet_moe, images):
    assert resnet_moe(spoil(images, 1 + 1e-6)).logits.isfinite().all()


def test_grey_model_takes_rgb_images(make_moe, images):
    model = make_moe("vit", num_channels=1, image_mean=0.5, image_std=0.25)
    grey = images[:, :1]
    assert torch.equal(model(grey.expand(-1, 3, -1, -1)).logits, model(grey).logits)
    weighted = (images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)  # as in training
    torch.testing.assert_close(model.route(images), model.route(weighted))
    with pytest.raises(ValueError, match="torch.uint8"):
        model((255 * images).byte())
    with pytest.raises(ValueError, match=r"\(13, 2, 30, 30\)"):
        model(images[:, :2])
