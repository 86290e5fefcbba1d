"""Interrupted runs: damaged checkpoints are found, the one before is used, a full disk loses nothing."""

import errno
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import scripts
import tiny_training
import torch
from safetensors import SafetensorError

from hf_dualmoe.cli import run_record
from hf_dualmoe.trainer import checkpoints, resumable
from hf_dualmoe.trainer.arguments import RobustTrainingArguments
from hf_dualmoe.trainer.checkpoints import CheckpointError, check_checkpoint, last_good_checkpoint, list_checkpoints
from hf_dualmoe.trainer.trainer import RobustTrainer
from training import run as script

TOKEN = "hf_" + "x7Q" * 12
FILES = (
    *("config.json", "model.safetensors", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    *("trainer_state.json", "progress.json", "ema.safetensors"),
)
BENCHMARK = Path(__file__).parents[2] / "training" / "benchmarks" / "reliability" / "survival.py"


def create(output_dir, **changes):
    settings = {"method": "standard", "max_steps": 6, "per_device_train_batch_size": 10, "crop_padding": 1}
    settings |= {"save_strategy": "steps", "save_steps": 2, "ema_decay": 0.5, "eval_attack_steps": 0}
    settings |= {"logging_steps": 4}  # no multiple of save_steps: checkpoints come in the middle of a log
    args = tiny_training.arguments(output_dir, **{**settings, **changes})
    data = tiny_training.noise(30)
    return RobustTrainer(tiny_training.build("standard"), args, train_dataset=data, eval_dataset=data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with checkpoints 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("survival") / "run"
    trainer = create(folder, hub_token=TOKEN, push_to_hub=False)
    trainer.train()
    assert trainer.args.hub_token == TOKEN  # still there for publishing
    return folder


@pytest.fixture
def run_dir(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_lists_all_that_resuming_reads(run_dir):
    assert list(list_checkpoints(run_dir)) == [2, 4, 6]
    for folder in list_checkpoints(run_dir).values():
        check_checkpoint(folder)
        assert set(FILES) <= set(json.loads((folder / "manifest.json").read_text())["files"])
    assert last_good_checkpoint(run_dir).name == "checkpoint-6"
    assert not (run_dir / "unfinished").exists()


@pytest.mark.parametrize(
    ("damage", "name"),
    [(flip, name) for name in FILES]  # one bit of a listing may leave it readable
    + [(damage, name) for damage in (cut, Path.unlink) for name in ("model.safetensors", "manifest.json")],
)
def test_damage_to_any_file_is_found_and_the_checkpoint_before_is_used(run_dir, damage, name):
    damage(run_dir / "checkpoint-6" / name)
    with pytest.raises(CheckpointError, match="checkpoint-6"):
        check_checkpoint(run_dir / "checkpoint-6")
    assert last_good_checkpoint(run_dir).name == "checkpoint-4"


def test_where_all_are_damaged_the_run_does_not_start_over(run_dir):
    for step in (2, 4, 6):
        cut(run_dir / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(
        CheckpointError, match=r"No checkpoint in .* can be used: .*optimizer\.pt has \d+ bytes instead"
    ):
        last_good_checkpoint(run_dir)


def test_a_checkpoint_whose_best_one_is_damaged_is_not_used(run_dir):
    state = run_dir / "checkpoint-6" / "trainer_state.json"
    content = json.loads(state.read_text())
    content["best_model_checkpoint"] = "elsewhere/checkpoint-2"  # as if the folder had been moved
    state.write_text(json.dumps(content))
    manifest = run_dir / "checkpoint-6" / "manifest.json"
    files = json.loads(manifest.read_text())
    crc = checkpoints._crc32(state)
    files["files"]["trainer_state.json"] = {"bytes": state.stat().st_size, "crc32": crc}
    manifest.write_text(json.dumps(files))
    assert last_good_checkpoint(run_dir).name == "checkpoint-6"
    cut(run_dir / "checkpoint-2" / "ema.safetensors")
    assert last_good_checkpoint(run_dir).name == "checkpoint-4"


def test_trainer_refuses_a_damaged_checkpoint(run_dir, tmp_path):
    flip(run_dir / "checkpoint-4" / "model.safetensors")
    for checkpoint in (str(run_dir / "checkpoint-4"), run_dir / "checkpoint-4"):
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
            create(tmp_path / "other").train(resume_from_checkpoint=checkpoint)


def test_resuming_from_true_takes_the_newest_checkpoint_that_is_whole(run_dir, tmp_path):
    cut(run_dir / "checkpoint-6" / "optimizer.pt")
    trainer = create(run_dir)
    steps = []
    step = trainer.training_step
    trainer.training_step = lambda *args: (steps.append(trainer.state.global_step), step(*args))[1]
    trainer.train(resume_from_checkpoint=True)
    assert steps == [4, 5]
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        create(tmp_path / "nothing").train(resume_from_checkpoint=True)


# --- interruptions ---------------------------------------------------------------------------------------------------


def without_time(log):
    timed = ("runtime", "per_second", "train_loss", "total_flos")
    return [{k: v for k, v in entry.items() if not any(t in k for t in timed)} for entry in log]


def test_a_run_that_goes_on_ends_as_one_that_was_never_interrupted(finished, tmp_path):
    resumed = create(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(finished / "checkpoint-2"))
    whole, again = (folder / "checkpoint-6" for folder in (finished, tmp_path / "resumed"))
    for name in ("model.safetensors", "ema.safetensors"):
        assert (whole / name).read_bytes() == (again / name).read_bytes(), name
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in (whole, again)]
    assert [[e["step"] for e in state["log_history"] if "loss" in e] for state in states] == [[4], [4]]
    assert states[0]["global_step"] == states[1]["global_step"] == 6


def test_training_time_is_that_of_all_starts(run_dir):
    """A finished run that was started again told of 0.006 s."""
    earlier = json.loads((run_dir / "checkpoint-6" / "progress.json").read_text())["seconds"]
    again = create(run_dir)
    again.train(resume_from_checkpoint=str(run_dir / "checkpoint-6"))
    once = again.train_seconds
    assert earlier < once == again.train_seconds < earlier + 60


@pytest.mark.parametrize(
    ("max_steps", "strategy"), [(5, "steps"), (6, "epoch")], ids=["within an epoch", "at its end"]
)
def test_a_finished_run_that_is_started_again_takes_no_step(tmp_path, max_steps, strategy):
    options = {"max_steps": max_steps, "save_strategy": strategy, "eval_strategy": strategy, "logging_steps": 1}
    first = create(tmp_path, **options)
    first.train()
    last = last_good_checkpoint(tmp_path)
    written = (last / "manifest.json").stat().st_mtime_ns
    again = create(tmp_path, **options)
    again.train(resume_from_checkpoint=str(last))
    assert again.state.global_step == max_steps and (last / "manifest.json").stat().st_mtime_ns == written
    assert without_time(again.state.log_history[:-1]) == without_time(first.state.log_history[:-1])
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("moment", ["before the manifest", "before the name", "before the rotation"])
def test_a_run_that_dies_while_it_saves_keeps_the_checkpoint_before(tmp_path, monkeypatch, moment):
    """With save_total_limit=1 the one before must outlive the writing of the next."""

    class Killed(BaseException):
        pass

    fourth = tmp_path / "run" / "checkpoint-4"
    where = {
        "before the manifest": (checkpoints, "write_text", lambda path: "checkpoint-4" in str(path)),
        "before the name": (checkpoints, "_flush", lambda path: path.name == "checkpoint-4"),
        "before the rotation": (resumable, "rotate_checkpoints", lambda path: fourth.is_dir()),
    }
    module, name, condition = where[moment]
    original = getattr(module, name)

    def dies(path, *args, **kwargs):
        if condition(path):
            raise Killed
        return original(path, *args, **kwargs)

    monkeypatch.setattr(module, name, dies)
    with pytest.raises(Killed):
        create(tmp_path / "run", save_total_limit=1).train()
    monkeypatch.undo()
    expected = "checkpoint-4" if moment == "before the rotation" else "checkpoint-2"
    left = last_good_checkpoint(tmp_path / "run")
    assert left.name == expected
    create(tmp_path / "run", save_total_limit=1).train(resume_from_checkpoint=str(left))
    assert list(list_checkpoints(tmp_path / "run")) == [6]
    check_checkpoint(tmp_path / "run" / "checkpoint-6")
    assert not (tmp_path / "run" / "unfinished").exists()


def test_checkpoints_of_an_abandoned_training_go_first(run_dir):
    """Step 60 is of a run that was given up: this run is at step 6, and the newest of its own must stay."""
    shutil.copytree(run_dir / "checkpoint-6", run_dir / "checkpoint-60")
    for hours, step in enumerate((6, 4, 2, 60), start=1):
        os.utime(run_dir / f"checkpoint-{step}", (time.time() - 3600 * hours,) * 2)
    create(run_dir, save_total_limit=2).train(resume_from_checkpoint=str(run_dir / "checkpoint-4"))
    assert list(list_checkpoints(run_dir)) == [4, 6]
    check_checkpoint(run_dir / "checkpoint-6")


def test_the_best_checkpoint_of_a_folder_that_was_moved_stays(tmp_path):
    selection = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "sa"}
    measured = iter([3.0, 1.0, 2.0])

    def start(folder, **changes):
        trainer = create(folder, load_best_model_at_end=True, ema_decay=0.0, **selection, **changes)
        trainer.compute_metrics = lambda prediction: {"sa": next(measured)}
        return trainer

    start(tmp_path / "run", max_steps=4).train()
    (tmp_path / "run").rename(tmp_path / "moved")
    trainer = start(tmp_path / "moved", max_steps=6, save_total_limit=1)
    trainer.train(resume_from_checkpoint=str(tmp_path / "moved" / "checkpoint-4"))
    assert Path(trainer.state.best_model_checkpoint) == tmp_path / "moved" / "checkpoint-2"
    assert trainer.state.best_metric == 3.0 and list(list_checkpoints(tmp_path / "moved")) == [2]


def test_a_finished_run_that_was_moved_keeps_its_best_weights(tmp_path):
    """transformers looks for the best checkpoint at its old path only, and left the last weights in the model."""
    selection = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "sa", "ema_decay": 0.0}
    measured = iter([1.0, 3.0, 2.0])
    trainer = create(tmp_path / "run", load_best_model_at_end=True, **selection)
    trainer.compute_metrics = lambda prediction: {"sa": next(measured)}
    trainer.train()
    best = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    (tmp_path / "run").rename(tmp_path / "moved")
    trainer = create(tmp_path / "moved", load_best_model_at_end=True, **selection)
    trainer.train(resume_from_checkpoint=str(tmp_path / "moved" / "checkpoint-6"))
    assert Path(trainer.state.best_model_checkpoint) == tmp_path / "moved" / "checkpoint-4"
    assert all(torch.equal(tensor, best[name]) for name, tensor in trainer.model.state_dict().items())


def test_somebodys_folder_called_unfinished_stays(tmp_path):
    for name in ("thesis.txt", "checkpoints/a", "checkpoint-4/half of it"):
        path = tmp_path / "unfinished" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    create(tmp_path).train()
    assert list(list_checkpoints(tmp_path)) == [2, 4, 6]
    assert sorted(path.name for path in (tmp_path / "unfinished").iterdir()) == ["checkpoints", "thesis.txt"]


def test_best_checkpoint_is_named_by_its_final_name(tmp_path):
    selection = {"eval_strategy": "steps", "eval_steps": 2, "eval_attack_steps": 0, "metric_for_best_model": "sa"}
    trainer = create(tmp_path / "run", load_best_model_at_end=True, save_total_limit=1, **selection)
    trainer.train()
    best = tmp_path / "run" / f"checkpoint-{trainer.state.best_global_step}"
    assert Path(trainer.state.best_model_checkpoint) == best and best.is_dir()
    state = json.loads((best / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]) == best


# --- full disk, secrets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [200, 50_000])
def test_full_disk_names_the_folder_and_leaves_the_last_checkpoint(tmp_path, room):
    """A limit on the size of files stands for the disk: both end in an error of the write call."""
    trainer = create(tmp_path / "run")
    check_write = trainer._save_checkpoint
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(*args):
        if trainer.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        check_write(*args)

    trainer._save_checkpoint = save
    try:
        with pytest.raises(CheckpointError) as error:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"checkpoint-4 could not be written to {tmp_path / 'run'}" in str(error.value)
    assert "the last checkpoint is" in str(error.value) and "checkpoint-2" in str(error.value)
    left = last_good_checkpoint(tmp_path / "run")
    assert left.name == "checkpoint-2" and not (tmp_path / "run" / "unfinished").exists()
    create(tmp_path / "run").train(resume_from_checkpoint=str(left))
    assert last_good_checkpoint(tmp_path / "run").name == "checkpoint-6"


@pytest.mark.parametrize(
    ("error", "told", "blames_disk"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), CheckpointError, True),
        (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), CheckpointError, True),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), CheckpointError, True),
        (PermissionError(errno.EACCES, "Permission denied"), CheckpointError, False),
        (SafetensorError("Error while serializing: InvalidTensorView"), CheckpointError, False),
        (RuntimeError("Attempted to access the data pointer on an invalid python storage"), RuntimeError, False),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, False),
    ],
    ids=lambda value: str(value)[:20],
)
def test_only_a_full_disk_is_called_one(error, told, blames_disk, tmp_path):
    with pytest.raises(told) as caught, checkpoints.explain_failed_write("checkpoint-2", tmp_path):
        raise error
    assert type(caught.value) is told and ("Make room" in str(caught.value)) == blames_disk
    assert str(error) in str(caught.value)


