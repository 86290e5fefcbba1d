"""Other people's tools take our models, through `LogitsModel`, as they take any `torch.nn.Module`."""

import pytest
import torch

from hf_dualmoe import DualMoEForImageClassification
from hf_dualmoe.hub.onnx import LogitsModel

EPS = 0.1


@pytest.fixture
def digits(trained_digits_moe):
    """(dual model of two trained mixtures as images -> logits, images, labels)."""
    model, images, labels = trained_digits_moe
    return LogitsModel(DualMoEForImageClassification.from_models(model, model, alpha=0.8)), images, labels


@torch.no_grad()
def accuracy(model, images, labels):
    return (model(images).argmax(1) == labels).float().mean().item()


def check_attacked(model, images, attacked, labels):
    """The attack did what an L-inf attack of radius EPS promises, and it hurt."""
    assert attacked.shape == images.shape and torch.isfinite(attacked).all()
    assert (attacked - images).abs().max() <= EPS + 1e-5
    assert attacked.min() >= 0 and attacked.max() <= 1
    assert accuracy(model, images, labels) >= 0.85
    assert accuracy(model, attacked, labels) <= accuracy(model, images, labels) - 0.2


def test_robustbench(digits):
    evaluation = pytest.importorskip("robustbench.utils", reason="robustbench or one of its parts is not installed")
    model, images, labels = digits
    found = evaluation.clean_accuracy(model, images, labels, batch_size=13, device=torch.device("cpu"))
    assert found == pytest.approx(accuracy(model, images, labels))


def test_torchattacks(digits):
    torchattacks = pytest.importorskip("torchattacks")
    model, images, labels = digits
    attack = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=10)
    check_attacked(model, images, attack(images, labels), labels)
    assert not model.model.training


def test_foolbox(digits):
    foolbox = pytest.importorskip("foolbox")
    model, images, labels = digits
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(rel_stepsize=0.25, steps=10)
    _, attacked, success = attack(wrapped, images, labels, epsilons=EPS)
    check_attacked(model, images, attacked, labels)
    assert 1 - success.float().mean().item() == pytest.approx(accuracy(model, attacked, labels))
