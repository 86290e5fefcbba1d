"""`load_classifier`: what transformers' pipeline says about a photo is what the loaded model says; clear refusals."""

import json
import logging
import shutil

import foreign_models
import numpy as np
import pytest
import torch
import transformers as hf
from foreign_models import FOREIGN, SHORTEST, SIZE, SMALL, SQUARE, STAGES, VIT, vit
from PIL import Image
from sklearn.datasets import load_sample_images

from hf_dualmoe import DualMoEForImageClassification
from hf_dualmoe.models.loading import (
    MARKER,
    NormalizedClassifier,
    check_results_folder,
    is_foreign,
    load_classifier,
)

RESIZES_ITS_OWN_SIZE = ("convnext", "mobilenet_v2")  # enlarges every image, and crops it back


@pytest.fixture(scope="module")
def photos():
    """Real photos of the models' own size, of every brightness."""
    pictures = [Image.fromarray(photo) for photo in load_sample_images().images]
    return [picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC) for picture in pictures]


def weight_dial(make_moe, make_dual):
    parts = [make_moe("resnet", num_experts=1), make_moe("resnet", num_experts=1)]
    return DualMoEForImageClassification.from_models(*parts, alpha=0.5, mixing="weights").eval()


OURS = {
    "moe": lambda make_moe, make_dual: make_moe(),
    "dual": lambda make_moe, make_dual: make_dual(),
    "dial in the weights": weight_dial,
}


