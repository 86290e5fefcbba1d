"""The full-scale recipes build what they promise."""

import json
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
from training.benchmarks.shared.recipes import parse_recipe
from training.run import create_model

TRAINING = Path(__file__).parents[2] / "training"
BENCHMARKS = TRAINING / "benchmarks"
DUAL_CIFAR10 = ("cifar10_resnet18", "cifar10_resnet18_warm")
ROBUST_DEFAULTS = (*DUAL_CIFAR10, "tinyimagenet_vit_small", "tinyimagenet_vit_small_64px")

RESULTS = json.loads((BENCHMARKS / "results" / "smoke_recipes.json").read_text())


def data_of(recipe: str) -> DataSplits:
    """Random images in the shape of the recipe's dataset."""
    size, classes = (32, 10) if "cifar10" in recipe or recipe == "paper" else (64, 200)
    images = torch.randint(256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    part = ImageTensorDataset(images, torch.tensor([0, classes - 1]), [str(i) for i in range(classes)])
    return DataSplits(part, part, part, name="random")


@cache
def build(recipe: str) -> MoEForImageClassification | DualMoEForImageClassification:
    """The recipe's model at full size, without memory for its weights."""
    _, model_args, args, _ = parse_recipe(recipe, **smoke_recipes.FROM_SCRATCH)
    data = data_of(recipe)
    with torch.device("meta"):
        return create_model(model_args, args, data)


@pytest.mark.parametrize("recipe", smoke_recipes.FULL_SCALE)
def test_full_scale_recipes_build_their_models(recipe):
    model = build(recipe)
    assert sum(p.numel() for p in model.parameters()) == RESULTS["recipes"][recipe]["cost"]["parameters"]
    _, model_args, args, _ = parse_recipe(recipe)
    assert isinstance(model, DualMoEForImageClassification) == (args.method == "jtdmoe")
    assert args.bf16 and model_args.pretrained == recipe.startswith("tinyimagenet")


@pytest.mark.parametrize("recipe", smoke_recipes.FULL_SCALE)
def test_full_scale_recipes_lose_little_when_stopped(recipe):
    data_args, _, args, _ = parse_recipe(recipe)
    assert args.save_strategy == args.eval_strategy == "steps" and args.save_steps % args.eval_steps == 0
    epoch = smoke_recipes.TRAIN_IMAGES[data_args.dataset_name] / args.per_device_train_batch_size
    assert args.save_steps <= 1.1 * epoch and args.save_total_limit == 2


@pytest.mark.parametrize("recipe", ROBUST_DEFAULTS)
def test_robust_defaults_mix_experts_behind_a_trunk(recipe):
    config = build(recipe).config.robust
    assert config.router_top_k == config.num_experts == 4
    assert config.shared_stages > 0 and (config.router, config.router_aux_loss_coef) == ("pooled", 0.3)
    _, _, args, _ = parse_recipe(recipe)
    assert (args.second_term, args.second_attack, args.beta, args.ema_decay) == ("ce", "shared", 0.1, 0.999)


def test_the_paper_recipe_is_the_plain_form():
    config = build("paper").config.robust
    assert (config.router_top_k, config.num_experts, config.shared_stages, config.router) == (1, 4, 0, "linear")
    assert config.width is None
    _, _, args, _ = parse_recipe("paper")
    assert (args.second_term, args.second_attack, args.beta, args.num_train_epochs) == ("kl", "own", 6.0, 130)


def test_the_control_differs_in_the_model_alone():
    names = ("cifar10_resnet18", "cifar10_resnet18_single")
    recipes = [yaml.safe_load((TRAINING / "recipes" / f"{name}.yaml").read_text()) for name in names]
    differing = {name for name in recipes[0] | recipes[1] if recipes[0].get(name) != recipes[1].get(name)}
    objective = {"method", "second_term", "second_attack", "beta", "train_alpha", "alpha", "num_train_epochs"}
    model = {"num_experts", "width", "router_top_k", "shared_stages", "router", "router_aux_loss_coef"}
    assert differing <= objective | model | {"standard_eps"}


@pytest.mark.slow
def test_the_control_costs_the_same():
    robust = smoke_recipes.count_flops("cifar10_resnet18", data_of("cifar10_resnet18"), method="rt_er")
    single = smoke_recipes.count_flops("cifar10_resnet18_single", data_of("cifar10_resnet18"))
    assert robust["answer"] == pytest.approx(single["answer"], rel=0.05)
    epochs = [parse_recipe(name)[2].num_train_epochs for name in ("cifar10_resnet18", "cifar10_resnet18_single")]
    assert robust["train"] * epochs[0] == pytest.approx(single["train"] * epochs[1], rel=0.02)


def warm_start():
    """(recipe, epochs) of the first command of the warm start, which its file names."""
    lines = (TRAINING / "recipes" / "cifar10_resnet18_warm.yaml").read_text().splitlines()
    first = lines[0].split("run.py ")[1].split()
    options = dict(zip(first[::2], first[1::2], strict=True))
    return options["--recipe"], int(options["--num_train_epochs"])


def test_the_warm_start_fits():
    """Its first command's network fills trunk and experts."""
    source, _ = warm_start()
    start = parse_recipe("cifar10_resnet18_warm")[1].init_experts_from
    assert start == f"{parse_recipe(source)[2].output_dir}/model"
    warm, single = build("cifar10_resnet18_warm"), build(source)
    for moe in (warm.standard, warm.robust):
        moe.load_backbone(single.backbone_state_dict())


@pytest.mark.slow
def test_the_warm_start_shares_out_the_same_arithmetic():
    source, epochs = warm_start()
    data = data_of("cifar10_resnet18")
    cost = {name: smoke_recipes.count_flops(name, data)["train"] for name in (*DUAL_CIFAR10, source)}
    cold, warm = (cost[name] * parse_recipe(name)[2].num_train_epochs for name in DUAL_CIFAR10)
    both = epochs * cost[source], warm
    assert sum(both) == pytest.approx(cold, rel=0.03) and both[0] == pytest.approx(0.4 * cold, rel=0.05)


@pytest.mark.parametrize("recipe", ["tinyimagenet_vit_small", "tinyimagenet_vit_small_64px"])
def test_vit_recipes_take_timm_weights_for_224_pixels(recipe, tmp_path):
    _, model_args, _, _ = parse_recipe(recipe)
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