def test_no_file_of_a_run_holds_the_access_token(finished, tmp_path):
    paths = [path for path in finished.rglob("*") if path.is_file()]
    assert [path for path in paths if path.name == "training_args.bin"]
    assert not [path for path in paths if TOKEN.encode() in path.read_bytes()]
    args = RobustTrainingArguments(output_dir=str(tmp_path), hub_token=TOKEN, use_cpu=True, seed=7)
    again = pickle.loads(pickle.dumps(args))
    assert args.hub_token == TOKEN and again.hub_token is None and again.seed == 7


# --- the command -----------------------------------------------------------------------------------------------------


def test_run_goes_on_from_the_last_whole_checkpoint(run_dir):
    assert script.find_checkpoint(run_dir) == str(run_dir / "checkpoint-6")
    cut(run_dir / "checkpoint-6" / "scheduler.pt")
    assert script.find_checkpoint(run_dir) == str(run_dir / "checkpoint-4")


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("settings", [None, "[]", '{"standard": "a", "robust": "b"}', "broken"])
def test_checkpoints_of_another_program_are_left_alone(run_dir, settings, fresh):
    """--fresh would delete them: somebody's trained weights."""
    if settings is not None:
        (run_dir / "settings.json").write_text(settings)
    here = {"data": {}, "model": {}, "training": {}}
    found = "checkpoints but no settings.json" if settings is None else "a settings.json that is not of a training"
    with pytest.raises(ValueError, match=rf"holds {found}.* choose another --output_dir\.$"):
        script.recorded_settings(run_dir, here, fresh=fresh)


