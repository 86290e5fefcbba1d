"""`run.py --model_name_or_path`: any classifier is hardened, saved as what it is, and measured before and after."""

import json
import shutil

import foreign_models
import numpy as np
import pytest
import scripts
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

from hf_dualmoe.cli import hardening
from hf_dualmoe.evaluation.evaluation import RobustnessReport
from hf_dualmoe.models.loading import NormalizedClassifier, load_classifier
from training import run as script

CLASSES = ["ant", "bee", "cow", "dog", "elk"]
SPELLED = ["Elk", "dog", "cow", "bee, honey bee", "ant"]  # the same, in another order
QUICK = (
    "--num_train_epochs 1 --per_device_train_batch_size 16 --eval_attack_steps 1 --eval_strategy epoch "
    "--crop_padding 0 --disable_tqdm true --learning_rate 0.01"
).split()


def run(*arguments):
    assert scripts.call(script, *arguments) == 0


@pytest.fixture
def refused(capsys):
    """refused(*arguments): what the script says where it refuses them."""

    def call(*arguments):
        assert scripts.call(script, *arguments) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    return call


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of noisy pictures, the colour of each class its own: 4 to train on and 2 to test with of each."""
    root, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        for i in range(6):
            noise = generator.integers(0, 128, (32, 32, 3))
            noise[..., label % 3] += 60 * (1 + label // 3)
            path = root / ("test" if i >= 4 else "train") / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(kind, labels): the folder of a tiny classifier."""
    made = {}

    def save(kind, labels=SPELLED):
        key = (kind, tuple(labels))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("start") / kind.replace(" ", "-")
            foreign_models.save(kind, made[key], labels=labels)
        return made[key]

    return save


def served_accuracy(folder, photos, name_of):
    """% of the test pictures that transformers' pipeline puts into the class of their folder."""
    served = pipeline("image-classification", model=str(folder))
    pictures = sorted((photos / "test").glob("*/*.png"))
    right = [served(str(path))[0]["label"] == name_of[path.parent.name] for path in pictures]
    return 100 * sum(right) / len(right)


def test_a_strangers_model_is_hardened_and_served_by_transformers_alone(start, photos, tmp_path, capsys):
    origin = start("resnet")
    command = [*QUICK, "--model_name_or_path", origin, "--dataset_name", photos, "--output_dir", tmp_path / "out"]
    command += ["--ema_decay", 0.5]
    before = {path.name: path.read_bytes() for path in origin.iterdir()}
    run(*command)
    folder, spelled = tmp_path / "out" / "model", dict(zip(CLASSES, SPELLED[::-1], strict=True))
    out = capsys.readouterr().out
    assert f"{origin} keeps its head: all 5 classes of the data are among its 5, by name." in out
    assert {path.name: path.read_bytes() for path in origin.iterdir()} == before

    assert not list(folder.glob("*.py")) and "auto_map" not in (folder / "config.json").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert config == json.loads(before["config.json"])
    assert type(AutoModelForImageClassification.from_pretrained(folder)) is type(load_classifier(folder).network)
    report = RobustnessReport.load(folder / "results.json")
    assert report.metrics["sa"] == pytest.approx(served_accuracy(folder, photos, spelled))
    earlier = report.controls[hardening.BEFORE]
    assert earlier["sa"] == pytest.approx(served_accuracy(origin, photos, spelled))
    assert earlier.keys() >= {"sa", "ra_pgd20"} and report.metrics.keys() >= {"sa", "ra_pgd20"}
    assert report.training["method"] == "at" and report.training["started_from"] == origin.name
    assert report.training["saved_weights"] and report.training["license"] == "other"
    card = (folder / "README.md").read_text()
    assert f"| before hardening | {earlier['sa']:.2f} | {earlier['ra_pgd20']:.2f} |" in card
    assert "license: other" in card and "trust_remote_code" not in card and "# in [0, 1]" not in card
    changed = load_classifier(folder).network.state_dict()
    assert any(not torch.equal(changed[n], v) for n, v in load_classifier(origin).network.state_dict().items())

    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "before" / "measurements").glob("*.saf*")}
    run(*command)  # a finished run measures nothing before it again
    assert stamps and all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    again = RobustnessReport.load(folder / "results.json")
    assert (again.metrics["sa"], again.controls) == (report.metrics["sa"], report.controls)


