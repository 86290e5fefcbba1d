"""The command line: recipes, overrides, help, and errors that name what is wrong."""

import sys
from pathlib import Path

import pytest
import torch

from hf_dualmoe.cli.arguments import RecipeParser, parse_json, parse_width
from hf_dualmoe.data.datasets import load_splits

TRAINING = Path(__file__).parents[2] / "training"


@pytest.fixture
def parser():
    return RecipeParser(TRAINING / "recipes", description="Train.")


def test_no_argument_means_the_digits_recipe(parser):
    data, model, training, run = parser.parse([])
    assert (run.recipe, data.dataset_name, training.method) == ("digits", "digits", "jtdmoe")
    assert training.eps == 0.15 and model.width == "16,32,60,32" and not training.horizontal_flip
    assert training.output_dir == "outputs/digits-jtdmoe"


def test_other_data_means_the_recipe_for_own_images(parser):
    data, model, training, run = parser.parse(["--dataset_name", "somewhere/images"])
    assert (run.recipe, model.image_size) == ("own_images", 64)
    assert training.eps == pytest.approx(4 / 255)


def test_a_trained_model_means_the_recipe_to_harden_it(parser):
    data, model, training, run = parser.parse(["--model_name_or_path", "user/model", "--dataset_name", "somewhere"])
    assert (run.recipe, training.method, training.training_attack) == ("harden", "at", "nfgsm")
    assert training.label_smoothing_factor > 0 and training.learning_rate < 1e-3 and training.eps == 4 / 255
    assert training.output_dir.startswith("outputs/harden-at-user-model-")
    other = parser.parse(["--model_name_or_path", "user/other", "--image_mean", "0.5", "0.4", "0.3"])
    assert other[2].output_dir != training.output_dir  # no two models meet in a folder
    assert other[1].image_mean == [0.5, 0.4, 0.3]


def test_command_line_overrides_recipe(parser):
    _, model, training, _ = parser.parse(
        ["--eps", "2/255", "--method", "at", "--num_experts", "2", "--horizontal_flip"]
    )
    assert training.eps == pytest.approx(2 / 255)
    assert (training.method, model.num_experts, training.horizontal_flip) == ("at", 2, True)
    assert training.output_dir == "outputs/digits-at"
    assert parser.parse(["--output_dir", "here"])[2].output_dir == "here"


def test_values_of_a_recipe_can_be_unset(parser):
    _, model, training, _ = parser.parse(["--width", "none", "--alpha", "None", "--optim_args", "none"])
    assert (model.width, model.alpha, training.optim_args) == (None, None, None)


@pytest.mark.parametrize(
    ("recipe", "backbone", "width", "kwargs"),
    [
        ("digits", "convnext_atto", None, None),
        ("own_images", "vit_tiny_patch16_224", None, None),
        ("digits", "resnet34", "16,32,60,32", None),
        ("digits", "resnet18", "16,32,60,32", None),
        ("tinyimagenet_vit_small_64px", "vit_tiny_patch16_224", None, None),
        ("tinyimagenet_vit_small_64px", "vit_small_patch16_224", None, '{"patch_size": 8}'),
    ],
)
def test_another_backbone_does_not_get_the_shape_of_the_recipes(recipe, backbone, width, kwargs, parser):
    model = parser.parse(["--recipe", recipe, "--backbone", backbone])[1]
    assert (model.backbone, model.width, model.backbone_kwargs) == (backbone, width, kwargs)
    given = parser.parse(["--recipe", recipe, "--backbone", backbone, "--width", "0.5"])[1]
    assert given.width == "0.5"  # for the model to judge


@pytest.mark.parametrize(
    ("backbone", "shared", "warned"),
    [
        ("mobilenetv3_small_050", 0, True),
        ("mobilenetv3_small_050.lamb_in1k", 0, True),
        ("lipschitz_mlp", 0, True),
        ("resnet34", 2, False),
        ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 2, False),
        ("deit_tiny_distilled_patch16_224", 2, False),
    ],
)
def test_stages_are_shared_by_default_only_where_they_can_be(backbone, shared, warned, parser, caplog):
    command = ["--recipe", "own_images", "--width", "none", "--backbone", backbone]
    assert parser.parse(command)[1].shared_stages == shared
    assert ("shared_stages=2" in caplog.text) is warned
    assert parser.parse([*command, "--shared_stages", "1"])[1].shared_stages == 1  # for the model to judge