@pytest.mark.parametrize(
    ("there", "here", "refused"),
    [
        ({"num_train_epochs": 2, "max_steps": -1}, {"num_train_epochs": 3, "max_steps": -1}, None),
        ({"num_train_epochs": 3, "max_steps": 4}, {"num_train_epochs": 3, "max_steps": 9}, None),
        ({"num_train_epochs": 3}, {"num_train_epochs": 2}, "num_train_epochs: 3 there, 2 here"),
        ({"max_steps": -1}, {"max_steps": 9}, "max_steps: -1 there, 9 here"),
        ({"num_train_epochs": 2, "beta": 1.0}, {"num_train_epochs": 3, "beta": 2.0}, "beta: 1.0 there, 2.0 here"),
        ({}, {"awp_gamma": 0.0}, None),  # begun before the argument existed
        ({}, {"awp_gamma": 0.005}, "awp_gamma: 0.0 there, 0.005 here"),
        ({"beta": 2.0, "gone": 1}, {"beta": 2.0}, "gone: 1 there, None here"),
    ],
    ids=str,
)
def test_a_run_goes_on_with_the_same_settings_or_for_longer(tmp_path, there, here, refused):
    there, here = ({"data": {}, "model": {}, "training": settings} for settings in (there, here))
    (tmp_path / "settings.json").write_text(json.dumps(there))
    if refused is None:
        assert script.recorded_settings(tmp_path, here, fresh=False) == there
    else:
        with pytest.raises(ValueError, match=f"a run with other settings .*{refused}"):
            script.recorded_settings(tmp_path, here, fresh=False)
    assert script.recorded_settings(tmp_path, here, fresh=True) == {}


