"""`training/evaluate.py` end to end on tiny saved models: outputs, restart, the dial, refusals, two processes."""

import json
import shutil
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scripts
import torch
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from hf_dualmoe import DualMoEConfig, DualMoEForImageClassification, MoEConfig, MoEForImageClassification
from hf_dualmoe.data.datasets import load_splits
from hf_dualmoe.evaluation.evaluation import RobustnessReport
from hf_dualmoe.hub.model_card import refresh_model_card
from training import evaluate as script

evaluate = partial(scripts.call, script)
DIGITS = {"num_labels": 10, "image_size": 8, "num_channels": 1, "num_experts": 2, "width": [8, 8, 8, 16]}
DIGITS |= {"backbone": "resnet10t"}
NAMES = {"id2label": {i: str(i) for i in range(10)}, "label2id": {str(i): i for i in range(10)}}
QUICK = ("--max_test_samples 21 --eps 0.05 --steps 2 --disable_tqdm --level components,dial --alphas 0 0.5 1").split()
ROUNDING = 1e-4  # in points: shares of 21 images are 4.8 points apart


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a dual model and of a single mixture."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = DualMoEConfig(standard=MoEConfig(**DIGITS), robust=MoEConfig(**DIGITS), alpha=0.6, **NAMES)
    DualMoEForImageClassification(config).save_pretrained(folder / "dual")
    MoEForImageClassification(MoEConfig(**DIGITS, **NAMES)).save_pretrained(folder / "moe")
    return folder


def test_dual_model_end_to_end_and_its_dial_is_written(saved, tmp_path, capsys, caplog):
    config = saved / "dual" / "config.json"
    before = json.loads(config.read_text())
    command = [*QUICK, "--model", saved / "dual", "--output_dir", tmp_path]
    assert evaluate(*command, "--level", "quick", "--sanity_images", 4) == 0
    report = RobustnessReport.load(tmp_path / "results.json")
    assert report.sanity and {p.name for p in tmp_path.iterdir()} == {
        *("results.json", "outcomes.parquet", "measurements", "tradeoff.png", "expert_load.png", "examples.png")
    }
    out = capsys.readouterr().out
    assert report.table() in out and report.notes()[0] in out
    assert report.threat["eps"] == 0.05 and report.dataset["name"] == "digits"
    assert "has no image of" not in caplog.text  # of train, of which an evaluation reads one image
    assert [point["alpha"] for point in report.alpha_sweep] == [0, 0.5, 1]
    assert report.alpha_choice["chosen_on"] == "270 held-out images"  # not the test images
    assert json.loads(config.read_text()) == before

    choices = {point["alpha"]: point["sa"] for point in report.alpha_sweep}
    assert len(set(choices.values())) > 1
    assert evaluate(*command, "--write_alpha", "--min_sa", 0) == 0
    chosen = RobustnessReport.load(tmp_path / "results.json").alpha_choice["alpha"]
    after = json.loads(config.read_text())
    assert chosen != 0.6 and after.pop("alpha") == chosen and before.pop("alpha") == 0.6
    assert after == before
    assert AutoModelForImageClassification.from_pretrained(saved / "dual").config.alpha == chosen
    assert evaluate(*command) == 0  # the turned dial leaves the other measurements finished


def test_single_mixture_with_other_parts(saved, tmp_path, capsys):
    command = [*QUICK, "--model", saved / "moe", "--output_dir", tmp_path, "--level", "component_attacks,eps_curve"]
    assert evaluate(*command) == 0
    report = RobustnessReport.load(tmp_path / "results.json")
    assert "ra_router_pgd2" in report.metrics and report.alpha_sweep == []
    assert {p.name for p in tmp_path.glob("*.png")} == {"eps_curve.png", "expert_load.png", "examples.png"}
    capsys.readouterr()

    assert evaluate(*command, "--steps", 3) == 2
    assert "holds measurements made with other settings" in capsys.readouterr().err
    assert evaluate(*command, "--steps", 3, "--fresh") == 0
    assert "ra_pgd3" in RobustnessReport.load(tmp_path / "results.json").metrics


