"""`training/join.py` end to end on two tiny classifiers of other people: dial, report, restart, refusals."""

import json
import shutil
from functools import partial

import foreign_models
import numpy as np
import pytest
import scripts
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, ConvNextImageProcessor, pipeline

from hf_dualmoe.evaluation.environment import digest_of_weights
from hf_dualmoe.evaluation.evaluation import RobustnessReport
from training import join as script

join = partial(scripts.call, script)
CLASSES = ["ant", "bee", "cow", "dog", "elk"]
QUICK = "--eps 4/255 --steps 2 --level components,dial --alphas 0 0.5 1 --disable_tqdm".split()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a ViT for 32 pixels and a ResNet for 16, and of pictures that the ViT is right about."""
    root = tmp_path_factory.mktemp("parts")
    generator = np.random.default_rng(0)
    noise = [generator.integers(0, 256, (16, 16, 3), np.uint8) // (1 + i % 3) for i in range(30)]
    pictures = [Image.fromarray(pixels) for pixels in noise]
    large = [picture.resize((32, 32), Image.Resampling.BILINEAR) for picture in pictures]
    vit, processor = foreign_models.build("vit", CLASSES)
    with torch.no_grad():  # so that it has more than one answer
        vit.classifier.bias -= vit(**processor(large, return_tensors="pt")).logits.mean(dim=0)
    vit.save_pretrained(root / "vit")
    processor.save_pretrained(root / "vit")
    foreign_models.save("resnet", root / "resnet", labels=CLASSES, seed=1)
    small = {"size": {"shortest_edge": 16}, "crop_pct": 1.0, **foreign_models.NORMALISATION}
    ConvNextImageProcessor(**small).save_pretrained(root / "resnet")
    served = pipeline("image-classification", model=str(root / "vit"))
    for i, picture in enumerate(pictures):
        name = served(large[i])[0]["label"] if i >= 15 else CLASSES[i % 5]
        path = root / "photos" / ("test" if i >= 15 else "train") / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return root


@pytest.fixture
def command(parts):
    return [*QUICK, "--standard", parts / "vit", "--robust", parts / "resnet", "--dataset_name", parts / "photos"]


def test_two_classifiers_become_one_with_its_dial_set(command, parts, tmp_path, capsys):
    assert join(*command, "--output_dir", tmp_path, "--validation_fraction", 0.4) == 0
    folder, out = tmp_path / "model", capsys.readouterr().out
    report = RobustnessReport.load(folder / "results.json")
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert out.index("Cost: at most") < out.index(report.table())
    assert model.config.alpha == report.model["alpha"] == report.alpha_choice["alpha"]
    assert "held-out images" in report.alpha_choice["chosen_on"]
    assert model.config.image_size == 16 and model(torch.rand(2, 3, 16, 16)).logits.shape == (2, 5)
    assert report.metrics["components"]["standard"]["sa"] == 100  # as pipeline serves the ViT, enlarged to 32 pixels
    assert [point["alpha"] for point in report.alpha_sweep] == [0, 0.5, 1]
    assert (report.training["standard"], report.training["robust"]) == ("vit", "resnet")
    # the cut that was used: a later evaluation is to have the same images
    assert (report.seeds["training"], report.training["validation_fraction"]) == (42, 0.4)
    card = (folder / "README.md").read_text()
    assert "## The dial" in card and "license: other" in card
    served = pipeline("image-classification", model=str(folder))
    assert served(Image.new("RGB", (20, 20)))[0]["label"] in CLASSES

    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "measurements").glob("*.safetensors")}
    assert join(*command, "--output_dir", tmp_path, "--validation_fraction", 0.4) == 0  # finds all of it finished
    assert stamps and all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    capsys.readouterr()
    assert join(*command, "--output_dir", tmp_path, "--mixing", "logits") == 2
    assert "holds another joined model (mixing: 'probs' there, 'logits' here)" in capsys.readouterr().err


def test_a_repeat_leaves_a_finished_model_its_dial_and_its_results_alone(command, parts, tmp_path, capsys):
    """It set alpha to 0.75, dropped the logit map, and replaced better numbers by a report of the dial alone."""
    for name in ("vit", "resnet"):
        shutil.copytree(parts / name, tmp_path / name)
    own = ["--standard", tmp_path / "vit", "--robust", tmp_path / "resnet", "--level", "components"]
    command, folder = [*command, *own, "--output_dir", tmp_path / "out"], tmp_path / "out" / "model"
    assert join(*command) == 0
    report = RobustnessReport.load(folder / "results.json")
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    assert digest_of_weights(loaded) == report.model["weights"]  # else no evaluation of it would find its report
    config = json.loads((folder / "config.json").read_text())
    config |= {"alpha": 0.625, "robust_logit_map": {"scale": 2.0}}  # as evaluate.py --write_calibration does
    (folder / "config.json").write_text(json.dumps(config))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    assert join(*command) == 0
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert f"{folder} is finished, with its dial at alpha = 0.625" in capsys.readouterr().out

    (folder / "config.json").write_text(json.dumps(config | {"robust_logit_map": None}))  # as it was measured
    report.failures, report.alpha_choice = {"recommended alpha": "out of reach"}, {}  # not finished
    report.save(folder / "results.json")
    assert join(*command, "--min_ra", 99.9) == 1
    assert json.loads((folder / "config.json").read_text())["alpha"] == 0.625
    taken = RobustnessReport.load(folder / "results.json")
    assert taken.model["alpha"] == 0.625 and taken.training == report.training
    taken.metrics["ra_autoattack"] = 12.5
    taken.save(folder / "results.json")
    capsys.readouterr()
    assert join(*command, "--min_ra", 99.9) == 1
    kept = f"{folder} keeps its results.json and card: this evaluation lacks ra_autoattack. Its own are in "
    assert kept in capsys.readouterr().out and RobustnessReport.load(folder / "results.json") == taken

    foreign_models.save("resnet", tmp_path / "resnet", labels=CLASSES, seed=2)
    assert join(*command) == 2
    assert "was joined from other weights: a part has changed since" in capsys.readouterr().err


def test_a_given_dial_is_kept_and_an_unreachable_floor_is_said(command, tmp_path, capsys):
    assert join(*command, "--output_dir", tmp_path / "given", "--alpha", 0.3, "--level", "components") == 0
    assert json.loads((tmp_path / "given" / "model" / "config.json").read_text())["alpha"] == 0.3
    capsys.readouterr()
    assert join(*command, "--output_dir", tmp_path / "floor", "--min_ra", 99.9, "--level", "components") == 1
    assert "The dial stays at alpha = 0.75: min_ra=99.9 cannot be reached" in capsys.readouterr().out
    assert json.loads((tmp_path / "floor" / "model" / "config.json").read_text())["alpha"] == 0.75


def test_weights_are_mixed_where_the_parts_allow_it(command, parts, tmp_path, capsys):
    tuned = tmp_path / "tuned"
    shutil.copytree(parts / "resnet", tuned)
    threat = {"eps": 2 / 255, "norm": "linf", "attacks": {}}
    RobustnessReport(model={}, dataset={}, threat=threat, training={"method": "at"}).save(tuned / "results.json")
    same = [*command, "--standard", tuned, "--mixing", "weights", "--alpha", 0.5, "--level", "dial"]
    assert join(*same, "--output_dir", tmp_path / "one") == 0
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "one" / "model").config.mixing == "weights"
    assert "trained on mild attacks" in (tmp_path / "one" / "model" / "README.md").read_text()
    capsys.readouterr()
    assert join(*command, "--mixing", "weights", "--output_dir", tmp_path / "two") == 2
    assert "cannot merge F_S and F_R: their architectures differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha", "1.5"], "alpha=1.5 must be in [0, 1]"),
        (["--alpha", "0.5", "--min_sa", "80"], "alpha=0.5 sets the dial, and min_sa chooses it; give one"),
        (["--min_sa", "80", "--min_ra", "10"], "were both given"),
        (["--eps", "0.3"], "eps=0.3 counts in pixels"),
        (["--standard", "./nowhere"], "there is no such folder"),
        (["--level", "thorough"], "level has unknown parts 'thorough'"),
        (["--dataset_name", "digits"], "does not fit the embedded digits"),
        (["--image_size", "0"], "image_size=0 must be at least 1"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_made(command, arguments, message, tmp_path, capsys):
    assert join(*command, "--output_dir", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out" / "model").exists()


def test_parts_with_other_classes_and_overwritten_parts_are_refused(command, parts, tmp_path, capsys):
    foreign_models.save("resnet", tmp_path / "other", labels=["ant", "bee", "cow", "dog", "yak"])
    assert join(*command, "--robust", tmp_path / "other", "--output_dir", tmp_path / "out") == 2
    assert "other classes: label 4 is 'elk' and 'yak'" in capsys.readouterr().err
    shutil.copytree(parts / "vit", tmp_path / "run" / "model")
    assert join(*command, "--standard", tmp_path / "run" / "model", "--output_dir", tmp_path / "run") == 2
    assert "would be overwritten" in capsys.readouterr().err
    for place in ("own", "own/model"):
        shutil.copytree(parts / "vit", tmp_path / place, dirs_exist_ok=True)
        assert join(*command, "--output_dir", tmp_path / "own") == 2
        assert "holds a model that hf_dualmoe did not make" in capsys.readouterr().err
        (tmp_path / "own" / "config.json").unlink(missing_ok=True)
    (tmp_path / "own" / "settings.json").write_text('{"data": {}, "model": {}, "training": {}}')  # of a training
    assert join(*command, "--output_dir", tmp_path / "own", "--fresh") == 2
    assert "holds a settings.json that is not of a joined model" in capsys.readouterr().err