def test_fresh_leaves_no_checkpoint_to_go_on_from(run_dir):
    """Or the next start would go on from one of the run before."""
    (run_dir / "settings.json").write_text('{"data": {}, "model": {}, "training": {}}')  # a run of ours
    options = (
        "--method standard --max_train_samples 64 --max_validation_samples 20 --backbone resnet10t --width 8,8,8,16 "
        "--num_experts 2 --router_top_k 2 --report none --max_steps 1 --eval_strategy no --save_strategy no "
        "--load_best_model_at_end false --disable_tqdm true --fresh"
    ).split()
    assert scripts.call(script, *options, "--output_dir", run_dir) == 0
    assert not list_checkpoints(run_dir) and (run_dir / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(("best", "left"), [(None, [4]), ("elsewhere/checkpoint-2", [2, 4])])
def test_fresh_from_a_checkpoint_leaves_that_one_alone(best, left, run_dir):
    """A later start went on from checkpoint-6, of the run before, under the settings of this one."""
    state = run_dir / "checkpoint-4" / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"best_model_checkpoint": best}))
    settings = {"data": {}, "model": {}, "training": {}}
    resumed = os.path.relpath(run_dir / "checkpoint-4")
    run_record.record_start(run_dir, {}, settings, None, fresh=True, resumed=resumed)
    assert list(list_checkpoints(run_dir)) == left


def test_a_damaged_checkpoint_that_is_named_is_refused_before_others_are_deleted(run_dir):
    cut(run_dir / "checkpoint-4" / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt has \d+ bytes instead"):
        run_record.check_named_checkpoint(str(run_dir / "checkpoint-4"))


@pytest.mark.slow
def test_killed_runs_end_as_an_undisturbed_one(tmp_path):
    """A few of the kills of the benchmark, with its own exit status and figures."""
    options = ["--kills", "3", "--output", str(tmp_path / "survival.json")]
    result = subprocess.run([sys.executable, str(BENCHMARK), *options], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    figures = json.loads((tmp_path / "survival.json").read_text())
    assert figures["kills"] == 3 and all(figures["equal_to_the_bit"].values())
    if figures["disk_full"]["tried"]:
        assert figures["disk_full"]["equal_to_the_bit"] and "DISK/run" in figures["disk_full"]["error"]