@pytest.fixture
def foreign(tmp_path):
    """Folders of a ViT that expects normalised images, and of photos in class folders named by what pipeline says."""
    torch.manual_seed(0)
    names = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vit = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **sizes, **names)).eval()
    processor = ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.9] * 3, image_std=[0.1] * 3)
    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)) for i in range(24)]
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        logits = vit(**processor(pictures, return_tensors="pt")).logits
        vit.classifier.bias[1] -= (logits[:, 1] - logits[:, 0]).quantile(0.5)
    vit.save_pretrained(tmp_path / "vit")
    processor.save_pretrained(tmp_path / "vit")
    served = pipeline("image-classification", model=str(tmp_path / "vit"))
    for i, picture in enumerate(pictures):
        path = tmp_path / "photos" / ("train" if i < 2 else "test") / served(picture)[0]["label"] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    for name in "ab":  # whatever pipeline says of the first two
        (tmp_path / "photos" / "train" / name).mkdir(exist_ok=True)
        pictures[0].save(tmp_path / "photos" / "train" / name / "more.png")
    return tmp_path / "vit", tmp_path / "photos"


def test_foreign_model_is_measured_as_it_is_served_and_its_folder_left_alone(foreign, tmp_path, capsys):
    """Its normalisation was left out: pipeline 100 %, evaluate 50 %, and a card was put into its folder."""
    folder, photos = foreign
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    command = [*QUICK[2:], "--model", folder, "--dataset_name", photos, "--level", "components"]
    assert evaluate(*command, "--output_dir", tmp_path / "out") == 0
    report, out = RobustnessReport.load(tmp_path / "out" / "results.json"), capsys.readouterr().out
    assert report.metrics["sa"] == 100 and report.dataset["num_images"] == 22
    assert report.model["kind"] == "ViTForImageClassification"
    assert "No model card" in out and not (tmp_path / "out" / "README.md").exists()
    said = "Cost: at most 2 gradient and 3 forward passes per image on 22 images, about"
    assert 0 <= out.find(said) < out.index(report.table())
    assert evaluate(*command, "--output_dir", folder) == 2
    assert "holds a model that hf_dualmoe did not make" in capsys.readouterr().err
    with pytest.raises(ValueError, match="was not made by hf_dualmoe"):
        refresh_model_card(report, tmp_path / "out", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    identity = ["--image_mean", 0, "--image_std", 1, "--output_dir", tmp_path / "other"]
    assert evaluate(*command, *identity) == 0  # what was measured before
    assert RobustnessReport.load(tmp_path / "other" / "results.json").metrics["sa"] < 90


def test_a_hardened_model_gets_its_card_and_keeps_what_it_is_compared_with(foreign, tmp_path):
    folder, photos = foreign
    command = [*QUICK[2:], "--model", folder, "--dataset_name", photos, "--level", "components"]
    assert evaluate(*command, "--output_dir", tmp_path / "out") == 0
    report = RobustnessReport.load(tmp_path / "out" / "results.json")
    report.training, report.controls = {"method": "at", "license": "mit"}, {"before hardening": {"sa": 12.5}}
    report.save(folder / "results.json")  # as run.py leaves it
    assert evaluate(*command, "--output_dir", tmp_path / "again") == 0
    card = (folder / "README.md").read_text()
    assert "| before hardening | 12.50 |" in card and "license: mit" in card and "| **this model** | 100.00 |" in card
    other = [*command, "--eps", 0.01, "--output_dir", tmp_path / "other"]
    assert evaluate(*other) == 0 and "before hardening" not in (tmp_path / "other" / "README.md").read_text()


def test_controls_stand_on_the_card_if_they_were_measured_alike(saved, tmp_path, capsys):
    other, folder = tmp_path / "other", tmp_path / "dual"
    assert evaluate(*QUICK, "--model", saved / "moe", "--output_dir", other) == 0
    command = [*QUICK, "--model", saved / "dual", "--output_dir", folder]
    assert evaluate(*command, "--controls", f"one mixture={other}") == 0
    report, control = RobustnessReport.load(folder / "results.json"), RobustnessReport.load(other / "results.json")
    assert report.controls == {"one mixture": control.metrics}
    card = next(path for path in (folder / "README.md", saved / "dual" / "README.md") if path.is_file())
    assert f"| one mixture | {control.metrics['sa']:.2f} |" in card.read_text()
    (tmp_path / "results.json").write_text('{"accuracy": 0.9}')  # of another program
    for changed, reason in (
        (["--controls", f"x={tmp_path}"], "results.json is not a report of hf_dualmoe"),
        (["--controls", str(other)], "must be NAME=FOLDER"),
        (["--controls", f"nowhere={tmp_path / 'nowhere'}"], "must be NAME=FOLDER"),
        (["--controls", f"other={other}", "--eps", "0.06"], "controls='other' was attacked with"),
        (
            ["--controls", f"other={other}", "--max_test_samples", "20"],
            "controls='other' was measured on other images",
        ),
        (["--controls", f"other={other}", "--seed", "1"], "controls='other' was measured on other images"),
    ):
        assert evaluate(*command, *changed) == 2
        assert reason in capsys.readouterr().err


def test_numbers_of_other_images_take_no_place_on_the_card(saved, tmp_path, capsys):
    folder, out = shutil.copytree(saved / "moe", tmp_path / "moe"), tmp_path / "out"
    (folder / "results.json").unlink(missing_ok=True)  # of another test
    command = [*QUICK, "--model", folder, "--level", "components"]
    assert evaluate(*command, "--output_dir", tmp_path / "first") == 0
    assert f"Wrote {folder / 'README.md'}" in capsys.readouterr().out
    report = RobustnessReport.load(folder / "results.json")
    report.controls = {"before hardening": {"sa": 12.5}}
    report.save(folder / "results.json")
    assert evaluate(*command, "--seed", 1, "--output_dir", out) == 0
    said = f"{folder} keeps its results.json and card: this evaluation is of other images. Its own are in {out}.\n"
    assert said in capsys.readouterr().out
    assert RobustnessReport.load(folder / "results.json") == report and (out / "README.md").is_file()
    assert RobustnessReport.load(out / "results.json").controls == {}  # measured on other images too


def test_better_numbers_stay_in_the_own_folder_of_a_model_too(saved, tmp_path, monkeypatch, capsys):
    """The first measurement replaced them, and with them what the training and the controls had said."""
    folder = shutil.copytree(saved / "moe", tmp_path / "moe")
    (folder / "results.json").unlink(missing_ok=True)
    command = [*QUICK, "--model", folder, "--output_dir", folder]
    assert evaluate(*command, "--level", "components,eps_curve") == 0
    report = RobustnessReport.load(folder / "results.json")
    assert "eps_curve" in report.metrics and (folder / "outcomes.parquet").is_file()
    report.training, report.controls = {"method": "rt_er"}, {"before": {"sa": 12.5}}
    report.save(folder / "results.json")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    capsys.readouterr()

    assert evaluate(*command, "--level", "components") == 0
    said = f"{folder} keeps its results.json and card: this evaluation lacks eps_curve. "
    assert f"{said}Its own are in {folder / 'evaluation'}." in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before

    with monkeypatch.context() as patch:
        patch.setattr(script, "save_plots", lambda *_: 1 / 0)  # killed after the last measurement
        with pytest.raises(ZeroDivisionError):
            evaluate(*command, "--level", "components,eps_curve,component_attacks")
    assert {path: path.read_bytes() for path in before} == before
    assert evaluate(*command, "--level", "components,eps_curve,component_attacks") == 0
    taken = RobustnessReport.load(folder / "results.json")
    assert "ra_router_pgd2" in taken.metrics
    assert (taken.training, taken.controls) == (report.training, report.controls)


def test_numbers_of_another_function_do_not_stay(saved, tmp_path, monkeypatch, capsys):
    """A written dial or new weights made the report in the folder, and its card, one of another model."""
    folder, out = shutil.copytree(saved / "dual", tmp_path / "dual"), tmp_path / "out"
    for name in ("results.json", "README.md"):
        (folder / name).unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())  # other tests may have turned its dial
    (folder / "config.json").write_text(json.dumps({**config, "alpha": 0.6, "robust_logit_map": None}))
    command = [*QUICK, "--model", folder, "--alphas", 0.5, 1]
    assert evaluate(*command, "--output_dir", out, "--level", "components,dial,eps_curve") == 0
    assert evaluate(*command, "--output_dir", out, "--write_alpha", "--min_sa", 0) == 0  # says less: the report stays
    chosen = json.loads((folder / "config.json").read_text())["alpha"]
    report = RobustnessReport.load(folder / "results.json")
    assert "eps_curve" in report.metrics and report.model["alpha"] != chosen
    assert f"but the saved dial is at alpha = {chosen:g}" in (folder / "README.md").read_text()
    assert evaluate(*command, "--output_dir", out) == 0
    report = RobustnessReport.load(folder / "results.json")
    assert "eps_curve" not in report.metrics and report.model["alpha"] == chosen

    found = {"robust_logit_map": {"scale": 3.0, "power": 2.0, "clamp": 0.0}, "alpha": chosen, "accepted": True}
    found |= {"gain_sa": 1.0, "gain_ra": -1.0, "num_images": 270}
    monkeypatch.setattr(script, "calibrate_robust_logits", lambda *args, **kwargs: found)
    capsys.readouterr()
    tried = [*command, "--output_dir", tmp_path / "tried", "--level", "components"]
    assert evaluate(*tried, "--calibrate") == 0  # not what is saved
    assert f"this evaluation is at robust_logit_map = {found['robust_logit_map']}" in capsys.readouterr().out
    assert RobustnessReport.load(folder / "results.json") == report
    options = ["--write_calibration", "--level", "components"]
    assert evaluate(*command, "--output_dir", tmp_path / "written", *options) == 0
    taken = RobustnessReport.load(folder / "results.json")
    assert taken.model["robust_logit_map"] == found["robust_logit_map"] and taken.alpha_sweep == []

    model = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    model.save_pretrained(folder)
    weaker = [*command, "--output_dir", tmp_path / "weights", "--level", "component_attacks"]
    assert evaluate(*weaker) == 0
    assert RobustnessReport.load(folder / "results.json").model["weights"] != taken.model["weights"]


