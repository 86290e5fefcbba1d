"""What `evaluate.py` and `certify.py` share: arguments, and default folders in which no two models meet."""

import re
from pathlib import Path

import pytest
import scripts
import torch
from PIL import Image

from hf_dualmoe.cli import script_arguments
from hf_dualmoe.cli.evaluating import settle_eps
from hf_dualmoe.cli.script_arguments import (
    LONGEST_NAME,
    create_accelerator,
    load_images,
    output_folder,
    recorded_cut,
)
from hf_dualmoe.data.datasets import load_splits
from hf_dualmoe.evaluation.report import RobustnessReport
from training import certify, evaluate, join


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
    shared |= dict.fromkeys(("split_seed", "validation_fraction", "train_split", "validation_split"))
    assert shared.items() <= args.items()


def test_help_shows_the_defaults_that_say_something(monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    parser = evaluate.create_parser()
    text = parser.format_help()
    assert "Seed of attacks and choices of images. (default: 0)" in text
    assert "results.json records it, else 0.1." in text
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


@pytest.fixture(scope="module")
def only_train(tmp_path_factory):
    """A folder of 60 images in two classes, without splits."""
    root = tmp_path_factory.mktemp("images")
    for i in range(60):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.new("L", (8, 8), 4 * i).save(root / "ab"[i % 2] / f"{i}.png")
    return root


@pytest.fixture
def trained(tmp_path):
    """trained(name, **fields): folder of a model whose report has these fields."""

    def write(name, **fields):
        RobustnessReport(model={}, dataset={}, threat={}, **fields).save(tmp_path / name / "results.json")
        return str(tmp_path / name)

    return write


SCRIPTS = {"evaluate": evaluate, "certify": certify, "join": join}


@pytest.mark.parametrize("name", SCRIPTS)
def test_test_images_are_those_that_the_training_held_out(name, only_train, trained, make_moe, tmp_path, caplog):
    """certify cut them with seed 0 where trainings use 42: most of its test images were trained on."""
    model = make_moe(num_labels=2, image_size=8, num_channels=1, image_mean=[0.5], image_std=[0.5])
    folder, none = trained("seven", seeds={"training": 7}), str(tmp_path / "none")
    required = ["--standard", "x", "--robust", "y"] if name == "join" else ["--model", "x"]
    command = [*required, "--dataset_name", str(only_train), "--output_dir", str(tmp_path / "out"), "--disable_tqdm"]

    def rows(*options, model_folders):
        caplog.clear()
        args = SCRIPTS[name].create_parser().parse_args([*command, *options])
        return load_images(
            args, model, dict.fromkeys(model_folders, "main"), dial=name != "certify"
        ).test.rows.tolist()

    def held_out(seed, fraction=0.1):
        return load_splits(str(only_train), seed=seed, validation_fraction=fraction).test.rows.tolist()

    assert rows(model_folders=[none]) == held_out(42) and "split_seed" not in caplog.text
    assert rows(model_folders=[folder]) == held_out(7) != held_out(42)
    assert f"split_seed=7, as in the training of {folder}" in caplog.text
    assert rows("--split_seed", "7", model_folders=[folder]) == held_out(7) and "split_seed" not in caplog.text
    assert rows("--split_seed", "3", "--validation_fraction", "0.2", model_folders=[none, folder]) == held_out(3, 0.2)
    assert f"split_seed=3, but the training of {folder} had 7" in caplog.text
    assert "may be images that this model was trained on" in caplog.text and "Leave --split_seed out" in caplog.text
    other = trained("other", seeds={"training": 3}, training={"validation_fraction": 0.3})
    assert rows(model_folders=[other, folder]) == held_out(3, 0.3)  # parts of a joined model that disagree
    assert f"split_seed=3, but the training of {folder} had 7" in caplog.text


def test_a_seed_recorded_on_the_hub_counts_too(trained, tmp_path, monkeypatch):
    folder, asked = trained("seven", seeds={"training": 7}), []
    there = str(Path(folder, "results.json"))
    monkeypatch.setattr(
        script_arguments, "hf_hub_download", lambda *a, revision: asked.append((*a, revision)) or there
    )
    assert recorded_cut("user/model", "v2") == {"split_seed": 7}
    assert asked == [("user/model", "results.json", "v2")]
    Path(there).write_text('{"accuracy": 0.9}')  # of another program
    assert recorded_cut("user/model", "v2") == {} and recorded_cut(folder) == {}


def test_nothing_is_said_of_the_seed_where_no_split_is_cut_from_train(trained, make_moe, tmp_path, caplog):
    model = make_moe(num_labels=10, image_size=8, num_channels=1, image_mean=[0.5], image_std=[0.5])
    arguments = ["--model", "x", "--output_dir", str(tmp_path / "out"), "--split_seed", "3"]
    folder = trained("seven", seeds={"training": 7})
    assert load_images(evaluate.create_parser().parse_args(arguments), model, {folder: "main"}).held_out == ()
    assert "split_seed" not in caplog.text


@pytest.mark.parametrize("script", [evaluate, join], ids=["evaluate", "join"])
def test_eps_is_that_of_the_training(script, tmp_path, caplog):
    """With 8/255 for all, a model of another eps was measured, and its dial chosen, at the wrong one."""
    threat = {"eps": 0.15, "norm": "linf"}
    RobustnessReport(model={}, dataset={}, threat=threat).save(tmp_path / "ours" / "results.json")
    required = ["--standard", "x", "--robust", "y"] if script is join else ["--model", "x"]

    def eps(folder, *options):
        caplog.clear()
        args = script.create_parser().parse_args([*required, *options])
        settle_eps(args, str(tmp_path / folder))
        return args.eps

    assert eps("ours") == 0.15 and "eps=0.15 (38.25/255), as in the report beside" in caplog.text
    assert eps("ours", "--eps", "4/255") == 4 / 255 and not caplog.text
    assert (
        eps("ours", "--norm", "l2") == eps("none") == 8 / 255 and "no report beside the model has one" in caplog.text
    )


def test_more_validation_images_than_the_training_held_out_are_warned_of(only_train, trained, make_moe, caplog):
    model = make_moe(num_labels=2, image_size=8, num_channels=1, image_mean=[0.5], image_std=[0.5])
    arguments = ["--model", "x", "--dataset_name", str(only_train), "--output_dir", "elsewhere", "--disable_tqdm"]
    for count, warned in ((2, True), (6, False)):
        caplog.clear()
        folder = trained(f"{count}", training={"selected_on": f"{count} images held out of train"})
        load_images(evaluate.create_parser().parse_args(arguments), model, {folder: "main"})
        assert (f"the training of {folder} held out {count}" in caplog.text) == warned


@pytest.mark.slow  # `test_apple_gpus_are_left_alone` looks at what is asked for
def test_processes_wait_for_the_slowest(tmp_path):
    """The default gives up after 10 or 30 minutes: whoever was done first ended the evaluation."""
    script = tmp_path / "script.py"
    text = "import torch.distributed as d\nfrom hf_dualmoe.cli.script_arguments import create_accelerator\n"
    text += "accelerator = create_accelerator()\nbackend = d.group.WORLD._get_backend(accelerator.device)\n"
    text += "accelerator.print('DAYS', backend.options._timeout.days)\naccelerator.end_training()\n"
    script.write_text(text)
    assert "DAYS 30" in scripts.output_of(scripts.launch(script))


@pytest.mark.parametrize(("kind", "on_cpu"), [(None, True), ("mps", True), ("cuda", False)])
def test_apple_gpus_are_left_alone(kind, on_cpu, monkeypatch):
    seen, said = {}, []

    class Recorder:
        def __init__(self, **options):
            seen.update(options)

        def print(self, *texts, **_):
            said.extend(texts)

    monkeypatch.setattr(script_arguments, "Accelerator", Recorder)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    create_accelerator()
    assert seen["cpu"] is on_cpu and seen["kwargs_handlers"][0].timeout.days == 30
    why = "Apple GPUs have no double precision, which the evaluation needs: it runs on the CPU."
    assert said == ([why] if kind == "mps" else [])
