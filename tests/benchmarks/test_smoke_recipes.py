"""The smoke test of the full-scale recipes notices what goes wrong, and its results are of the recipes as they are."""

import pytest
import torch
import yaml

from hf_dualmoe import load_splits
from training.benchmarks.reliability import smoke_recipes
from training.benchmarks.shared.store import RESULTS as KEPT
from training.benchmarks.shared.store import read_json
from training.run import RECIPES

RESULTS = read_json(KEPT / "smoke_recipes.json")


@pytest.mark.parametrize("recipe", smoke_recipes.FULL_SCALE)
def test_recorded_costs_and_smoke_tests_are_of_the_recipes_as_they_are(recipe):
    result = RESULTS["recipes"][recipe]
    assert result["recipe_settings"] == yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    smoke, batch_size = result["smoke"], result["settings"]["per_device_train_batch_size"]
    assert result["settings"] == smoke_recipes.smoke_settings(recipe, smoke["steps"], batch_size)
    assert smoke["steps"] >= 200 > smoke["killed_after_step"] >= smoke["resumed_from_step"]


def test_a_result_takes_the_place_of_that_recipe_only(tmp_path):
    path = tmp_path / "r.json"
    for recipe, flops in (("paper", 100), ("cifar10_resnet18", 300), ("paper", 200)):
        smoke_recipes.save({"recipe": recipe, "cost": flops}, path)
    saved = read_json(path)["recipes"]
    assert {name: result["cost"] for name, result in saved.items()} == {"paper": 200, "cifar10_resnet18": 300}


@pytest.mark.parametrize(
    ("option", "message"), [(("--steps", "3"), "steps=3 must be at least 10"), (("--batch_size", "0"), "batch_size=0")]
)
def test_bad_arguments_are_refused(option, message, capsys):
    with pytest.raises(SystemExit):
        smoke_recipes.parse_args(list(option))
    assert message in capsys.readouterr().err


def test_an_image_costs_what_it_costs_in_a_full_batch():
    """What an attack does once for a whole batch, such as the comparison of folded weights, is not counted."""
    data = load_splits("digits")
    costs = smoke_recipes.count_flops("cifar10_resnet18_single", data, dataset_name="digits", width="8,8,8,8")
    assert costs["evaluation"] / costs["answer"] == pytest.approx(24, rel=0.01)  # 4 passes, 10 steps of 2


@pytest.fixture
def fake_run(tmp_path, monkeypatch):
    """Puts a script in the place of training/run.py that logs and writes checkpoints, as told by its source."""

    def put(resumes: bool, loss: float = 1.0) -> dict:
        script = tmp_path / "run.py"
        script.write_text(
            "import json, sys, time\nfrom pathlib import Path\n"
            "folder = Path(sys.argv[sys.argv.index('--output_dir') + 1])\n"
            "done = [int(p.name.split('-')[1]) for p in folder.glob('checkpoint-*')]\n"
            f"start = max(done) if done and {resumes} else 0\n"
            "for step in range(start + 1, 21):\n"
            f"    print({{'loss': {loss}}}, flush=True)\n"
            "    time.sleep(0.03)\n"
            "    if step % 4 == 0:\n"
            "        path = folder / f'checkpoint-{step}'\n"
            "        path.mkdir(exist_ok=True)\n"
            f"        state = {{'global_step': step, 'log_history': [{{'loss': {loss}}}] * step}}\n"
            "        (path / 'trainer_state.json').write_text(json.dumps(state))\n"
        )
        monkeypatch.setattr(smoke_recipes, "RUN", script)
        return {"max_steps": 20, "logging_steps": 1}

    return put


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ({"resumes": False}, "did not go on from there"),
        ({"resumes": True, "loss": "float('nan')"}, "losses"),
    ],
)
def test_the_smoke_test_notices_a_broken_training(fake_run, tmp_path, behaviour, message):
    with pytest.raises(smoke_recipes.SmokeError, match=message):
        smoke_recipes.smoke("any", tmp_path / "out", fake_run(**behaviour), torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["log.txt"]


@pytest.mark.slow
def test_the_smoke_test_kills_and_resumes_a_real_training(tmp_path):
    changes = {"dataset_name": "digits", "width": "8,8,8,16", "max_train_samples": 64}
    settings = smoke_recipes.smoke_settings("digits", 20, 4) | changes
    result = smoke_recipes.smoke("digits", tmp_path / "out", settings, torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    assert result["steps"] == 20 and 4 <= result["resumed_from_step"] <= result["killed_after_step"] < 20
    assert result["loss_first"] > 0 and not list((tmp_path / "out").glob("checkpoint-*"))
