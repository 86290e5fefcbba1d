"""The dual model: mixing, its dial, any classifier as a component, logit maps, loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_tensors, save_and_load
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    ConvNextConfig,
    DeiTConfig,
    DeiTForImageClassification,
    HieraConfig,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipConfig,
    SwinConfig,
    TimmWrapperConfig,
    ViTConfig,
    ViTModel,
)

from hf_dualmoe import DualMoEForImageClassification
from hf_dualmoe.models.mixing_dualmoe import apply_logit_map, mix_logits


def test_alpha_at_its_ends_is_one_model_alone(dual, images):
    for alpha, name in ((0, "standard"), (1, "robust")):
        given = dual(images, alpha=alpha).logits
        dual.set_alpha(alpha)
        alone = getattr(dual, name)(images).logits
        for logits in (given, dual(images).logits):
            torch.testing.assert_close(logits.softmax(dim=1), alone.softmax(dim=1), rtol=0, atol=1e-6)
            assert torch.equal(logits.argmax(dim=1), alone.argmax(dim=1))
        assert dual.config.alpha == alpha


@pytest.mark.parametrize("mixing", ["probs", "logits"])
def test_mixture_by_hand(mixing, make_dual, images):
    model = make_dual(mixing=mixing)
    for alpha in (0.3, 0.75):
        output = model(images, alpha=alpha)
        standard, robust = output.standard_logits, output.robust_logits
        if mixing == "logits":
            expected = (1 - alpha) * standard + alpha * robust
        else:
            expected = ((1 - alpha) * standard.softmax(dim=1) + alpha * robust.softmax(dim=1)).log()
        torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)


def test_output_carries_both_components(dual, images):
    output = dual(images, output_router_logits=True)
    standard, robust = dual.standard(images), dual.robust(images)
    torch.testing.assert_close(output.standard_logits, standard.logits)
    torch.testing.assert_close(output.robust_logits, robust.logits)
    assert torch.equal(output.robust_expert_index, robust.expert_index)
    assert output.standard_router_logits.shape == (13, 1)
    torch.testing.assert_close(output.robust_router_logits, dual.robust.route(images))
    assert dual(images).robust_router_logits is None


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mixing", ["probs", "logits"])
def test_extreme_logits_stay_finite(alpha, mixing):
    generator = torch.Generator().manual_seed(10)
    logits = [(1e4 * torch.randn(13, 7, generator=generator)).requires_grad_(True) for _ in range(2)]
    mixed = mix_logits(*logits, alpha, mixing)
    gradients = torch.autograd.grad(F.cross_entropy(mixed, torch.arange(13) % 7, reduction="sum"), logits)
    assert mixed.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0].any() == (alpha < 1) and gradients[1].any() == (alpha > 0)


def test_gradient_of_the_mixed_loss_by_hand():
    generator = torch.Generator().manual_seed(11)
    logits = [torch.randn(13, 7, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    labels = torch.arange(13) % 7
    loss = F.cross_entropy(mix_logits(*logits, 0.3), labels)
    naive = -(0.7 * logits[0].softmax(dim=1) + 0.3 * logits[1].softmax(dim=1))[torch.arange(13), labels].log().mean()
    found, expected = (torch.autograd.grad(value, logits) for value in (loss, naive))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_alpha_can_differ_between_images(dual, images):
    alpha = torch.linspace(0, 1, 13)[:, None]
    logits = dual(images, alpha=alpha).logits
    for b in (0, 5, 12):
        torch.testing.assert_close(logits[b : b + 1], dual(images[b : b + 1], alpha=alpha[b].item()).logits)


@pytest.mark.parametrize(
    "alpha",
    [-0.1, 1.5, math.nan, torch.full((13, 1), 1.5), torch.full((13, 1), math.nan)],
    ids=["low", "high", "nan", "high-tensor", "nan-tensor"],
)
def test_alpha_out_of_range_is_refused(alpha, dual, images):
    with pytest.raises(ValueError, match=r"alpha.*\[0, 1\]"):
        dual(images, alpha=alpha)
    if not isinstance(alpha, torch.Tensor):
        with pytest.raises(ValueError, match=r"alpha.*\[0, 1\]"):
            dual.set_alpha(alpha)
    assert dual.config.alpha == 0.75


def test_dual_model_is_saved_with_its_dial(dual, images, tmp_path):
    dual.set_alpha(0.375)
    loaded = save_and_load(dual, tmp_path)
    assert type(loaded) is DualMoEForImageClassification and loaded.config.alpha == 0.375
    assert_same_tensors(dual, loaded)
    torch.testing.assert_close(loaded(images).logits, dual(images).logits)


def test_native_vit_as_standard_model(native_vit, resnet_moe, images, tmp_path):
    mean, std = [0.5, 0.25, 0.125], [0.5, 0.25, 0.125]
    model = DualMoEForImageClassification.from_models(
        native_vit, resnet_moe, 0.5, standard_image_mean=mean, standard_image_std=std
    )
    normal = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    output = model(images)
    torch.testing.assert_close(output.standard_logits, native_vit(normal).logits)
    torch.testing.assert_close(output.robust_logits, resnet_moe(images).logits)
    assert output.standard_expert_index is None
    loaded = save_and_load(model, tmp_path)
    assert_same_tensors(model, loaded)
    torch.testing.assert_close(loaded(images).logits, output.logits)


def test_native_resnet_as_robust_model(make_moe, images, labels, tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=7)
    robust = ResNetForImageClassification(config).eval()
    model = DualMoEForImageClassification.from_models(make_moe("vit"), robust)
    output = model(images, labels=labels)
    torch.testing.assert_close(output.robust_logits, robust(images).logits)
    torch.testing.assert_close(save_and_load(model, tmp_path)(images, labels=labels).loss, output.loss)
    with pytest.raises(ValueError, match="robust model has no experts"):
        model(images, expert_index=torch.zeros(13, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(13, 2, 30, 30\)"):
        model(images[:, :2])


SIZES = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 37}
VIT = {**SIZES, "image_size": 30, "patch_size": 6}
STAGES = {"embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2]}
TEXT_NUMBERS = {"id2label": dict(enumerate("abcdefg")), "label2id": {name: str(i) for i, name in enumerate("abcdefg")}}
FOREIGN = {
    "label2id of texts": ViTConfig(**VIT, **TEXT_NUMBERS),
    "labels that are numbers": ViTConfig(**VIT, id2label={i: i for i in range(7)}),
    "image size of two numbers": ViTConfig(**{**VIT, "image_size": [30, 30]}, num_labels=7),
    "vocabulary": BeitConfig(**VIT, vocab_size=250_002, out_indices=[1], num_labels=7),
    "vocabulary inside": SiglipConfig(vision_config=VIT, text_config={**SIZES, "vocab_size": 256_000}, num_labels=7),
    "infinite number": ConvNextConfig(
        **{"hidden_sizes": [8, 12, 16, 20], "depths": [1] * 4, "image_size": 30, "patch_size": 2},
        **{"layer_scale_cap": math.inf, "num_labels": 7},
    ),
    "shifted windows": SwinConfig(**STAGES, image_size=30, patch_size=5, window_size=3, num_labels=7),
    "square of a tuple": HieraConfig(
        **{**STAGES, "image_size": [30, 30], "patch_size": [7, 7], "patch_stride": [5, 5], "num_query_pool": 1},
        **{"masked_unit_size": [2, 2], "query_stride": [2, 2], "num_labels": 7},
    ),
    "label_names": TimmWrapperConfig(
        architecture="test_resnet", label_names=[f"name {i}" for i in range(1_200)], return_dict=False
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_component_is_loaded_as_it_was_saved(kind, make_moe, images, tmp_path):
    config = FOREIGN[kind]
    standard = AutoModelForImageClassification.from_config(config).eval()
    small = {"backbone": "lipschitz_mlp", "backbone_kwargs": {"hidden_sizes": [6]}, "num_experts": 1}
    robust = make_moe("vit", **small, num_labels=config.num_labels)
    model = DualMoEForImageClassification.from_models(standard, robust)
    with torch.no_grad():
        output, alone = model(images[:2]), standard(images[:2], return_dict=True).logits
        loaded = save_and_load(model, tmp_path)
        assert torch.equal(output.standard_logits, alone) and torch.equal(loaded(images[:2]).logits, output.logits)
    assert loaded.config.image_size == 30
    assert loaded.config.id2label == {i: str(name) for i, name in config.id2label.items()}
    assert loaded.config.label2id == {name: i for i, name in loaded.config.id2label.items()}
    assert_same_tensors(model, loaded)


def test_component_of_a_model_type_with_two_classes(make_moe, images, tmp_path):
    standard = DeiTForImageClassification(DeiTConfig(**VIT, num_labels=7)).eval()
    model = DualMoEForImageClassification.from_models(standard, make_moe("resnet"))
    loaded = save_and_load(model, tmp_path)
    assert type(loaded.standard) is DeiTForImageClassification
    torch.testing.assert_close(loaded(images).logits, model(images).logits)


def test_component_that_could_not_be_built_again_is_refused(native_vit, resnet_moe):
    native_vit.classifier = torch.nn.Sequential(native_vit.classifier, torch.nn.Identity())
    with pytest.raises(ValueError, match=r"not fit a ViTForImageClassification of standard.config.*classifier.0.bias"):
        DualMoEForImageClassification.from_models(native_vit, resnet_moe)
    with pytest.raises(ValueError, match="not fit a ViTForImageClassification of robust.config"):
        DualMoEForImageClassification.from_models(resnet_moe, ViTModel(native_vit.config))
    resnet_moe.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ValueError, match="standard.'quantization_config'.* is not allowed"):
        DualMoEForImageClassification.from_models(resnet_moe, resnet_moe)


def test_oblong_component_is_refused(resnet_moe):
    oblong = AutoModelForImageClassification.from_config(ViTConfig(**{**VIT, "image_size": [30, 36]}, num_labels=7))
    with pytest.raises(ValueError, match=r"standard.image_size=\[30, 36\] must be square"):
        DualMoEForImageClassification.from_models(oblong, resnet_moe)


@pytest.mark.parametrize(("halved", "half"), [("standard", torch.float16), ("robust", torch.bfloat16)])
def test_components_of_two_precisions_keep_their_values(halved, half, make_moe, images, tmp_path):
    parts = {"standard": make_moe("vit", num_experts=1), "robust": make_moe("resnet", num_experts=2)}
    parts[halved].to(half)
    model = DualMoEForImageClassification.from_models(**parts)
    assert model.dtype == torch.float32
    loaded = save_and_load(model, tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(loaded.state_dict()[name].dtype)), name
    other = "robust" if halved == "standard" else "standard"
    assert torch.equal(getattr(loaded(images), f"{other}_logits"), getattr(model(images), f"{other}_logits"))


def test_saved_config_does_not_say_where_the_components_came_from(native_vit, make_moe, tmp_path):
    for name, part in (("standard", native_vit), ("robust", make_moe("resnet"))):
        part.save_pretrained(tmp_path / name)
    parts = (AutoModelForImageClassification.from_pretrained(tmp_path / name) for name in ("standard", "robust"))
    model = DualMoEForImageClassification.from_models(*parts)
    model.save_pretrained(tmp_path / "joined")
    assert str(tmp_path) not in (tmp_path / "joined" / "config.json").read_text(encoding="utf-8")
    loaded = DualMoEForImageClassification.from_pretrained(tmp_path / "joined")
    for text in (model.config.to_json_string(use_diff=False), loaded.config.to_json_string()):
        assert str(tmp_path) not in text.replace(str(tmp_path / "joined"), "")


def test_same_model_as_both_components_can_be_saved(resnet_moe, images, tmp_path):
    model = DualMoEForImageClassification.from_models(resnet_moe, resnet_moe, 0.3)
    loaded = save_and_load(model, tmp_path)
    torch.testing.assert_close(loaded(images).logits.softmax(dim=1), resnet_moe(images).logits.softmax(dim=1))
    model.standard.router[-1].weight.data.zero_()
    assert model.robust.router[-1].weight.any()


def test_from_models_keeps_weights_mode_and_configs_of_its_components(make_moe):
    standard, robust = make_moe("vit", num_experts=1).train(), make_moe("resnet")
    model = DualMoEForImageClassification.from_models(standard, robust)
    assert model.standard is standard and model.robust is robust
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert (model.config.standard.num_experts, model.config.robust.num_experts) == (1, 4)


def test_labels_of_the_components_must_agree(make_moe):
    names = {i: f"class {i}" for i in range(7)}
    standard, robust = make_moe("vit", num_experts=1), make_moe("resnet")
    standard.config.id2label = names
    assert DualMoEForImageClassification.from_models(standard, robust).config.id2label == names
    robust.config.id2label = {i: f"class {6 - i}" for i in range(7)}
    with pytest.raises(ValueError, match="class 0.*class 6.*agree"):
        DualMoEForImageClassification.from_models(standard, robust)
    with pytest.raises(ValueError, match="agree|must be equal"):
        DualMoEForImageClassification.from_models(make_moe("vit", num_labels=5), make_moe("resnet"))


def test_other_images_for_the_robust_model(dual, images, labels):
    attacked = images[:5].flip(3)
    index = torch.tensor([3, 2, 1, 0, -1])
    output = dual(images, labels=labels, robust_pixel_values=attacked, expert_index=index)
    assert output.logits is None and output.loss is None
    torch.testing.assert_close(output.standard_logits, dual.standard(images).logits)
    torch.testing.assert_close(output.robust_logits, dual.robust(attacked, expert_index=index).logits)
    assert torch.equal(output.robust_expert_index[:4], index[:4])


def test_loss_of_the_dual_model(make_moe, images, labels):
    standard, robust = make_moe("vit", router_aux_loss_coef=0.5), make_moe("resnet", router_aux_loss_coef=0.25)
    model = DualMoEForImageClassification.from_models(standard, robust, 0.3)
    output = model(images, labels=labels)
    aux_loss = 0.5 * standard(images).aux_loss + 0.25 * robust(images).aux_loss
    torch.testing.assert_close(output.aux_loss, aux_loss)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels) + aux_loss)
    output.loss.backward()
    assert all(component.router[-1].weight.grad.any() for component in (standard, robust))


@pytest.mark.parametrize(
    ("logit_map", "expected"),
    [
        (None, [4.0, -1.0, 0.0]),
        ({"scale": 2.0}, [8.0, -2.0, 0.0]),
        ({"power": 0.5}, [2.0, -1.0, 0.0]),
        ({"clamp": 0.0}, [1.3887, 0.0, 0.0]),  # mean 1, variance 14/3: (3, -2, -1) / 2.1602
        ({"clamp": 0.5, "power": 2.0, "scale": 3.0}, [3 * 1.8887**2, 0.0, 3 * 0.0371**2]),
    ],
    ids=str,
)
def test_logit_map_by_hand(logit_map, expected):
    mapped = apply_logit_map(torch.tensor([[4.0, -1.0, 0.0]]), logit_map)
    torch.testing.assert_close(mapped, torch.tensor([expected]), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logit_map_does_not_round_or_overflow_in_half_precision(dtype):
    logits = torch.tensor([[12.0, 3.0, -2.0]], dtype=dtype)
    for logit_map in ({"scale": 16.0, "power": 4.0}, {"clamp": 0.5, "power": 3.0}):
        torch.testing.assert_close(apply_logit_map(logits, logit_map), apply_logit_map(logits.float(), logit_map))


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_logit_map_has_a_finite_gradient(power):
    logits = torch.tensor([[4.0, -1.0, 0.0], [2.0, 2.0, 2.0]], requires_grad=True)
    for logit_map in ({"power": power}, {"power": power, "clamp": 0.0}):
        gradient = torch.autograd.grad(apply_logit_map(logits, logit_map).square().sum(), logits)[0]
        assert gradient.isfinite().all()


def test_dual_model_applies_each_logit_map_to_its_component(make_dual, images):
    maps = {"standard_logit_map": {"scale": 3.0}, "robust_logit_map": {"clamp": 0.5, "power": 2.0}}
    model = make_dual(alpha=0.4, **maps)
    output = model(images)
    standard, robust = 3 * output.standard_logits, F.relu(F.layer_norm(output.robust_logits, (7,)) + 0.5) ** 2
    expected = (0.6 * standard.softmax(dim=1) + 0.4 * robust.softmax(dim=1)).log()
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)
