"""The twelve-minute run, rehearsed on a CPU: shards in two transfers, stops and goes on, weights in parts."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_tensors
from PIL import Image
from transformers import AutoModelForImageClassification

from hf_dualmoe import DualMoEForImageClassification
from training.benchmarks.full_scale import full_scale, plan
from training.benchmarks.full_scale import weights as weight_parts

SHARDS = [f"train-0000{i}-of-00002.parquet" for i in range(2)]


def write_shard(path: Path, count: int, seed: int) -> None:
    """Random 8 x 8 colour images of four classes, as the Hub keeps them."""
    import datasets

    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 8, 8, 3), dtype=torch.uint8, generator=generator).numpy()
    files = [io.BytesIO() for _ in pixels]
    for image, file in zip(pixels, files, strict=True):
        Image.fromarray(image).save(file, "PNG")
    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=list("abcd")))
    rows = {
        "img": [{"bytes": file.getvalue(), "path": None} for file in files],
        "label": [i % 4 for i in range(count)],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


@pytest.fixture
def half(tmp_path):
    """A folder with the test set and the first of two shards of train; and a function that brings the second."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_shard(folder / "test-00000-of-00001.parquet", 16, seed=9)
    write_shard(folder / SHARDS[0], 200, seed=1)
    return folder, lambda: write_shard(folder / SHARDS[1], 200, seed=2)


def assert_same_weights(left, right) -> None:
    """What is saved of two models is equal to the bit; pixel mean and std are in the configuration."""
    expected, actual = left.state_dict(), right.state_dict()
    assert expected.keys() == actual.keys() and all(torch.equal(actual[k], v) for k, v in expected.items())
    robust = [getattr(model.config, "robust", model.config) for model in (left, right)]
    assert robust[0].image_mean == robust[1].image_mean and robust[0].image_std == robust[1].image_std


def keys(dataset) -> set[bytes]:
    return {image.numpy().tobytes() for image in dataset.images}


def test_the_second_shard_moves_no_image_into_or_out_of_the_held_out_set(half):
    folder, bring = half
    first, shards = plan.load_data(str(folder)), plan.shards_there(str(folder))
    assert shards == (1, 2) and len(first.train) + len(first.validation) == 200 and len(first.validation) > 0
    bring()
    both = plan.load_data(str(folder))
    assert plan.shards_there(str(folder)) == (2, 2) and len(both.train) + len(both.validation) == 400
    assert keys(first.train) < keys(both.train) and keys(first.validation) <= keys(both.validation)
    assert not keys(both.train) & keys(both.validation) and len(both.test) == 16
    assert plan.shards_there("uoft-cs/cifar10") == (1, 1)  # cannot be told


def test_weights_come_back_from_their_parts(make_moe, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_parts, "PART", 40_000)
    parts = {"one": make_moe("resnet", num_experts=1), "two": make_moe("resnet")}
    parts["dual"] = DualMoEForImageClassification.from_models(parts["two"], parts["one"])
    weights = {}
    for name, model in parts.items():
        files = weight_parts.write_parts(model.half(), name, tmp_path)
        assert len(files) > 1 and all((tmp_path / file).stat().st_size <= 40_000 for file in files)
        weights[name] = {"files": files, "config": json.loads(model.config.to_json_string(use_diff=False))}
    (tmp_path / "results.json").write_text(json.dumps({"weights": weights}))
    for name in ("one", "two"):
        (tmp_path / weights[name]["files"][0]).unlink()  # not carried
    (joined,) = full_scale.join_parts(tmp_path)
    assert joined == tmp_path / "models" / "dual"
    assert_same_weights(AutoModelForImageClassification.from_pretrained(joined, dtype=torch.float16), parts["dual"])