@pytest.mark.parametrize("eps", ["0.03", "1/255", "0", "0.3"])
@pytest.mark.parametrize("recipe", ["digits", "own_images"])
def test_attacks_on_the_standard_model_keep_their_share_of_eps(parser, recipe, eps):
    training = parser.parse(["--recipe", recipe, f"--eps={eps}"])[2]
    assert training.standard_eps == pytest.approx(training.eps / 2) and 0 <= training.standard_eps <= training.eps
    assert parser.parse(["--recipe", recipe, "--eps", "0.3", "--standard_eps", "0.01"])[2].standard_eps == 0.01
    plain = RecipeParser(TRAINING / "recipes", description="").parse(["--recipe", "paper", "--eps", eps])
    assert plain[2].standard_eps == 0


@pytest.mark.parametrize("recipe", sorted(p.stem for p in (TRAINING / "recipes").glob("*.yaml")))
def test_every_recipe_parses_and_builds_a_config(parser, recipe):
    _, model, training, _ = parser.parse(["--recipe", recipe])
    # without an attack to select by, or with a start that others go on from, the last weights are the result
    keeps_last = training.method == "certified" or recipe.endswith("_narrow")
    assert training.load_best_model_at_end != keeps_last and training.report_to in ([], ["none"], "none")
    config = model.moe_config(load_splits("digits"))
    assert config.num_experts == (1 if recipe.endswith("_single") or keeps_last else 4) and config.id2label[9] == "9"
    assert training.create_training_attack().eps == training.eps


@pytest.mark.parametrize(("experts", "top_k"), [("1", 1), ("3", 3), ("8", 4)])
def test_a_recipe_that_mixes_all_experts_mixes_no_more_than_there_are(experts, top_k, parser):
    _, model, _, _ = parser.parse(["--recipe", "digits", "--num_experts", experts])
    assert model.router_top_k == top_k


def test_a_recipe_of_ones_own(parser, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("method: trades\neps: 3/255\nbackbone_kwargs: {drop_rate: 0.1}\n")
    _, model, training, _ = parser.parse(["--recipe", str(path)])
    assert training.method == "trades" and training.eps == pytest.approx(3 / 255)
    assert model.moe_config(load_splits("digits")).backbone_kwargs == {"drop_rate": 0.1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("methodd: at", "unknown settings methodd"),
        (None, "neither a file nor one of cifar10_resnet18, cifar10_resnet18_narrow, cifar10_resnet18_single"),
    ],
)
def test_bad_recipes_are_named(parser, tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        parser.parse(["--recipe", str(path)])


def test_json_and_width():
    assert parse_json("x", '{"a": 1}') == {"a": 1}
    assert parse_json("x", None) is None
    assert parse_width("0.25") == 0.25
    assert parse_width("8,16,24,32") == [8, 16, 24, 32]
    for function, text in ((lambda t: parse_json("backbone_kwargs", t), "{"), (parse_width, "wide")):
        with pytest.raises(ValueError, match="backbone_kwargs='{'|width='wide'"):
            function(text)


def test_help_is_grouped_and_complete(monkeypatch):
    texts = {}
    for flag in ("--help", "--help_all"):
        monkeypatch.setattr(sys, "argv", ["run.py", flag])
        texts[flag] = RecipeParser(TRAINING / "recipes", description="Train.").format_help()
    positions = [texts["--help"].index(f"\n{g}:") for g in ("recipe", "data", "model", "objective", "optimisation")]
    assert positions == sorted(positions)
    assert "--eps VALUE" in texts["--help"] and "--dataset-name" not in texts["--help"]
    assert "--adam_beta1" not in texts["--help"] and "--adam_beta1" in texts["--help_all"]
    assert len(texts["--help"].splitlines()) < 300 and "(default: None)" not in texts["--help_all"]


def test_pixel_statistics_are_counted_once_and_without_a_float_copy(parser, monkeypatch):
    data, counts = load_splits("digits"), []
    bincount = torch.Tensor.bincount
    monkeypatch.setattr(torch.Tensor, "bincount", lambda self, **kw: counts.append(len(self)) or bincount(self, **kw))
    monkeypatch.setattr(torch.Tensor, "float", lambda self: pytest.fail(f"a float copy of {tuple(self.shape)}"))
    model = parser.parse([])[1]
    configs = [model.moe_config(data), model.dual_config(data, 0.7).standard, model.dual_config(data, 0.7).robust]
    assert sum(counts) == data.train.images.numel()
    assert all((c.image_mean, c.image_std) == ([0.3057], [0.3761]) for c in configs)  # those of the published model