def test_files_of_other_programs_are_not_replaced(saved, tmp_path, capsys):
    command = [*QUICK, "--model", saved / "moe", "--output_dir", tmp_path, "--level", "components", "--fresh"]
    for name, content in (
        ("results.json", b'{"accuracy": 0.9}'),
        ("results.json", b"not JSON"),
        ("outcomes.parquet", b"of another program"),
    ):
        (tmp_path / name).write_bytes(content)
        assert evaluate(*command) == 2
        assert f"{tmp_path / name} would be replaced, and hf_dualmoe did not write it" in capsys.readouterr().err
        assert (tmp_path / name).read_bytes() == content and len(list(tmp_path.iterdir())) == 1
        (tmp_path / name).unlink()
    pq.write_table(pa.table({"x": [1]}), tmp_path / "outcomes.parquet")
    assert evaluate(*command) == 2
    assert "it has the columns x; a record has index and label" in capsys.readouterr().err
    (tmp_path / "outcomes.parquet").unlink()
    assert evaluate(*command) == 0 and evaluate(*command) == 0  # its own it may


def test_what_the_evaluation_refuses_is_refused_before_the_calibration(saved, monkeypatch, capsys):
    monkeypatch.setattr(script, "calibrate", lambda *_: pytest.fail("minutes of calibration would be lost"))
    command = [*QUICK, "--model", saved / "dual"]
    for wrong, reason in (
        (["--calibrate", "--level", "ful"], "level has unknown parts 'ful'"),
        (["--calibrate", "--alphas", "2"], "alphas="),
        (["--calibrate", "--max_test_samples", "100000"], "max_test_samples=100000"),
        (["--write_alpha", "--level", "worst_case"], "write_alpha needs the dial to be measured"),
    ):
        assert evaluate(*command, *wrong) == 2
        assert reason in capsys.readouterr().err


