"""method="certified" of the Trainer and of training/run.py: what it trains, keeps, refuses and survives."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_dualmoe import MoEConfig, MoEForImageClassification
from hf_dualmoe.certification.certifier import certify
from hf_dualmoe.certification.lipschitz import lipschitz_bound
from hf_dualmoe.data.datasets import ImageTensorDataset, load_splits, to_unit_range
from hf_dualmoe.losses.certified import backbone_slope
from hf_dualmoe.models import lipschitz_dualmoe
from hf_dualmoe.trainer.arguments import RobustTrainingArguments
from hf_dualmoe.trainer.trainer import RobustTrainer

TRAINING = Path(__file__).parents[2] / "training"
MLP = {"backbone": "lipschitz_mlp", "backbone_kwargs": {"hidden_sizes": [16], "logit_scale": 8.0}}
needs_torchlip = pytest.mark.skipif(
    lipschitz_dualmoe.bjorck_normalization is None, reason="training 1-Lipschitz backbones needs deel-torchlip"
)


def build(**changes):
    torch.manual_seed(0)
    fields = {**MLP, "num_labels": 3, "image_size": 10, "num_channels": 1, "image_std": 0.5, "num_experts": 2}
    return MoEForImageClassification(MoEConfig(**{**fields, "router": "pooled", **changes}))


@pytest.fixture(scope="module")
def stripes():
    """Images whose class is the third that is bright, with noise."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(3, (60,), generator=generator)
    images = torch.randint(0, 90, (60, 1, 10, 10), generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, 3 * label : 3 * label + 4] += 130
    return ImageTensorDataset(images, labels, ["top", "middle", "bottom"])


@pytest.fixture
def trainer_of(stripes, tmp_path):
    def make(model, folder="run", **changes):
        settings = {
            "output_dir": str(tmp_path / folder),
            "method": "certified",
            "certify_radius": 0.4,
            "num_train_epochs": 12,
            "per_device_train_batch_size": 20,
            "learning_rate": 5e-3,
            "save_strategy": "no",
            "crop_padding": 0,
            "horizontal_flip": False,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
        }
        return RobustTrainer(model, RobustTrainingArguments(**{**settings, **changes}), train_dataset=stripes)

    return make


def certified_at(model, dataset, radius):
    return certify(model.eval(), to_unit_range(dataset.images)).certified_accuracy(dataset.labels, [radius])[0]


# --- what it trains --------------------------------------------------------------------------------------------------


@needs_torchlip
@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"num_experts": 1}, {}),
        ({}, {"route_weight": 0.1, "bf16": True}),
        ({"router_top_k": 2}, {"gate_weight": 0.01, "ema_decay": 0.8}),
        ({"backbone": "lipschitz_cnn", "backbone_kwargs": {"channels": [4, 8], "depth": 1, "hidden_size": 8}}, {}),
    ],
    ids=["one network", "hard routing in bf16", "mixed with a moving average", "convolutions"],
)
def test_certified_accuracy_rises_and_is_saved(fields, options, trainer_of, stripes, tmp_path):
    model = build(**fields)
    before = certified_at(model, stripes, 0.2)
    trainer_of(model, **options).train()
    after = certified_at(model, stripes, 0.2)
    assert after > max(before + 20, 60)

    scale = model.config.backbone_kwargs.get("logit_scale", 1.0)
    for expert in model.experts:  # also where weights of many steps are averaged: no norm exceeds that of its parts
        assert lipschitz_bound(expert, (1, 10, 10)).outputs < 1.1 * scale
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.float32
    assert certified_at(loaded, stripes, 0.2) == after


@needs_torchlip
def test_the_margin_penalty_is_what_raises_it(trainer_of, stripes):
    found = []
    for weight in (0.0, 3.0):
        model = build(num_experts=1, backbone_kwargs={"hidden_sizes": [16], "logit_scale": 64.0})
        trainer_of(model, margin_weight=weight).train()
        found.append(certified_at(model, stripes, 0.4))
    assert found[1] > found[0] + 10


