"""Models that nobody can measure, harden or join: each command refuses them before anything starts, and says why."""

import importlib.util
import sys
from pathlib import Path

import foreign_models
import pytest
import transformers as hf
from foreign_models import NORMALISATION, SMALL, SQUARE, VIT

TRAINING = Path(__file__).parents[2] / "training"


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


BAD = {
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


@pytest.fixture(scope="module", params=COMMANDS)
def script(request):
    spec = importlib.util.spec_from_file_location(f"bad_{request.param}", TRAINING / f"{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return request.param, module


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_model_is_refused_with_the_reason(script, kind, folders, tmp_path, monkeypatch, capsys):
    command, module = script
    words = {"BAD": str(folders / kind), "GOOD": str(folders / "good")}
    arguments = [words.get(word, word) for word in COMMANDS[command]]
    data = ["--dataset_name", "nobody/asks-for-it", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [f"{command}.py", *arguments, *data])
    with pytest.raises(SystemExit) as stop:
        module.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and BAD[kind][1] in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()
