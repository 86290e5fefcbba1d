"""What `evaluate.py` and `certify.py` share: arguments, and default folders in which no two models meet."""

import re
from pathlib import Path

import pytest

from hf_dualmoe.cli.script_arguments import LONGEST_NAME, load_images, output_folder
from training import certify, evaluate


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Folders of models that are easily mixed up, in the current folder and beside it."""
    made = ["here/runs/a/model", "here/runs/b/model", "here/more/a/model", "here/a-b/c", "here/a/b-c", "runs/a/model"]
    made += ["here/model", f"here/{'x' * 100}/{'y' * 100}", f"here/{'z' * 100}/{'y' * 100}"]
    for name in made:
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    return [tmp_path / name for name in made]


def test_every_model_has_a_default_folder_of_its_own(folders):
    hub = [("user/model", "main"), ("user/model", "v2"), ("other/model", "main"), ("model-on-the-hub", "main")]
    found = [output_folder("evaluate", str(folder)) for folder in folders]
    found += [output_folder("evaluate", model, revision) for model, revision in hub]
    assert len({str(path).lower() for path in found}) == len(folders) + len(hub)
    assert output_folder("certify", str(folders[0])) not in found
    for path in found:
        assert path.parent == Path("outputs") and len(path.name) <= LONGEST_NAME + 20
        path.mkdir(parents=True)  # a name that the file system takes


def test_a_model_keeps_its_folder_however_it_is_named(folders, monkeypatch):
    Path("link").symlink_to(folders[0])
    ways = ["runs/a/model", "runs/a/model/", "./runs/../runs/a/model", str(folders[0]), "link"]
    (found,) = {output_folder("evaluate", way) for way in ways}
    assert found.name.startswith("evaluate-a-model-")
    assert found == output_folder("evaluate", "runs/a/model", "v2")  # a local folder has no revisions
    monkeypatch.chdir(folders[0])
    assert output_folder("evaluate", ".").name.startswith("evaluate-model-")


def test_a_project_that_moves_keeps_its_folders(tmp_path, monkeypatch):
    found = []
    for place in ("before", "after"):
        (tmp_path / place / "runs" / "model").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / place)
        found.append(output_folder("evaluate", "runs/model"))
    assert found[0] == found[1]


@pytest.mark.parametrize("script", [evaluate, certify])
def test_both_scripts_read_the_shared_arguments(script):
    args = vars(script.create_parser().parse_args(["--model", "somewhere"]))
    shared = {"model": "somewhere", "revision": "main", "trust_remote_code": False, "dataset_name": "digits"}
    shared |= {"dataset_config_name": None, "image_column": None, "label_column": None, "test_split": None}
    shared |= {"max_test_samples": None, "on_bad_image": "raise", "ignore_class_names": False, "batch_size": 256}
    shared |= {"seed": 0, "output_dir": None, "fresh": False, "disable_tqdm": False}
    assert shared.items() <= args.items()


def test_help_shows_the_defaults_that_say_something(monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    parser = evaluate.create_parser()
    text = parser.format_help()
    assert "Seed of attacks and choices of images. (default: 0)" in text and "(default: 0.1)" in text
    assert not re.search(r"default: (None|False|\[\])", text)
    args = parser.parse_args(["--model", "x"])  # and parsing is left alone
    assert args.write_alpha is False and args.min_sa is None and args.controls == [] and args.seed == 0


def test_labels_of_a_model_without_names_are_said(make_moe, tmp_path, caplog):
    """A folder of classes 0 to 11 is sorted as text: label 2 is then class 10, which nobody would see."""
    arguments = ["--model", "x", "--max_test_samples", "20", "--output_dir", str(tmp_path)]
    args = evaluate.create_parser().parse_args(arguments)
    model = make_moe(num_labels=10, image_size=8, num_channels=1, image_mean=[0.5], image_std=[0.5])
    load_images(args, model)
    assert "labels of the model are read as 0 = '0'; 1 = '1'; 2 = '2'" in caplog.text
    caplog.clear()
    model.config.id2label = {i: str(i) for i in range(10)}
    load_images(args, model)
    assert "read as" not in caplog.text


@pytest.mark.parametrize("place", [".", "train", "out"])
def test_results_do_not_go_among_the_images(place, make_moe, tmp_path):
    arguments = ["--model", "x", "--dataset_name", str(tmp_path), "--output_dir", str(tmp_path / place)]
    with pytest.raises(ValueError, match="output_dir=.* lies in the folder of dataset_name="):
        load_images(evaluate.create_parser().parse_args(arguments), make_moe())
