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


def robustbench_accuracy(model, x, y, batch_size=100, device=None):
    """Accuracy in [0, 1] as RobustBench calls a model: with one positional batch of images in [0, 1] at a time."""
    assert not model.training
    model = model.to(device)
    correct = 0
    with torch.no_grad():
        for start in range(0, len(x), batch_size):
            output = model(x[start : start + batch_size].to(device))
            assert isinstance(output, torch.Tensor) and output.dtype == torch.float32
            correct += (output.max(1)[1] == y[start : start + batch_size].to(device)).float().sum()
    return correct.item() / len(x)


def check_attacked(model, images, attacked, labels):
    """The attack did what an L-inf attack of radius EPS promises, and it hurt."""
    assert attacked.shape == images.shape and torch.isfinite(attacked).all()
    assert (attacked - images).abs().max() <= EPS + 1e-5
    assert attacked.min() >= 0 and attacked.max() <= 1
    clean, robust = (robustbench_accuracy(model, x, labels, device="cpu") for x in (images, attacked))
    assert clean >= 0.85 and robust <= clean - 0.2


def test_robustbench_style_evaluation(digits):
    model, images, labels = digits
    with torch.no_grad():
        expected = (model.model(images).logits.argmax(1) == labels).float().mean().item()
    for batch_size in (1, 7, 100):
        assert robustbench_accuracy(model, images, labels, batch_size, "cpu") == pytest.approx(expected)


def test_robustbench_itself(digits):
    evaluation = pytest.importorskip("robustbench.utils", reason="robustbench or one of its parts is not installed")
    model, images, labels = digits
    found = evaluation.clean_accuracy(model, images, labels, batch_size=13, device=torch.device("cpu"))
    assert found == pytest.approx(robustbench_accuracy(model, images, labels, device="cpu"))


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
    robust = 1 - success.float().mean().item()
    assert robust == pytest.approx(robustbench_accuracy(model, attacked, labels, device="cpu"))