def test_models_are_evaluated_in_float32_whatever_they_were_saved_in(saved, tmp_path, monkeypatch):
    half = AutoModelForImageClassification.from_pretrained(saved / "moe").bfloat16()
    half.save_pretrained(tmp_path / "half")
    seen = []
    monkeypatch.setattr(script, "evaluate", lambda args, model, *_, **__: seen.append(model.dtype) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(*QUICK, "--model", tmp_path / "half")
    assert seen == [torch.float32]


def test_two_models_called_model_are_reported_in_folders_of_their_own(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("moe", "dual"):
        shutil.copytree(saved / name, tmp_path / name / "model")
        assert evaluate(*QUICK, "--model", f"{name}/model", "--level", "components", "--max_test_samples", 7) == 0
    found = {path.parent.name: RobustnessReport.load(path) for path in tmp_path.glob("outputs/*/results.json")}
    kinds = {"moe": "mixture of experts", "dual": "dual model"}
    assert {name.split("-")[1]: report.model["kind"] for name, report in found.items()} == kinds


def test_calibration_is_measured_and_written(saved, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(saved / "dual", tmp_path / "model")
    before = json.loads((folder / "config.json").read_text())
    monkeypatch.setattr(script, "calibrate_robust_logits", partial(script.calibrate_robust_logits, ra_share=1e-6))
    command = [*QUICK, "--model", folder, "--level", "dial", "--output_dir", tmp_path / "out"]
    assert evaluate(*command, "--calibrate") == 0
    assert json.loads((folder / "config.json").read_text()) == before
    report = RobustnessReport.load(tmp_path / "out" / "results.json")
    found = report.model["calibration"]
    assert found["num_images"] == 270  # held out, not the test images
    assert report.model["alpha"] == found["alpha"] != 0.6
    assert f"alpha = {found['alpha']:g}, map {found['robust_logit_map']}" in capsys.readouterr().out

    assert evaluate(*command, "--write_calibration") == 0
    after = json.loads((folder / "config.json").read_text())
    assert after == before | {name: found[name] for name in ("alpha", "robust_logit_map")}
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert (model.config.alpha, model.config.robust_logit_map) == (found["alpha"], found["robust_logit_map"])


def test_measured_model_is_the_calibrated_one(saved, tmp_path, monkeypatch):
    """Numbers are those of a model saved with the map and alpha."""
    found = {"robust_logit_map": {"scale": 3.0, "power": 2.0, "clamp": 0.0}, "alpha": 0.55, "accepted": True}
    found |= {"gain_sa": 1.0, "gain_ra": -1.0, "num_images": 270}
    monkeypatch.setattr(script, "calibrate_robust_logits", lambda *args, **kwargs: found)
    command = [*QUICK, "--level", "components"]
    assert evaluate(*command, "--calibrate", "--model", saved / "dual", "--output_dir", tmp_path / "one") == 0
    model = AutoModelForImageClassification.from_pretrained(saved / "dual")
    model.config.robust_logit_map = found["robust_logit_map"]
    model.set_alpha(0.55)
    model.save_pretrained(tmp_path / "model")
    assert evaluate(*command, "--model", tmp_path / "model", "--output_dir", tmp_path / "two") == 0
    one, two = (RobustnessReport.load(tmp_path / name / "results.json") for name in ("one", "two"))
    assert one.model.pop("calibration") == found
    assert one.model == two.model and one.metrics == two.metrics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eps", "8"], "did you mean 8/255"),
        (["--norm", "l2", "--eps", "9"], "eps=9.0 is larger than 8, "),
        (["--eps", "8/0"], "invalid pixel_radius value: '8/0'"),
        (["--max_test_samples", "9999"], "max_test_samples=9999, but the dataset has"),
        (["--level", "thorough"], "level has unknown parts 'thorough'"),
        (["--dataset_name", "./nowhere"], "nowhere"),
        (["--model", "./no-model", "--write_alpha"], "write_alpha needs a local folder"),
        (["--model", "./no-model"], "no-model"),
        (["--min_sa", "50"], "min_sa=50.0 chooses the dial of a dual model"),
        (["--write_alpha"], "write_alpha needs a dual model"),
        (["--calibrate"], "calibrate needs a dual model"),
        (["--model", "./no-model", "--write_calibration"], "write_calibration needs a local folder"),
        (["--write_alpha", "--calibrate"], "write_alpha and calibrate both choose alpha"),
    ],
    ids=str,
)
def test_bad_input_is_refused_without_traceback(saved, arguments, message, tmp_path, capsys):
    assert evaluate(*QUICK, "--model", saved / "moe", "--output_dir", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and "usage:" not in error
    assert not (tmp_path / "out" / "results.json").exists()


def test_digits_are_refused_for_a_model_of_other_images(saved, tmp_path, capsys):
    """A CNN for 3 x 32 x 32 was measured on 1 x 8 x 8: the default of --dataset_name."""
    config = MoEConfig(**DIGITS | {"image_size": 16}, **NAMES)
    MoEForImageClassification(config).save_pretrained(tmp_path / "m")
    assert evaluate(*QUICK, "--model", tmp_path / "m", "--output_dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "image_size=16 does not fit the embedded digits, which are 1 x 8 x 8" in error and "dataset_name" in error


def test_a_lone_test_set_is_measured_as_a_whole(saved, named_digits, tmp_path, capsys):
    folder = named_digits("7", "3")
    for other in ("train", "val"):
        shutil.rmtree(folder / other)
    command = [*QUICK[2:], "--model", saved / "dual", "--dataset_name", folder]
    assert evaluate(*command, "--level", "dial", "--output_dir", tmp_path / "out") == 0
    report = RobustnessReport.load(tmp_path / "out" / "results.json")
    assert report.dataset["num_images"] == 5 and len(report.alpha_sweep) == 3
    capsys.readouterr()
    assert evaluate(*command, "--calibrate", "--output_dir", tmp_path / "other") == 2
    assert "calibrate needs held-out images" in capsys.readouterr().err


def test_a_test_set_of_one_class_needs_its_name_in_the_model(saved, named_digits, tmp_path, capsys):
    folder = named_digits("7")
    for other in ("train", "val"):
        shutil.rmtree(folder / other)
    command = [*QUICK[2:], "--model", saved / "moe", "--dataset_name", folder, "--level", "components"]
    assert evaluate(*command, "--output_dir", tmp_path / "out") == 0
    assert RobustnessReport.load(tmp_path / "out" / "results.json").dataset["num_images"] == 2
    (folder / "test" / "7").rename(folder / "test" / "seven")
    capsys.readouterr()
    assert evaluate(*command, "--output_dir", tmp_path / "other") == 2
    error = capsys.readouterr().err
    assert "2 test images" in error and "'seven'" in error and "train" not in error


@pytest.fixture
def named_digits(tmp_path):
    """A folder of test images of some digits, one folder per name; train has one image of each."""

    def write(*names):
        digits = load_splits("digits").test
        for i, name in enumerate(names):
            rows = (digits.labels == int(name)).nonzero().flatten()[: 3 + i].tolist()
            for split, chosen in (("train", rows[:1]), ("val", rows[:1]), ("test", rows[1:])):
                folder = tmp_path / "images" / split / name
                folder.mkdir(parents=True)
                for row in chosen:
                    Image.fromarray(digits.images[row, 0].numpy()).save(folder / f"{row}.png")
        return tmp_path / "images"

    return write


def test_what_failed_shows_in_the_exit_status(saved, tmp_path):
    command = [*QUICK, "--model", saved / "dual", "--level", "dial", "--output_dir", tmp_path]
    assert evaluate(*command, "--min_ra", 99.9) == 1
    report = RobustnessReport.load(tmp_path / "results.json")
    assert "min_ra=99.9 cannot be reached" in report.failures["recommended alpha"]


def test_some_of_the_classes_are_matched_by_name(saved, named_digits, tmp_path, monkeypatch, caplog):
    seen = []
    monkeypatch.setattr(script, "evaluate", lambda args, model, data, *_, **__: seen.append(data) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate("--model", saved / "moe", "--eps", 0.05, "--dataset_name", named_digits("7", "3"))
    (data,) = seen
    assert sorted(data.test.labels.tolist()) == [3, 3, 7, 7, 7] or sorted(data.test.labels.tolist()) == [3, 3, 3, 7, 7]
    assert data.class_names == [str(i) for i in range(10)] and data.name.endswith("images (2 of 10 classes)")
    assert "has 2 of 10 classes of the model, matched by name: 3; 7" in caplog.text


def test_classes_that_the_model_does_not_have_are_refused(saved, named_digits, capsys, monkeypatch):
    folder = named_digits("7", "3")
    for split in folder.iterdir():
        (split / "3").rename(split / "three")
    assert evaluate("--model", saved / "moe", "--eps", 0.05, "--dataset_name", folder) == 2
    error = capsys.readouterr().err
    assert "dataset has 2 classes (7, three) but the model has 10 (0, 1, 2, 3, ...)" in error
    assert "1 of the dataset's are not among them: three" in error


@pytest.mark.slow  # `test_distributed.py` has a fast one of run.py
def test_two_processes_find_what_one_does(saved, tmp_path):
    """21 images: 11 and 10."""
    level = "components,dial,component_attacks,eps_curve,worst_case,autoattack,sanity"
    options = [*QUICK, "--model", saved / "dual", "--level", level, "--autoattack_version", "fast"]
    options += ["--sanity_images", 4]
    result = scripts.launch(script.__file__, *options, "--output_dir", tmp_path / "two")
    assert scripts.output_of(result).count("Saved to") == 1
    assert evaluate(*options, "--output_dir", tmp_path / "one") == 0
    one, two = (RobustnessReport.load(tmp_path / name / "results.json") for name in ("one", "two"))
    assert (one.environment["processes"], two.environment["processes"]) == (1, 2)
    assert flat(one.metrics).keys() >= {"ra_autoattack", "worst_case.members.route", "route_flip_rate"}
    for name in ("metrics", "alpha_sweep", "alpha_choice", "threat", "dataset", "failures"):
        assert flat(getattr(two, name)) == pytest.approx(flat(getattr(one, name)), abs=ROUNDING), name
    assert {n: check["passed"] for n, check in two.sanity.items()} == {
        n: check["passed"] for n, check in one.sanity.items()
    }
    same = [name for name in one.cost if not name.startswith(("AutoAttack", "total"))]  # its probes run on each
    for name in same:
        for kind in ("forward", "gradient"):
            assert two.cost[name][kind] == pytest.approx(one.cost[name][kind]), name
    assert one.cost.keys() == two.cost.keys()
    records = [pq.read_table(tmp_path / name / "outcomes.parquet") for name in ("one", "two")]
    assert records[1].equals(records[0]) and len(records[0]) == one.dataset["num_images"]


def flat(value, prefix=""):
    """Nested dictionaries and lists as one dictionary: {"a": [1]} -> {"a.0": 1}."""
    if not isinstance(value, (dict, list)):
        return {prefix.rstrip("."): value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for name, inner in items for k, v in flat(inner, f"{prefix}{name}.").items()}