@needs_torchlip
def test_a_resumed_run_equals_an_unbroken_one(trainer_of):
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "ema_decay": 0.5, "route_weight": 0.1}
    whole = trainer_of(build(), "whole", **options)
    whole.train()
    resumed = trainer_of(build(), "resumed", **options)
    with torch.no_grad():  # vectors of the power iterations included
        for tensor in resumed.model.state_dict().values():
            tensor.add_(0.5)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@needs_torchlip
def test_a_loss_that_is_not_finite_is_left_out(trainer_of):
    model = build()
    trainer = trainer_of(model, num_train_epochs=2, on_nan_loss="skip", route_weight=0.1)
    objective, calls = trainer.objective, []

    def poisoned(*args, **kwargs):
        calls.append(1)
        output = objective(*args, **kwargs)
        return replace(output, loss=output.loss * (float("nan") if len(calls) == 2 else 1.0))

    trainer.objective = poisoned
    trainer.train()
    assert trainer.watch.skipped == 1 and len(calls) == 6
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.fixture
def with_torchlip(monkeypatch):
    """These refusals come before the library is used."""
    monkeypatch.setattr(lipschitz_dualmoe, "bjorck_normalization", object())


@pytest.mark.parametrize(
    ("fields", "weights", "message"),
    [
        ({"router_top_k": 2}, {"route_weight": 0.1}, "route_weight=0.1 is for hard routing, not for router_top_k=2"),
        ({}, {"gate_weight": 0.1}, "gate_weight=0.1 is for all experts mixed, not for router_top_k=1"),
        ({"num_experts": 1}, {"route_weight": 0.1}, "route_weight=0.1: one expert has no routes"),
        ({"router": "conv"}, {}, "router='conv' is not affine"),
        ({"num_experts": 3, "router_top_k": 2}, {}, "router_top_k=2 of num_experts=3 has no certificate"),
        ({"backbone_image_size": 20}, {}, "backbone_image_size=20 resizes images"),
    ],
    ids=str,
)
def test_a_model_without_a_certificate_is_refused(fields, weights, message, trainer_of, with_torchlip, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(build(**fields), **weights)
    assert not (tmp_path / "run").exists()


def test_missing_library_is_named_before_training(trainer_of, monkeypatch):
    monkeypatch.setattr(lipschitz_dualmoe, "bjorck_normalization", None)
    with pytest.raises(ImportError, match="pip install deel-torchlip"):
        trainer_of(build())


# --- training/run.py -------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch):
    spec = importlib.util.spec_from_file_location("run_script", TRAINING / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments), "--disable_tqdm", "true"])
        module.main()

    return call


def test_slope_is_that_of_the_channel_with_the_smallest_std():
    model = build(num_channels=3, image_std=[0.4, 0.25, 0.5])
    assert backbone_slope(model) == pytest.approx(2**0.5 * 8 / 0.25)


@needs_torchlip
def test_the_recipe_trains_a_network_with_certificates(run, tmp_path):
    run("--recipe", "digits_certified", "--num_train_epochs", 8, "--output_dir", tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert model.config.image_std == [0.5] and backbone_slope(model) == pytest.approx(2**0.5 * 32 / 0.5)
    test = load_splits("digits").test.take(100)
    assert certified_at(model, test, 0.1) > 50
    results = json.loads((tmp_path / "model" / "results.json").read_text())
    training = results["training"]
    assert (training["method"], training["certify_radius"], training["margin_weight"]) == ("certified", 0.5, 1.0)
    assert not {"beta", "attack_steps", "eps"} & set(training)
    assert results["threat"]["norm"] == "l2"
    assert results["metrics"]["ra_pgd20"] >= certified_at(model, load_splits("digits").test, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "certified"], "method='certified' needs backbone='lipschitz_mlp' or 'lipschitz_cnn'"),
        (["--recipe", "digits_certified", "--num_experts", "3", "--router_top_k", "2"], "has no certificate"),
        (["--recipe", "digits_certified", "--certify_radius", "0"], "certify_radius=0.0 must be finite and > 0"),
        (["--recipe", "digits_certified", "--method", "rt_er"], "num_experts >= 2"),
    ],
    ids=str,
)
def test_run_refuses_what_cannot_be_certified(run, arguments, message, with_torchlip, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run("--output_dir", tmp_path / "out", *arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
