"""Models that nobody can measure, harden or join: each command refuses them before anything starts, and says why."""

import importlib

import foreign_models
import pytest
import scripts
import transformers as hf
from foreign_models import NORMALISATION, SMALL, SQUARE, VIT


def language_model(folder):
    hf.BertModel(hf.BertConfig(**SMALL, vocab_size=9)).save_pretrained(folder)


def without_processor(folder):
    foreign_models.vit().save_pretrained(folder)


def with_processor(**options):
    def save(folder):
        without_processor(folder)
        hf.ViTImageProcessor(**{"size": SQUARE, **options}).save_pretrained(folder)

    return save


def padding(folder):
    without_processor(folder)
    hf.BitImageProcessor(size={"shortest_edge": 16}, crop_size=SQUARE).save_pretrained(folder)


def four_channels(folder):
    hf.ViTForImageClassification(hf.ViTConfig(**VIT, num_channels=4)).save_pretrained(folder)
    hf.ViTImageProcessor(size=SQUARE).save_pretrained(folder)


def cut_off(folder):
    foreign_models.save("vit", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


BAD = {
    "weights cut off": (cut_off, "cannot be loaded as an image classifier"),
    "no image classifier": (language_model, "cannot be loaded as an image classifier"),
    "no processor": (without_processor, "has no image processor that can be loaded"),
    "16 bits": (with_processor(rescale_factor=1 / 65535, **NORMALISATION), "16 bits per value and not 8"),
    "4 channels": (with_processor(image_mean=[0.5] * 4, image_std=[0.5] * 4), "does more than resize, crop, rescale"),
    "4 channels of the network": (four_channels, "takes no images of (channels, height, width) = (3, 32, 32)"),
    "padding": (padding, "or pads"),
}
COMMANDS = {
    "evaluate": ["--model", "BAD"],
    "certify": ["--model", "BAD"],
    "run": ["--model_name_or_path", "BAD"],
    "join": ["--standard", "GOOD", "--robust", "BAD"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    foreign_models.save("vit", root / "good")
    for name, (save, _) in BAD.items():
        save(root / name)
    return root


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_model_is_refused_with_the_reason(command, kind, folders, tmp_path, capsys):
    words = {"BAD": str(folders / kind), "GOOD": str(folders / "good")}
    arguments = [words.get(word, word) for word in COMMANDS[command]]
    data = ["--dataset_name", "nobody/asks-for-it", "--output_dir", str(tmp_path / "out")]
    status = scripts.call(importlib.import_module(f"training.{command}"), *arguments, *data)
    error = capsys.readouterr().err
    assert status == 2 and BAD[kind][1] in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()
