"""The full-scale recipes build what they promise, and their smoke test notices what goes wrong."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from hf_dualmoe import DualMoEForImageClassification, MoEConfig, MoEForImageClassification
from hf_dualmoe.data.datasets import DataSplits, ImageTensorDataset
from training.benchmarks.reliability import smoke_recipes

TRAINING = Path(__file__).parents[2] / "training"
BENCHMARKS = TRAINING / "benchmarks"
DUAL_CIFAR10 = ("cifar10_resnet18", "cifar10_resnet18_warm")
ROBUST_DEFAULTS = (*DUAL_CIFAR10, "tinyimagenet_vit_small", "tinyimagenet_vit_small_64px")

RESULTS = json.loads((BENCHMARKS / "results" / "smoke_recipes.json").read_text())
SMOKED = [name for name, result in RESULTS["recipes"].items() if "smoke" in result]


def data_of(recipe: str) -> DataSplits:
    """Random images in the shape of the recipe's dataset."""
    size, classes = (32, 10) if "cifar10" in recipe or recipe == "paper" else (64, 200)
    images = torch.randint(256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    part = ImageTensorDataset(images, torch.tensor([0, classes - 1]), [str(i) for i in range(classes)])
    return DataSplits(part, part, part, name="random")


@cache
def build(recipe: str) -> MoEForImageClassification | DualMoEForImageClassification:
    """The recipe's model at full size, without memory for its weights."""
    _, model_args, args, _ = smoke_recipes.parse_recipe(recipe, **smoke_recipes.FROM_SCRATCH)
    data = data_of(recipe)
    with torch.device("meta"):
        return smoke_recipes.training.create_model(model_args, args, data)


@pytest.mark.parametrize("recipe", smoke_recipes.FULL_SCALE)
def test_full_scale_recipes_build_their_models(recipe):
    model = build(recipe)
    assert sum(p.numel() for p in model.parameters()) == RESULTS["recipes"][recipe]["cost"]["parameters"]
    _, model_args, args, _ = smoke_recipes.parse_recipe(recipe)
    assert isinstance(model, DualMoEForImageClassification) == (args.method == "jtdmoe")
    assert args.bf16 and model_args.pretrained == recipe.startswith("tinyimagenet")


@pytest.mark.parametrize("recipe", smoke_recipes.FULL_SCALE)
def test_full_scale_recipes_lose_little_when_stopped(recipe):
    data_args, _, args, _ = smoke_recipes.parse_recipe(recipe)
    assert args.save_strategy == args.eval_strategy == "steps" and args.save_steps % args.eval_steps == 0
    epoch = smoke_recipes.TRAIN_IMAGES[data_args.dataset_name] / args.per_device_train_batch_size
    assert args.save_steps <= 1.1 * epoch and args.save_total_limit == 2


@pytest.mark.parametrize("recipe", ROBUST_DEFAULTS)
def test_robust_defaults_mix_experts_behind_a_trunk(recipe):
    config = build(recipe).config.robust
    assert config.router_top_k == config.num_experts == 4
    assert config.shared_stages > 0 and (config.router, config.router_aux_loss_coef) == ("pooled", 0.3)
    _, _, args, _ = smoke_recipes.parse_recipe(recipe)
    assert (args.second_term, args.second_attack, args.beta, args.ema_decay) == ("ce", "shared", 0.1, 0.999)


def test_the_paper_recipe_is_the_plain_form():
    config = build("paper").config.robust
    assert (config.router_top_k, config.num_experts, config.shared_stages, config.router) == (1, 4, 0, "linear")
    assert config.width is None
    _, _, args, _ = smoke_recipes.parse_recipe("paper")
    assert (args.second_term, args.second_attack, args.beta, args.num_train_epochs) == ("kl", "own", 6.0, 130)


def test_the_control_differs_in_the_model_alone_and_costs_the_same():
    recipes = [
        yaml.safe_load((TRAINING / "recipes" / f"{name}.yaml").read_text())
        for name in ("cifar10_resnet18", "cifar10_resnet18_single")
    ]
    differing = {name for name in recipes[0] | recipes[1] if recipes[0].get(name) != recipes[1].get(name)}
    objective = {"method", "second_term", "second_attack", "beta", "train_alpha", "alpha", "num_train_epochs"}
    objective |= {"standard_eps"}
    assert differing <= objective | {"num_experts", "width", "router_top_k", "shared_stages", "router"} | {
        "router_aux_loss_coef"
    }

    robust = smoke_recipes.count_flops("cifar10_resnet18", data_of("cifar10_resnet18"), method="rt_er")
    single = smoke_recipes.count_flops("cifar10_resnet18_single", data_of("cifar10_resnet18"))
    assert robust["answer"] == pytest.approx(single["answer"], rel=0.05)
    spent = [counts["train"] * r["num_train_epochs"] for counts, r in zip((robust, single), recipes, strict=True)]
    assert spent[0] == pytest.approx(spent[1], rel=0.02)


def test_the_warm_start_fits_and_shares_out_the_same_arithmetic():
    """Its first command's network fills trunk and experts, and both commands cost what the cold recipe costs."""
    lines = (TRAINING / "recipes" / "cifar10_resnet18_warm.yaml").read_text().splitlines()
    first = lines[0].split("run.py ")[1].split()
    options = dict(zip(first[::2], first[1::2], strict=True))
    source, epochs = options["--recipe"], int(options["--num_train_epochs"])
    recipes = {name: smoke_recipes.parse_recipe(name) for name in (*DUAL_CIFAR10, source)}
    assert recipes["cifar10_resnet18_warm"][1].init_experts_from == f"{recipes[source][2].output_dir}/model"
    warm, single = build("cifar10_resnet18_warm"), build(source)
    for moe in (warm.standard, warm.robust):
        moe.load_backbone(single.backbone_state_dict())

    data = data_of("cifar10_resnet18")
    cost = {name: smoke_recipes.count_flops(name, data)["train"] for name in recipes}
    cold = cost["cifar10_resnet18"] * recipes["cifar10_resnet18"][2].num_train_epochs
    both = epochs * cost[source], cost["cifar10_resnet18_warm"] * recipes["cifar10_resnet18_warm"][2].num_train_epochs
    assert sum(both) == pytest.approx(cold, rel=0.03) and both[0] == pytest.approx(0.4 * cold, rel=0.05)


@pytest.mark.parametrize("recipe", ["tinyimagenet_vit_small", "tinyimagenet_vit_small_64px"])
def test_vit_recipes_take_timm_weights_for_224_pixels(recipe, tmp_path):
    _, model_args, _, _ = smoke_recipes.parse_recipe(recipe)
    small = {"depth": 12, "embed_dim": 24, "num_heads": 2}
    source = timm.create_model("vit_small_patch16_224", **small)  # 224 px, patches of 16, 1000 classes
    save_file(source.state_dict(), tmp_path / "weights.safetensors")

    config = model_args.moe_config(data_of(recipe))
    assert config.image_size == 64
    fields = {k: getattr(config, k) for k in ("backbone", "stem", "image_size", "backbone_image_size", "num_experts")}
    fields |= {k: getattr(config, k) for k in ("router_top_k", "router", "shared_stages")}
    config = MoEConfig(**fields, num_labels=200, backbone_kwargs={**config.backbone_kwargs, **small})
    overlay = {
        "file": str(tmp_path / "weights.safetensors"),
        "custom_load": False,
    }  # which timm 1.0.22 takes for an npz
    model = MoEForImageClassification.from_backbone(config, pretrained=True, pretrained_cfg_overlay=overlay).eval()

    block = source.blocks[11].mlp.fc1.weight  # an expert's: taken over as it is, by all of them
    assert all(torch.equal(expert.blocks[11].mlp.fc1.weight, block) for expert in model.experts)
    tokens, patch = model.trunk.stages.pos_embed.shape[1] - 1, model.trunk.stages.patch_embed.proj.weight
    assert (tokens, patch.shape[-1]) == ((64, 8) if recipe.endswith("64px") else (196, 16))
    assert model(torch.rand(2, 3, 64, 64)).logits.shape == (2, 200)
    if recipe.endswith("64px"):  # resampled from the weights, not drawn anew
        smooth = torch.nn.functional.interpolate(source.patch_embed.proj.weight, 8, mode="bicubic", antialias=True)
        stacked = torch.stack([smooth.flatten(), patch.flatten()])
        assert torch.corrcoef(stacked)[0, 1] > 0.5
    else:
        assert torch.equal(patch, source.patch_embed.proj.weight)


# --- the script ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", smoke_recipes.FULL_SCALE)
def test_recorded_costs_are_of_the_recipes_as_they_are(recipe):
    result = RESULTS["recipes"][recipe]
    assert result["recipe_settings"] == yaml.safe_load((TRAINING / "recipes" / f"{recipe}.yaml").read_text())


@pytest.mark.parametrize("recipe", SMOKED)
def test_recorded_smoke_tests_are_of_the_recipes_as_they_are(recipe):
    result = RESULTS["recipes"][recipe]
    assert result["smoke"]["recipe_settings"] == yaml.safe_load((TRAINING / "recipes" / f"{recipe}.yaml").read_text())
    assert result["settings"] == smoke_recipes.smoke_settings(
        recipe, result["smoke"]["steps"], result["settings"]["per_device_train_batch_size"], pretrained=False
    )
    assert result["smoke"]["steps"] >= 200 > result["smoke"]["killed_after_step"]
    assert result["smoke"]["resumed_from_step"] <= result["smoke"]["killed_after_step"]


def test_readme_and_comments_show_the_results():
    readme = (TRAINING / "recipes" / "README.md").read_text()
    assert f"made by --render -->\n\n{smoke_recipes.render_table(RESULTS)}\n\n<!--" in readme
    for recipe in RESULTS["recipes"]:
        line = f"# Time: {smoke_recipes.step_time(recipe)}\n"
        assert (TRAINING / "recipes" / f"{recipe}.yaml").read_text().count(line) == 1
    assert not [text for text in ("/work", "/tmp", "/home") if text in json.dumps(RESULTS)]


def test_an_estimate_keeps_the_smoke_test(tmp_path):
    args = smoke_recipes.parse_args(["--output", str(tmp_path / "r.json")])
    for recipe in ("paper", "cifar10_resnet18"):
        smoke_recipes.save({"recipe": recipe, "cost": {"total_pflops": 100.0}, "smoke": {"steps": 200}}, args)
    args = smoke_recipes.parse_args(["--output", str(tmp_path / "r.json"), "--estimate"])
    smoke_recipes.save({"recipe": "paper", "cost": {"total_pflops": 200.0}}, args)
    saved = json.loads((tmp_path / "r.json").read_text())
    assert list(saved["recipes"]) == ["paper", "cifar10_resnet18"]
    assert saved["recipes"]["paper"]["smoke"] == {"steps": 200}
    assert [recipe["cost"]["total_pflops"] for recipe in saved["recipes"].values()] == [200, 100]


def test_recipes_quote_measured_times_only(tmp_path, monkeypatch):
    """A step of the recipe as it is, with the hardware; no hours that nobody has seen."""
    for path in (TRAINING / "recipes").iterdir():
        assert not re.search(r"\d h on|computed:", path.read_text()), path.name
    monkeypatch.setattr(smoke_recipes, "RESULTS", tmp_path)
    unmeasured = "not measured; run with --estimate_time."
    assert smoke_recipes.step_time("cifar10_resnet18_single") == unmeasured

    def write(name, unit, milliseconds):
        units = {f"{unit} single PGD-10, 128": {"ms": milliseconds}}
        results = {"environment": {"hardware": f"{unit} card"}, "units": units}
        (tmp_path / f"{name}.json").write_text(json.dumps(results))

    write("speed_gpu_before", "eager", 202.2)
    before = "202 ms per step of 128 images without the step graph, measured on one eager card; "
    assert smoke_recipes.step_time("cifar10_resnet18_single").startswith(before)
    write("speed_gpu", "graph", 25.1)
    now = "25 ms per step of 128 images with the step graph, measured on one graph card; "
    assert smoke_recipes.step_time("cifar10_resnet18_single").startswith(now)
    assert smoke_recipes.step_time("paper") == unmeasured


def test_a_time_line_is_put_after_the_comments_and_replaced():
    once = smoke_recipes.with_time("# one\n# two\nmethod: at\n", "3 h")
    assert once == "# one\n# two\n# Time: 3 h\nmethod: at\n"
    assert smoke_recipes.with_time(once, "4 h") == "# one\n# two\n# Time: 4 h\nmethod: at\n"


@pytest.mark.parametrize(
    ("option", "message"), [(("--steps", "3"), "steps=3 must be at least 10"), (("--batch_size", "0"), "batch_size=0")]
)
def test_bad_arguments_are_refused(option, message, capsys):
    with pytest.raises(SystemExit):
        smoke_recipes.parse_args(list(option))
    assert message in capsys.readouterr().err


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
    settings = smoke_recipes.smoke_settings("digits", 20, 4, False) | changes
    result = smoke_recipes.smoke("digits", tmp_path / "out", settings, torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    assert result["steps"] == 20 and 4 <= result["resumed_from_step"] <= result["killed_after_step"] < 20
    assert result["loss_first"] > 0 and not list((tmp_path / "out").glob("checkpoint-*"))