@pytest.fixture(scope="module")
def save(tmp_path_factory, make_moe, make_dual):
    """save(kind): the folder of a saved model."""
    folders = {}

    def save(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("models") / "model"
            if kind in OURS:
                OURS[kind](make_moe, make_dual).save_pretrained(folders[kind])
            else:
                foreign_models.save(kind, folders[kind])
        return folders[kind]

    return save


def unit(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("kind", [*FOREIGN, *OURS])
def test_classes_and_probabilities_are_those_of_pipeline(kind, save, photos):
    folder = save(kind)
    model = load_classifier(folder)
    size, pictures = model.config.image_size, photos
    assert size == (30 if kind in OURS else SIZE) and model.config.num_channels == 3
    assert isinstance(model, NormalizedClassifier) == (kind not in OURS)
    if size != SIZE:
        pictures = [picture.resize((size, size)) for picture in photos]
    served = hf.pipeline("image-classification", model=str(folder), top_k=9)
    for picture in pictures:
        images = unit(picture)
        if kind in RESIZES_ITS_OWN_SIZE:
            processor = hf.AutoImageProcessor.from_pretrained(folder)
            images = model.denormalize(processor(picture, return_tensors="pt")["pixel_values"])
            assert -1e-3 <= images.min() and images.max() <= 1 + 1e-3 and (images - unit(picture)).abs().max() > 0.01
        with torch.no_grad():
            probabilities = model(images).logits.softmax(dim=1)[0]
        expected = {answer["label"]: answer["score"] for answer in served(picture)}
        found = {model.config.id2label[i]: float(p) for i, p in enumerate(probabilities)}
        assert found == pytest.approx(expected, abs=1e-4)
        assert max(found, key=found.get) == max(expected, key=expected.get)
        assert max(found.values()) - min(found.values()) > 1e-3  # the network sees something


@pytest.mark.parametrize("kind", ["resnet", "mobilenet_v2", "beit", "timm_wrapper", "vit of 0 .. 255"])
def test_what_is_saved_again_is_served_by_transformers_alone(kind, save, photos, tmp_path):
    model = load_classifier(save(kind))
    with torch.no_grad():
        next(iter(model.network.parameters())).add_(0.05)  # as a training would
    model.save_pretrained(tmp_path / "again")
    found = {path.name for path in (tmp_path / "again").iterdir()}
    assert not [name for name in found if name.endswith(".py")]
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (save(kind), tmp_path / "again"))
    assert after == before  # no trace of ours
    served = hf.pipeline("image-classification", model=str(tmp_path / "again"), top_k=9)
    processor = hf.AutoImageProcessor.from_pretrained(save(kind))
    for picture in photos:
        images = model.denormalize(processor(picture, return_tensors="pt")["pixel_values"])
        with torch.no_grad():
            probabilities = model(images).logits.softmax(dim=1)[0]
        found = {model.config.id2label[i]: float(p) for i, p in enumerate(probabilities)}
        assert found == pytest.approx({answer["label"]: answer["score"] for answer in served(picture)}, abs=1e-4)


def test_gradients_pass_the_normalisation(save, photos):
    model, images = load_classifier(save("vit")), unit(photos[1]).requires_grad_(True)
    model(images).logits[0, 0].backward()
    assert images.grad.abs().max() > 0


# --- given, refused, said --------------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path, save):
    """A folder with a ViT and no image processor."""
    vit().save_pretrained(tmp_path / "bare")
    return tmp_path / "bare"


def test_model_without_a_processor_says_what_to_pass(bare):
    with pytest.raises(ValueError, match="has no image processor.*--image_mean, --image_std; 0 and 1 where"):
        load_classifier(bare)
    model = load_classifier(bare, image_mean=0.5, image_std=[0.25, 0.5, 1.0])
    assert model.config.image_size == SIZE
    images = torch.rand(2, 3, SIZE, SIZE)
    assert torch.allclose(model.normalize(images)[:, 0], (images[:, 0] - 0.5) / 0.25)
    assert torch.allclose(model.normalize(images)[:, 2], images[:, 2] - 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_mean": 0.5}, "image_mean=0.5 and image_std=None: give both or none"),
        ({"image_mean": 0.5, "image_std": 0}, "image_std=0 must be finite and > 0"),
        ({"image_mean": [0.5, 0.5], "image_std": 1}, r"image_mean=\[0.5, 0.5\] must be finite: .* each of 3 channels"),
        ({"image_mean": 0, "image_std": 1, "image_size": 17}, r"takes no images of \(.*\) = \(3, 17, 17\)"),
    ],
)
def test_what_is_given_must_fit(bare, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_classifier(bare, **arguments)


def test_size_that_nobody_knows(tmp_path):
    hf.ResNetForImageClassification(hf.ResNetConfig(embedding_size=8, **STAGES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="image_size=None: neither the config nor a processor"):
        load_classifier(tmp_path, image_mean=0, image_std=1)
    assert load_classifier(tmp_path, image_mean=0, image_std=1, image_size=40).config.image_size == 40


@pytest.mark.parametrize(
    "processor",
    [
        lambda: hf.MobileViTImageProcessor(size=SHORTEST, crop_size=SQUARE),  # swaps the channels
        lambda: hf.ConvNextImageProcessor(size=SHORTEST, do_resize=False),  # images of any size
        lambda: hf.ViTImageProcessor(size={"height": SIZE, "width": 2 * SIZE}),
        lambda: hf.ImageGPTImageProcessor(clusters=[[0.0, 0.0, 0.0]], size=SQUARE),  # words of colours
    ],
    ids=["channels", "sizes", "oblong", "clusters"],
)
def test_processor_that_does_more_is_refused(bare, processor):
    processor().save_pretrained(bare)
    with pytest.raises(ValueError, match=r"does more than resize, crop, rescale and normalise \(.*pass image_mean"):
        load_classifier(bare)
    assert load_classifier(bare, image_mean=0.5, image_std=0.5).config.image_size == SIZE


def test_a_given_normalisation_is_saved_as_an_image_processor(bare, tmp_path, photos):
    model = load_classifier(bare, image_mean=0.5, image_std=[0.25, 0.5, 1.0])
    model.save_pretrained(tmp_path / "again")
    again = load_classifier(tmp_path / "again")
    assert again.config.image_mean == [0.5] * 3 and again.config.image_std == [0.25, 0.5, 1.0]
    assert torch.allclose(again(unit(photos[0])).logits, model(unit(photos[0])).logits)


def test_what_is_no_image_classifier(tmp_path, save):
    hf.ViTModel(hf.ViTConfig(**VIT)).save_pretrained(tmp_path / "body")
    with pytest.raises(ValueError, match="no trained weights for classifier.bias, classifier.weight"):
        load_classifier(tmp_path / "body")
    config = hf.ViTConfig(**VIT, problem_type="multi_label_classification", num_labels=3)
    hf.ViTForImageClassification(config).save_pretrained(tmp_path / "several")
    with pytest.raises(ValueError, match="does not choose one of several classes"):
        load_classifier(tmp_path / "several")
    hf.BertModel(hf.BertConfig(**SMALL, vocab_size=9)).save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match="cannot be loaded as an image classifier"):
        load_classifier(tmp_path / "words")
    with pytest.raises(ValueError, match="neither a saved image classifier nor the id of one"):
        load_classifier(tmp_path)
    with pytest.raises(ValueError, match="there is no such folder"):
        load_classifier("./nowhere")
    with pytest.raises(ValueError, match="normalises by itself"):
        load_classifier(save("moe"), image_mean=0, image_std=1)


def test_other_framing_is_said(save, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_dualmoe.models.loading"):
        load_classifier(save("resnet"))
        load_classifier(save("dinov2"))
        assert not caplog.records
        load_classifier(save("vit"))  # stretches oblong pictures
        load_classifier(save("mobilenet_v2"))  # crops a frame away
    assert [record.message.count("frames pictures in another way") for record in caplog.records] == [1, 1]


# --- folders ---------------------------------------------------------------------------------------------------------


def test_folders_of_others_are_not_written_to(tmp_path, save):
    assert is_foreign(save("vit")) and not is_foreign(save("moe")) and not is_foreign(tmp_path)
    hardened = tmp_path / "hardened"
    shutil.copytree(save("vit"), hardened)
    (hardened / "results.json").write_text(json.dumps({"metrics": {}, "training": {"method": "at"}}))
    assert not is_foreign(hardened)
    for text in (
        '{"accuracy": 0.9}',
        '{"metrics": {}, "training": null}',
        '{"training": {"method": "sgd"}}',
        "",
        "[1]",
    ):
        (hardened / "results.json").write_text(text)  # of somebody else's tool
        assert is_foreign(hardened)
    (hardened / "README.md").write_text(f"---\nlicense: mit\n---\n{MARKER}\n")  # as run.py --report none leaves it
    assert not is_foreign(hardened)
    with pytest.raises(ValueError, match="holds a model that hf_dualmoe did not make"):
        check_results_folder(save("vit"))
    check_results_folder(save("dual"))
    check_results_folder(tmp_path / "new")
    assert "image_mean" not in json.loads((save("vit") / "config.json").read_text())
