"""`training/run.py` end to end on a shrunken model: outputs, going on after an interruption, refusals."""

import json
from functools import partial

import pytest
import scripts
import torch
from PIL import Image
from transformers import AutoModelForImageClassification

from hf_dualmoe.cli import run_record
from hf_dualmoe.cli.run_record import restart_text
from hf_dualmoe.evaluation.evaluation import RobustnessReport
from hf_dualmoe.hub.upload_plan import TOKEN
from training import run as script

QUICK = (
    "--max_train_samples 64 --max_validation_samples 20 --max_test_samples 10 --num_experts 2 --router_top_k 1 "
    "--backbone resnet10t --width 8,8,8,16 --training_attack pgd --eval_strategy epoch --save_strategy epoch "
    "--second_term ce --attack_steps 1 --eval_attack_steps 1 --num_train_epochs 2 --per_device_train_batch_size 32 "
    "--disable_tqdm true"
).split()


def run(*arguments):
    assert scripts.call(script, *arguments) == 0


def all_bytes(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_run_trains_reports_and_saves(tmp_path, capsys, monkeypatch):
    tokens = ["hf_" + letter * 34 for letter in "AB"]  # made up
    assert all(TOKEN.fullmatch(token) for token in tokens)
    monkeypatch.setenv("HF_TOKEN", tokens[0])
    monkeypatch.setattr(script, "dial_attack", partial(script.dial_attack, steps=1))
    quick = partial(script.evaluate_robustness, steps=1, sanity_images=2)
    monkeypatch.setattr(script, "evaluate_robustness", quick)
    command = [*QUICK, "--output_dir", tmp_path, "--ema_decay", 0.9, "--hub_token", tokens[1], "--choose_alpha"]
    run(*command, "--min_ra", 99.9)
    folder = tmp_path / "model"
    files = {path.name for path in folder.iterdir()}
    assert files >= {
        *("config.json", "model.safetensors", "preprocessor_config.json", "results.json", "tradeoff.png"),
        *("README.md", "expert_load.png"),
        *("modeling_dualmoe.py", "merging_dualmoe.py", "configuration_dualmoe.py"),
    }
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    report = RobustnessReport.load(folder / "results.json")
    assert [point["alpha"] for point in report.alpha_sweep] == [0.0, 0.5, 0.75, 0.9, 1.0]
    names = [str(i) for i in range(10)]
    assert report.dataset.pop("digest")
    assert report.dataset == {"name": "digits", "num_images": 10, "class_names": names}
    assert report.threat["eps"] == 0.15 and report.environment["packages"]["torch"]
    assert report.training["method"] == "jtdmoe" and report.training["num_images"] == 64
    assert report.alpha_choice["chosen_on"] == "20 held-out images"
    assert report.training["saved_weights"] in ("moving average", "trained (the average was worse)")
    printed = "".join(capsys.readouterr())
    assert report.table() in printed
    assert "The dial stays at alpha = 0.9: min_ra=99.9 cannot be reached" in printed
    assert any(tmp_path.rglob("training_args.bin")) and any(tmp_path.rglob("trainer_state.json"))
    assert not any(token in printed or token.encode() in all_bytes(tmp_path) for token in tokens)

    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.config.alpha == report.model["alpha"] == 0.9 and not model.training
    with torch.no_grad():
        assert model(torch.rand(3, 1, 8, 8)).logits.shape == (3, 10)

    # the same command again goes on from the last checkpoint: nothing is left to train, the model stays the same, and
    # so does what was chosen and measured since
    config = json.loads((folder / "config.json").read_text()) | {"alpha": 0.4, "robust_logit_map": {"scale": 2.0}}
    (folder / "config.json").write_text(json.dumps(config))
    better = {**report.metrics, "ra_autoattack": 12.5}
    RobustnessReport(**{**vars(report), "metrics": better}).save(folder / "results.json")
    (folder / "examples.png").write_bytes(b"drawn by an evaluation")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run(*command, "--step_graph", "off")  # how steps are launched is free
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert f"The run had finished, and {folder} has its weights" in capsys.readouterr().out

    # without its report, as where it was killed: that alone is made, from the measurements that were finished
    (folder / "results.json").unlink()
    run(*command, "--report", "quick")
    again = AutoModelForImageClassification.from_pretrained(folder)
    report_again = RobustnessReport.load(folder / "results.json")
    assert all(torch.equal(v, again.state_dict()[name]) for name, v in model.state_dict().items())
    assert again.config.alpha == report_again.model["alpha"] == report_again.alpha_choice["alpha"]
    assert again.config.robust_logit_map == config["robust_logit_map"]
    assert report_again.alpha_choice["chosen_on"] == "20 images held out of train"
    seconds = [found.training["train_runtime_s"] for found in (report, report_again)]
    assert seconds[1] > 0.5 * seconds[0]  # not that of the last start alone

    for other in (["--beta", "2"], ["--warmup_steps", "3"], ["--max_grad_norm", "0.1"], ["--bf16", "true"]):
        assert scripts.call(script, *command, *other) == 2  # other settings must not continue it
        assert f"holds a run with other settings ({other[0][2:]}: " in capsys.readouterr().err


def test_a_mixture_by_flag_and_anew(tmp_path):
    command = [*QUICK, "--output_dir", tmp_path, "--method", "rt_er", "--num_train_epochs", 1]
    run(*command)
    results = json.loads((tmp_path / "model" / "results.json").read_text())
    assert results["model"]["kind"] == "mixture of experts"
    assert results["training"]["method"] == "rt_er"
    assert results["metrics"]["ra_pgd20"] <= results["metrics"]["sa"]
    run(*command, "--beta", "2", "--fresh", "--report", "none")
    assert json.loads((tmp_path / "settings.json").read_text())["training"]["beta"] == 2
    assert not (tmp_path / "model" / "results.json").exists()  # of earlier weights


SMALL = [*QUICK, "--method", "standard", "--num_experts", 1, "--num_train_epochs", 1, "--report", "none"]


def test_a_finished_run_goes_on_for_more_epochs(tmp_path, capsys):
    run(*SMALL, "--output_dir", tmp_path, "--logging_steps", 1)
    assert "Going on" not in capsys.readouterr().out
    longer = [*SMALL, "--num_train_epochs", 3, "--output_dir", tmp_path, "--logging_steps", 1]
    run(*longer)
    out = capsys.readouterr().out
    assert (
        "Going on for longer (num_train_epochs 1.0 -> 3.0) from" in out and "checkpoint-2. The schedule of the" in out
    )
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    rates = {entry["step"]: entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry}
    assert state["global_step"] == state["max_steps"] == 6
    assert rates[3] == 0 and 0.006 < rates[4] < rates[2] == 0.01  # as the message says: of two steps, then of six
    recorded = json.loads((tmp_path / "settings.json").read_text())
    assert recorded["shorter_before"] == [{"num_train_epochs": 1.0}]
    run(*longer)  # and a restart of the longer run is the same run
    out = capsys.readouterr().out
    assert "Going on" not in out and f"The run in {tmp_path} has taken all of its 6 steps" in out
    assert json.loads((tmp_path / "settings.json").read_text()) == recorded


def test_a_killed_report_goes_on_from_its_measurements(tmp_path, capsys, monkeypatch):
    """AutoAttack takes hours. Its arguments are those of the training: batches, and no bars where none are wanted."""
    given = []
    measure = script.evaluate_robustness

    def record(*args, **options):
        given.append(options)
        return measure(*args, **options, steps=1, sanity_images=2)

    class Killed(BaseException):
        pass

    def dies(*args):
        raise Killed

    command = [*SMALL, "--report", "quick", "--output_dir", tmp_path, "--per_device_eval_batch_size", 7]
    command += ["--load_best_model_at_end", False]
    monkeypatch.setattr(script, "evaluate_robustness", record)
    monkeypatch.setattr(script, "training_facts", dies)
    with pytest.raises(Killed):
        run(*command)
    kept = tmp_path / "report-measurements"
    stamps = {path: path.stat().st_mtime_ns for path in kept.glob("*.safetensors")}
    assert stamps and given[-1]["batch_size"] == 7 and given[-1]["progress"] is False
    assert given[-1]["resume_dir"] == kept and not given[-1]["fresh"]
    monkeypatch.undo()
    monkeypatch.setattr(script, "evaluate_robustness", record)
    run(*command)
    assert {path: path.stat().st_mtime_ns for path in kept.glob("*.safetensors")} == stamps
    report = RobustnessReport.load(tmp_path / "model" / "results.json")
    assert report.training["method"] == "standard" and json.loads((tmp_path / "settings.json").read_text())["finished"]
    run(*command, "--num_train_epochs", 2)  # other weights: measured anew
    assert given[-1]["fresh"] and RobustnessReport.load(tmp_path / "model" / "results.json").training["steps"] == 4


def test_a_start_says_from_where_it_goes_on(tmp_path):
    assert restart_text(tmp_path, None, 6) == ""
    text = restart_text(tmp_path, str(tmp_path / "checkpoint-4"), 6)
    assert text == f"Going on from step 4 of 6, {tmp_path / 'checkpoint-4'}."


def test_a_run_does_not_go_on_after_class_folders_were_renamed(tmp_path, capsys):
    """Labels are swapped then: SA was 91.7 before and 0 after, without a word."""
    for i, name in enumerate(("cat", "dog")):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for n in range(12):
            Image.new("RGB", (8, 8), (100 * i + 5 * n, 40, 90)).save(folder / f"{n}.png")
    own = ["--dataset_name", tmp_path / "images", "--image_size", 8, "--max_train_samples", 12]
    own += ["--max_validation_samples", 2, "--max_test_samples", 2, "--output_dir", tmp_path / "out"]
    run(*SMALL, *own)
    (tmp_path / "images" / "cat").rename(tmp_path / "images" / "zebra")
    assert scripts.call(script, *SMALL, *own) == 2
    error = capsys.readouterr().err
    assert "holds a run on other data: images, labels or names of classes have changed since" in error
    run(*SMALL, *own, "--fresh")


def test_run_upcycles_a_single_network(tmp_path):
    single = ["--method", "at", "--num_experts", 1, "--num_train_epochs", 1, "--report", "none"]
    run(*QUICK, "--output_dir", tmp_path / "one", *single)
    source = tmp_path / "one" / "model"
    options = ["--init_experts_from", source, "--num_train_epochs", 1, "--learning_rate", 0, "--save_strategy", "no"]
    options += ["--eval_strategy", "no", "--load_best_model_at_end", False]
    run(*QUICK, "--report", "none", "--output_dir", tmp_path / "four", *options)
    one = AutoModelForImageClassification.from_pretrained(source)
    dual = AutoModelForImageClassification.from_pretrained(tmp_path / "four" / "model")
    for expert in (*dual.standard.experts, *dual.robust.experts):
        assert torch.equal(expert.fc.weight, one.experts[0].fc.weight)


def test_run_refuses_a_report_without_a_radius_before_training(tmp_path, capsys):
    options = ["--method", "standard", "--eps", 0, "--report", "standard"]
    assert scripts.call(script, *QUICK, "--output_dir", tmp_path / "out", *options) == 2
    assert "eps=0 leaves nothing to check" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_run_refuses_weights_that_are_not_there(tmp_path, capsys):
    options = ["--output_dir", tmp_path / "out", "--init_experts_from", "outputs/nowhere/model"]
    assert scripts.call(script, *QUICK, *options) == 2
    assert "init_experts_from='outputs/nowhere/model': expected a folder with a model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_run_leaves_the_dial_in_the_weights(tmp_path):
    short = [*QUICK, "--num_train_epochs", 1, "--report", "none"]
    run(*short, "--method", "at", "--num_experts", 1, "--output_dir", tmp_path / "start")
    weights = ["--mixing", "weights", "--init_experts_from", tmp_path / "start" / "model"]
    run(*short, *weights, "--report", "quick", "--choose_alpha", "--output_dir", tmp_path / "dual")
    folder = tmp_path / "dual" / "model"
    model = AutoModelForImageClassification.from_pretrained(folder)
    report = RobustnessReport.load(folder / "results.json")
    assert model.config.mixing == report.model["mixing"] == "weights"
    assert model.config.alpha == report.model["alpha"] == report.alpha_choice["alpha"]
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(model(images).logits, model.merge()(images).logits)
    assert "Any answer costs one network" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--choose_alpha", "--method", "at"], "choose_alpha needs the dual model"),
        (["--min_sa", "80"], "give one floor, together with --choose_alpha"),
        (["--choose_alpha", "--min_sa", "800"], "min_sa=800.0"),
        (["--eps", "8"], "did you mean 8/255"),
        (["--router_top_k", "9"], "router_top_k=9 must not exceed num_experts=4"),
        (["--backbone", "resnet81"], "backbone='resnet81' is not a timm model"),
        (["--alpha", "1.5"], "alpha=1.5"),
        (["--mixing", "weights"], "mixing='weights' needs a trained network from which both parts start"),
        (["--mixing", "weights", "--method", "at"], "mixing='weights' needs the dual model of method='jtdmoe'"),
        (["--dataset_name", "./nowhere"], "dataset_name='./nowhere' cannot be loaded: "),
        (["--dataset_name", "nobody/nothing"], "dataset_name='nobody/nothing' cannot be loaded: "),
        (["--dataset_name", "broken.parquet"], "'broken.parquet'"),
        (["--output_dir", "broken.parquet"], "broken.parquet"),
        (["--metric_for_best_model", "accuracy"], "metric_for_best_model='accuracy' must be one of"),
        (["--backbone", "convnext_atto", "--shared_stages", "3"], "shared_stages=3 needs a timm ResNet or ViT"),
        (["--image_column", "picture"], "image_column"),
        (["--recipe", "nonsense"], "recipe='nonsense'"),
        (["--resume_from_checkpoint", "nowhere"], "resume_from_checkpoint='nowhere' must be the folder of a"),
    ],
    ids=str,
)
def test_run_refuses_bad_input_before_training(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more of it")
    assert scripts.call(script, "--output_dir", tmp_path / "out", *arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert message in line
    assert not (tmp_path / "out" / "model").exists()


def test_run_refuses_fsdp_before_training(tmp_path, capsys, monkeypatch):
    """It trained for hours, could not save its DTensors, and called the disk full."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert scripts.call(script, *QUICK, "--output_dir", tmp_path / "out") == 2
    assert "fsdp: this script saves and measures whole models" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model/results.json", "model/examples.png", "before/results.json", "model"])
def test_somebodys_files_are_neither_deleted_nor_overwritten(name, tmp_path, capsys):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    for fresh in ([], ["--fresh"]):
        assert scripts.call(script, *SMALL, "--output_dir", tmp_path, *fresh) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path / name.split('/')[0]} is there already ({name.split('/')[-1]})" in error
    assert path.read_text() == "mine" and not (tmp_path / "settings.json").exists()


@pytest.mark.parametrize(
    ("finished", "training", "whole"),
    [(None, True, True), (None, False, False), (False, True, True), (False, False, False), (True, False, True)],
)
def test_a_report_is_whole_where_its_run_says_so(finished, training, whole, tmp_path):
    """Of runs from before `finished` was noted, the facts about the training tell: they are written last."""
    record = record_of(1) | ({} if finished is None else {"finished": finished})
    (tmp_path / "settings.json").write_text(json.dumps(record))
    assert run_record.whole_report(tmp_path) is None
    report = RobustnessReport({}, {}, {}, training={"method": "at"} if training else {})
    report.save(tmp_path / "model" / "results.json")
    assert (run_record.whole_report(tmp_path) is not None) == whole
    assert run_record.has_finished(tmp_path) is finished
    if finished:  # what follows the training is done once more, and broken off
        run_record.record_end(tmp_path, False)
        assert (run_record.whole_report(tmp_path) is not None) == training


def record_of(processes, per_device=32, accumulation=1, **more):
    training = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation, **more}
    return {"data": {}, "model": {}, "training": training | ({"processes": processes} if processes else {})}


@pytest.mark.parametrize(
    ("there", "here", "refused"),
    [
        (record_of(2), record_of(2), None),
        (record_of(2), record_of(1, 64), None),
        (record_of(2), record_of(1, 32, 2), None),
        (record_of(None), record_of(2), None),  # an older run, which did not say
        (record_of(None), record_of(2, auto_find_batch_size=True), None),
        (record_of(2), record_of(1), "'64 = 32 x 2 x 1' there, '32 = 32 x 1 x 1' here"),
        (record_of(2), record_of(2, 16), "per_device_train_batch_size: 32 there, 16 here"),
        (record_of(None), record_of(1, 64), "per_device_train_batch_size: 32 there, 64 here"),
        (record_of(2), record_of(1, 64, auto_find_batch_size=True), "processes: 2 there, 1 here"),
    ],
)
def test_the_images_of_a_step_stay_as_many(there, here, refused, tmp_path):
    """With two processes in place of one they were twice as many, without a word."""
    (tmp_path / "settings.json").write_text(json.dumps(there))
    if refused:
        with pytest.raises(ValueError, match="a run with other settings") as error:
            run_record.recorded_settings(tmp_path, here, fresh=False)
        assert refused in str(error.value)
        return
    recorded = run_record.recorded_settings(tmp_path, here, fresh=False)
    said = run_record.record_start(tmp_path, recorded, here, "out/checkpoint-2", fresh=False, resumed=None)
    moved = there["training"].get("processes") not in (None, here["training"]["processes"])
    assert ("in 1 processes instead of 2, with the same 64 images in a step: random numbers start" in said) == moved
    assert bool(said) == moved and run_record.read_record(tmp_path, [], "it")["shorter_before"] == []