def test_other_classes_get_a_new_head(start, photos, tmp_path, capsys):
    labels = ["ant", "bee", "cow", "dog", "zebra"]
    command = [*QUICK, "--model_name_or_path", start("convnext", labels), "--dataset_name", photos]
    run(*command, "--output_dir", tmp_path, "--method", "trades")
    assert "gets a new head: 1 of the 5 classes of the data are not among its 5 (elk)." in capsys.readouterr().out
    saved = load_classifier(tmp_path / "model")
    assert list(saved.config.id2label.values()) == CLASSES
    report = RobustnessReport.load(tmp_path / "model" / "results.json")
    assert report.controls == {} and not (tmp_path / "before").exists()  # a new head knows nothing before


def test_a_subset_of_the_classes_keeps_the_whole_head(start, photos, tmp_path):
    few = tmp_path / "few"
    for path in [*photos.glob("*/bee"), *photos.glob("*/elk")]:
        shutil.copytree(path, few / path.relative_to(photos))
    command = [*QUICK, "--model_name_or_path", start("resnet"), "--dataset_name", few, "--report", "none"]
    run(*command, "--output_dir", tmp_path / "out")
    assert list(load_classifier(tmp_path / "out" / "model").config.id2label.values()) == SPELLED
    assert not (tmp_path / "out" / "before").exists()  # nothing is compared without a report


def test_classes_without_names_take_those_of_the_data(start, photos, tmp_path, capsys):
    generic = [f"LABEL_{i}" for i in range(5)]
    command = [*QUICK, "--model_name_or_path", start("resnet", generic), "--dataset_name", photos, "--report", "none"]
    run(*command, "--output_dir", tmp_path, "--learning_rate", 0)
    assert "take those of the data, in order: 0 = 'ant'; 1 = 'bee'" in capsys.readouterr().out
    saved = load_classifier(tmp_path / "model")
    assert list(saved.config.id2label.values()) == CLASSES
    weights = load_classifier(start("resnet", generic)).network.state_dict()
    assert torch.equal(saved.network.classifier[1].weight, weights["classifier.1.weight"])


def test_other_names_in_the_same_order_keep_the_head(start, photos, tmp_path, capsys):
    command = [*QUICK, "--model_name_or_path", start("resnet", list("abcde")), "--dataset_name", photos]
    command += ["--report", "none", "--output_dir", tmp_path, "--learning_rate", 0, "--ignore_class_names"]
    run(*command)
    assert "keeps its head: its 5 classes are those of the data, in order" in capsys.readouterr().out
    assert list(load_classifier(tmp_path / "model").config.id2label.values()) == list("abcde")
    shutil.copytree(photos, tmp_path / "few")
    for split in ("train", "test"):
        shutil.rmtree(tmp_path / "few" / split / "elk")
    command += ["--dataset_name", tmp_path / "few", "--output_dir", tmp_path / "other"]
    assert scripts.call(script, *command) == 2
    assert "the data have 4 classes (ant, bee, cow, dog) and the model 5" in capsys.readouterr().err


