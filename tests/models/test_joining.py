"""`join_models`: each part answers in the dual model as it does alone, whatever it takes; clear refusals."""

import foreign_models
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoModelForImageClassification, ConvNextImageProcessor

from hf_dualmoe import DualMoEForImageClassification
from hf_dualmoe.models.joining import join_models
from hf_dualmoe.models.loading import load_classifier

NAMES = list("abcde")
PAIRS = [
    *(("vit", "resnet", 24), ("timm_wrapper", "convnext", None)),
    *(("mobilenet_v2", "beit", 24), ("vit of 0 .. 255", "dinov2", None)),
]


@pytest.fixture
def save(tmp_path):
    """save(kind, **options): the folder of a tiny classifier with these class names."""

    def save(kind, name=None, labels=tuple(NAMES), **options):
        folder = tmp_path / (name or kind)
        foreign_models.save(kind, folder, labels=list(labels), **options)
        return folder

    return save


def resized(images, size):
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=True)


@pytest.mark.parametrize(("standard", "robust", "size"), PAIRS)
def test_parts_answer_as_alone_and_are_saved_so(standard, robust, size, save, tmp_path):
    folders = {"standard": save(standard), "robust": save(robust, seed=1)}
    dual = join_models(*folders.values(), 0.6, image_size=size)
    assert dual.config.image_size == (size or 32) and dual.config.alpha == 0.6 and not dual.training
    images = torch.rand(3, 3, dual.config.image_size, dual.config.image_size)
    dual.save_pretrained(tmp_path / "dual")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "dual")
    with torch.no_grad():
        output = again(images)
        for name, folder in folders.items():
            alone = load_classifier(folder)(resized(images, 32)).logits
            torch.testing.assert_close(output[f"{name}_logits"], alone, rtol=1e-4, atol=1e-4)
        mixed = 0.4 * output.standard_logits.softmax(1) + 0.6 * output.robust_logits.softmax(1)
    torch.testing.assert_close(output.logits.softmax(1), mixed, rtol=1e-4, atol=1e-4)
    crop = AutoImageProcessor.from_pretrained(tmp_path / "dual").crop_size
    assert crop["height"] == dual.config.image_size


def test_a_large_vit_beside_a_small_resnet_takes_the_images_of_the_resnet(save, images):
    small = save("resnet")
    processor = {"size": {"shortest_edge": 16}, "crop_pct": 1.0, **foreign_models.NORMALISATION}
    ConvNextImageProcessor(**processor).save_pretrained(small)
    dual = join_models(save("vit"), small)
    assert (dual.config.image_size, dual.config.standard.image_size, dual.config.robust.image_size) == (16, 32, 16)
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    dual(images).standard_logits.sum().backward()
    assert (images.grad.abs().amax(dim=(1, 2, 3)) > 0).all()  # an attack sees through the resizing
    with pytest.raises(ValueError, match="pixel_values are 32x32 pixels; this model takes image_size=16"):
        dual(torch.rand(2, 3, 32, 32))


def test_beside_a_mixture_of_ours_the_other_part_resizes(save, make_moe):
    moe = make_moe(num_labels=5)  # for 30 pixels
    for parts in ((moe, save("vit")), (save("vit"), moe)):
        dual = join_models(*parts)
        assert dual.config.image_size == dual.config.input_size == 30 and dual(torch.rand(2, 3, 30, 30)).logits.shape
        assert list(dual.config.id2label.values()) == NAMES
    with pytest.raises(ValueError, match="robust is a mixture of ours for images of 30 pixels.*image_size=32"):
        join_models(save("vit"), moe, image_size=32)
    other = make_moe(num_labels=5, image_size=20)
    with pytest.raises(ValueError, match="robust is a mixture of ours for images of 20 pixels.*take 30"):
        join_models(moe, other)


def test_weights_are_mixed_where_that_is_possible(save):
    start, tuned = save("resnet"), save("resnet", name="tuned", seed=1)
    dual = join_models(start, tuned, 1.0, mixing="weights")
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(dual(images).logits, load_classifier(tuned)(images).logits)
    with pytest.raises(ValueError, match="cannot merge F_S and F_R: their architectures differ"):
        join_models(save("vit"), tuned, mixing="weights")


def test_labels_must_be_the_same_in_the_same_order(save, make_dual):
    vit = save("vit")
    with pytest.raises(ValueError, match="the same classes in another order: label 0 is 'a' and 'e'; label 1"):
        join_models(vit, save("resnet", labels="edcba"))
    with pytest.raises(ValueError, match="other classes: label 3 is 'd' and 'x'. Train one"):
        join_models(vit, save("resnet", name="other", labels="abcxe"))
    joined = join_models(vit, save("resnet", name="other", labels="abcxe"), check_names=False)
    assert joined.config.id2label[3] == "x"
    spelled = save("resnet", name="spelled", labels=["A", "b, bee", "c", "D", "e"])
    assert join_models(vit, spelled).config.id2label[1] == "b, bee"
    assert join_models(vit, save("convnext", labels=())).config.id2label[4] == "e"  # LABEL_4 says nothing
    with pytest.raises(ValueError, match="standard has 5 classes .* and robust 7"):
        join_models(vit, make_dual().robust)
    with pytest.raises(ValueError, match="robust is a dual model itself"):
        join_models(vit, make_dual())
    with pytest.raises(ValueError, match="there is no such folder"):
        join_models("./nowhere", vit)


def test_channels_must_be_the_same(save, make_moe):
    grey = make_moe(num_labels=5, num_channels=1, image_mean=0.5, image_std=0.5)
    with pytest.raises(ValueError, match="standard takes images of 3 channels and robust of 1"):
        join_models(save("vit"), grey)


@pytest.mark.parametrize("name", ["standard", "robust"])
def test_from_models_names_join_models_where_a_part_is_no_model_of_transformers(name, save):
    part = load_classifier(save("vit"))
    parts = {"standard": part.network, "robust": part.network, name: part}
    with pytest.raises(ValueError, match=f"{name} is a NormalizedClassifier; .*hf_dualmoe.models.joining.join_models"):
        DualMoEForImageClassification.from_models(**parts)