def test_steps_are_what_the_measured_time_allows(monkeypatch):
    run = object.__new__(full_scale.Run)
    run.args, run.scale, run.device, run.whole = SimpleNamespace(minutes=12), full_scale.Scale(), "cuda", 49_000
    run.data = SimpleNamespace(train=range(24_500))  # half of the shards
    monkeypatch.setattr(run, "trainer", lambda *args, **kwargs: None)
    monkeypatch.setattr(full_scale, "measure", lambda trainer, effort, graph: (step, 1.0, None))
    step = 0.1
    told = run.plan("single", full_scale.STAGES["single"])
    assert told["steps"] == int((12 * 60 * 0.38 - 5 - 8 * 1.0) / 0.1) and told["step_ms"] == 100
    step = 0.001  # then the epochs of the whole set are the limit
    assert run.plan("single", full_scale.STAGES["single"])["steps"] == -(-60 * 49_000 // 512)


def test_other_settings_do_not_go_on(tmp_path):
    options = ["--rehearse", "--output_dir", str(tmp_path)]
    args = full_scale.parse_args(options)
    full_scale.write_results(args, full_scale.open_results(args))
    assert len(full_scale.open_results(full_scale.parse_args([*options, "--minutes", "3"]))["sessions"]) == 2
    with pytest.raises(SystemExit, match="--fresh"):
        full_scale.main([*options, "--seed", "2"])
    assert len(full_scale.open_results(full_scale.parse_args([*options, "--seed", "2", "--fresh"]))["sessions"]) == 1


def test_a_fresh_start_deletes_no_other_folder(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit, match="work_dir=.*holds other files"):
        full_scale.main(["--rehearse", "--output_dir", str(tmp_path), "--fresh"])
    assert (tmp_path / "work" / "thesis.tex").is_file()


def test_an_evaluation_that_failed_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(full_scale, "STAGES", {})
    monkeypatch.setattr(full_scale, "EVALUATIONS", (("single", "autoattack"), ("single", "worst_case")))
    data = SimpleNamespace(name="two", train="12", validation="12", test="12")
    monkeypatch.setattr(full_scale.plan, "load_data", lambda name: data)
    monkeypatch.setattr(full_scale.plan, "shards_there", lambda name: (1, 1))
    monkeypatch.setattr(full_scale.Run, "trained", lambda self, name: None)
    broken, asked = {"autoattack"}, []

    def evaluate(model, test, level, **options):
        part = level[-1]
        asked.append(part)
        failures = {part: "out of memory"} if part in broken else {}
        metrics = {} if failures else {plan.NUMBER_OF[part]: 30.0}
        rest = {"sanity": {}, "dataset": {"num_images": 2}, "threat": {"attacks": {}}}
        return SimpleNamespace(metrics=metrics, failures=failures, **rest)

    monkeypatch.setattr(full_scale, "evaluate_robustness", evaluate)
    for sessions in (1, 2):
        full_scale.main(["--rehearse", "--output_dir", str(tmp_path)])
        results = json.loads((tmp_path / "results.json").read_text())
        told = results["evaluations"]["single"]
        assert results["done"] == (sessions == 2) and ("autoattack" in told["failures"]) == (sessions == 1)
        broken.clear()
    assert asked == ["autoattack", "worst_case", "autoattack"]
    assert told["metrics"].keys() == set(plan.NUMBER_OF.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", "0", "--rehearse"], "minutes=0.0 must be > 0"),
        (["--stop_after", "-1", "--rehearse"], "stop_after=-1.0"),
        ([], "no CUDA GPU"),
    ],
)
def test_bad_calls_are_refused(options, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        full_scale.parse_args(options)
    assert message in capsys.readouterr().err


def short(monkeypatch) -> None:
    """One training and one evaluation in the place of all."""
    monkeypatch.setattr(full_scale, "STAGES", {"single": full_scale.STAGES["single"]})
    monkeypatch.setattr(full_scale.plan, "WEIGHTS", ())
    monkeypatch.setattr(full_scale, "EVALUATIONS", (("single", "worst_case"),))


def stop_after_step(step: int):
    """In the place of the clock: the session ends at this step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step < state.max_steps:
            control.should_save = control.should_training_stop = True

    return on_step_end


@pytest.mark.slow
def test_a_training_that_is_stopped_ends_as_one_that_is_not(monkeypatch, tmp_path, capsys):
    short(monkeypatch)
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    commands = [["--rehearse", "--output_dir", str(folder)] for folder in folders]
    full_scale.main(commands[0])
    with monkeypatch.context() as patch:
        patch.setattr(full_scale.StopInTime, "on_step_end", stop_after_step(1))
        full_scale.main(commands[1])
    first = json.loads((folders[1] / "results.json").read_text())
    assert "the same command goes on" in capsys.readouterr().out
    assert "done" not in first["stages"]["single"] and not first["evaluations"] and not first["done"]
    (folders[1] / "results.json").unlink()  # the output folder was emptied
    full_scale.main(commands[1])
    found = [json.loads((folder / "results.json").read_text()) for folder in folders]
    assert all(results["done"] and results["stages"]["single"]["steps"] == 4 for results in found)
    assert len(found[1]["sessions"]) == 2 and len(found[1]["stages"]["single"]["trained_on"]) == 2
    models = [AutoModelForImageClassification.from_pretrained(f / "work" / "single" / "model") for f in folders]
    assert_same_tensors(*models)
    assert found[0]["evaluations"]["single"]["metrics"].keys() >= {"sa", "ra_pgd20", "ra_adaptive_union"}


@pytest.mark.slow
def test_a_rehearsal_of_everything_with_shards_in_two_transfers(half, monkeypatch, tmp_path):
    folder, bring = half
    command = ["--rehearse", "--dataset_name", str(folder), "--output_dir", str(tmp_path / "out"), "--minutes", "30"]
    with monkeypatch.context() as patch:
        patch.setattr(full_scale.StopInTime, "on_step_end", stop_after_step(2))
        full_scale.main(command)
    bring()
    full_scale.main(command)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    images = results["stages"]["single"]["trained_on"]
    assert results["done"] and images[0] < 200 < images[1] == results["data"]["train"]
    assert results["evaluations"].keys() == {"single", "pair", "pair_weights", "rt_er", "jtdmoe"}
    for told in results["evaluations"].values():
        assert told["metrics"].keys() >= {"sa", "ra_pgd20", "ra_adaptive_union", "ra_autoattack"}
        assert told["images"] == 10 and not told["failures"]
    assert {name: dial["alpha"] in (0.5, 1.0) for name, dial in results["dials"].items()} == {
        "pair": True,
        "pair_weights": True,
        "jtdmoe": True,
    }
    assert results["evaluations"]["pair"]["metrics"]["components"].keys() == {"standard", "robust"}
    joined = full_scale.join_parts(tmp_path / "out")
    assert [path.name for path in joined] == ["single", "standard", "jtdmoe"]
    work = tmp_path / "out" / "work"
    for path in joined:
        loaded = AutoModelForImageClassification.from_pretrained(path, dtype=torch.float16)
        original = AutoModelForImageClassification.from_pretrained(work / path.name / "model")
        assert_same_weights(loaded, original.half())


def test_the_table_tells_what_is_missing():
    metrics = {"sa": 80.0, "ra_pgd20": 52.1, "ra_autoattack": 48.4}
    results = {"evaluations": {"single": {"metrics": metrics}}, "dials": {}, "stages": {"single": {"seconds": 9.5}}}
    assert full_scale.render(results).splitlines()[2] == "| single | 80.0 | 52.1 | - | 48.4 | - | 9.5 |"