def test_a_run_that_stopped_goes_on_as_if_it_had_not(start, photos, tmp_path):
    command = [*QUICK, "--model_name_or_path", start("resnet"), "--dataset_name", photos, "--report", "none"]
    command += ["--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2, "--eval_strategy", "steps"]
    command += ["--eval_steps", 2, "--ema_decay", 0.5, "--output_dir", tmp_path]
    run(*command)
    whole = load_classifier(tmp_path / "model").network.state_dict()
    for folder in ("checkpoint-4", "model"):
        shutil.rmtree(tmp_path / folder)
    run(*command)
    again = load_classifier(tmp_path / "model").network.state_dict()
    assert (tmp_path / "checkpoint-4").is_dir() and all(torch.equal(again[n], v) for n, v in whole.items())


def test_the_time_is_estimated_and_nothing_is_written(start, photos, tmp_path, capsys):
    command = [*QUICK, "--model_name_or_path", start("resnet"), "--dataset_name", photos]
    run(*command, "--output_dir", tmp_path / "out", "--estimate_time")
    assert "Time of the whole run, 2 steps" in capsys.readouterr().out
    assert not list((tmp_path / "out").iterdir())  # the Trainer makes the folder


def test_a_mixture_of_ours_is_hardened_as_what_it_is(make_moe, photos, tmp_path):
    moe = make_moe(num_labels=5, image_size=32)
    moe.save_pretrained(tmp_path / "moe")
    command = [*QUICK, "--model_name_or_path", tmp_path / "moe", "--dataset_name", photos, "--report", "none"]
    run(*command, "--output_dir", tmp_path / "out")
    saved = load_classifier(tmp_path / "out" / "model")
    assert not isinstance(saved, NormalizedClassifier) and len(saved.experts) == len(moe.experts)
    assert list(saved.config.id2label.values()) == CLASSES


def test_activations_can_be_recomputed(start, photos, tmp_path):
    command = [*QUICK, "--model_name_or_path", start("vit"), "--dataset_name", photos, "--report", "none"]
    run(*command, "--output_dir", tmp_path, "--gradient_checkpointing", "--max_steps", 1)
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "rt_er"], "trains a mixture of experts. Give --method at or trades"),
        (["--method", "jtdmoe"], "then join the hardened model and its start: hf-dualmoe join"),
        (["--method", "certified"], "needs 1-Lipschitz backbones"),
        (["--backbone", "resnet34"], "has its own architecture, but backbone='resnet34' would describe a new network"),
        (["--recipe", "own_images", "--method", "at"], "would describe a new network"),
        (["--choose_alpha"], "choose_alpha needs the dual model"),
        (["--eps", "0.3"], "eps=0.3 counts in pixels: it is 76/255"),
        (["--image_size", "48"], "the image processor of"),
        (["--dataset_name", "digits"], "does not fit the embedded digits"),
        (["--model_name_or_path", "./nowhere"], "model='./nowhere': there is no such folder"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_with_what_to_do(refused, start, photos, arguments, message, tmp_path):
    command = [*QUICK, "--model_name_or_path", start("resnet"), "--dataset_name", photos]
    assert message in refused(*command, "--output_dir", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_arguments_of_a_trained_model_need_one(refused, tmp_path):
    assert "image_mean=[0.5] is for a trained model" in refused("--image_mean", 0.5, "--output_dir", tmp_path / "out")


@pytest.mark.parametrize("place", ["out", "out/model", "out/checkpoint-7"])
def test_a_model_is_not_overwritten_by_its_hardened_self(refused, start, photos, place, tmp_path):
    folder = tmp_path / place
    shutil.copytree(start("resnet"), folder)
    command = [*QUICK, "--model_name_or_path", folder, "--dataset_name", photos, "--output_dir", tmp_path / "out"]
    for more in ([], ["--fresh"]):
        assert "hoose another" in refused(*command, *more)
    (tmp_path / "out" / "settings.json").write_text(json.dumps(recorded_for(*map(str, command))))  # of a run of ours
    assert "would be overwritten by a run in output_dir=" in refused(*command, "--fresh")
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["model.safetensors"]


def test_results_do_not_go_among_the_images(refused, start, photos, tmp_path):
    command = [*QUICK, "--model_name_or_path", start("resnet"), "--dataset_name", photos]
    for place in (photos, photos / "train" / "out"):
        assert "lies in the folder of dataset_name=" in refused(*command, "--output_dir", place)
    assert {path.name for path in photos.iterdir()} == {"train", "test"}


def test_a_model_of_somebody_else_is_not_overwritten(refused, start, photos, tmp_path):
    shutil.copytree(start("vit"), tmp_path / "out" / "model")
    command = [*QUICK, "--model_name_or_path", start("resnet"), "--dataset_name", photos]
    assert "holds a model that hf_dualmoe did not make" in refused(*command, "--output_dir", tmp_path / "out")


def recorded_for(*arguments):
    """The settings that a run with these arguments records."""
    return script.settings_of(*script.RecipeParser(script.RECIPES, description="").parse([*arguments])[:3])


def test_settings_of_a_new_network_do_not_stop_an_old_run():
    """What is recorded of a run says nothing of the other kind of model."""
    new, trained = recorded_for(), recorded_for("--model_name_or_path", "user/model")
    assert "model_name_or_path" not in new["model"] and "backbone" in new["model"]
    assert set(trained["model"]) == {*hardening.OF_A_TRAINED_MODEL, "image_size"}


@pytest.mark.parametrize(
    ("option", "value"),
    [("seed", 1), ("data_seed", 1), ("learning_rate", 0.5), ("beta", 2), ("num_experts", 2), ("max_train_samples", 9)],
    ids=str,
)
def test_what_makes_two_runs_differ_is_recorded(option, value):
    """Or a run could be gone on with as another."""
    assert recorded_for(f"--{option}", str(value)) != recorded_for()
