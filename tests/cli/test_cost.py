"""What an evaluation will cost, said before it starts: at least what it then takes, and times that add up."""

from argparse import Namespace

import pytest
import torch
from conftest import NUM_LABELS

from hf_dualmoe import DualMoEForImageClassification
from hf_dualmoe.cli.cost import Cost, PassTime, Work, evaluation_work, smoothing_work, time_passes
from hf_dualmoe.data.datasets import DataSplits, ImageTensorDataset
from hf_dualmoe.evaluation.evaluation import evaluate_robustness

LEVEL = ["components", "dial", "component_attacks", "eps_curve", "worst_case", "sanity"]


@pytest.fixture
def data():
    images = torch.randint(0, 256, (7, 3, 30, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    part = ImageTensorDataset(images, torch.arange(7) % NUM_LABELS, [f"LABEL_{i}" for i in range(NUM_LABELS)])
    return DataSplits(None, part.subset([0, 1]), part, name="noise")


def test_no_part_takes_more_than_was_said(data, make_moe, resnet_moe):
    small = {"backbone": "resnet10t", "num_experts": 2}
    model = DualMoEForImageClassification.from_models(make_moe(**small), make_moe(**small))
    args = Namespace(steps=2, alphas=[0.0, 0.5, 1.0], level=",".join(LEVEL), max_test_samples=None)
    vars(args).update(sanity_images=3, worst_case_steps=None, union_restarts=1, autoattack_version=None)
    said = evaluation_work(args, model, data, LEVEL)
    assert "dial" in said and "dial" not in evaluation_work(args, resnet_moe, data, LEVEL)
    options = {"steps": 2, "alphas": args.alphas, "sanity_images": 3, "progress": False, "level": LEVEL[:-1]}
    report = evaluate_robustness(model, data.test, eps=8 / 255, held_out=data.validation, **options)
    attacks = sum(work.gradient * work.images for name, work in said.items() if name != "sanity checks")
    assert 0 < report.cost["total"]["gradient"] * len(data.test) <= attacks
    union = next(cost for name, cost in report.cost.items() if name.startswith("worst case"))
    assert union["gradient"] <= said["adaptive union"].gradient


def test_the_dial_alone_measures_its_ends_too(data, make_dual):
    model, alphas = make_dual(), [0.0, 0.5, 1.0]
    args = Namespace(steps=2, alphas=alphas, level="dial", max_test_samples=None)
    positions = len({*alphas} - {model.config.alpha})
    assert evaluation_work(args, model, data, ["dial"])["dial"] == Work(7, 2 * positions, 3 * positions)


def test_autoattack_and_smoothing_are_counted(data, make_moe):
    args = Namespace(steps=2, level="autoattack", max_test_samples=5, autoattack_version=None)
    work = evaluation_work(args, make_moe(), data, ["autoattack"])["AutoAttack"]
    targets = NUM_LABELS - 1
    assert work == Work(5, 100 + 100 * targets + 100 * targets, 100 + 200 * targets + 5000)
    assert smoothing_work(5, [0.25, 0.5], 100, 1000) == {
        "sigma = 0.25": Work(5, 0, 1100),
        "sigma = 0.5": Work(5, 0, 1100),
    }


def test_times_add_up():
    pass_time = PassTime(forward=0.5, gradient=2.0, batch=4, hardware="an abacus")
    cost = Cost({"clean and PGD": Work(10, 20, 3), "sanity checks": Work(2, 5, 0)}, pass_time, processes=2)
    assert cost.seconds(Work(10, 20, 3)) == 10 * (20 * 2.0 + 3 * 0.5) / 2
    text = cost.text()
    assert "at most 21 gradient and 3 forward passes per image on 10 images, about 3.6 min on an abacus" in text
    assert "clean and PGD 3.5 min, sanity checks 10.0 s" in text and "one batch of 4 images" in text


def test_passes_are_timed_on_a_model_without_gradients_too(data, resnet_moe):
    class Rounded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = resnet_moe

        def forward(self, images):
            return self.model(images.detach()).logits.detach()

    for model in (resnet_moe, Rounded()):
        found = time_passes(model, data.test, batch_size=4)
        assert found.forward > 0 and found.gradient > 0 and found.batch == 4 and found.hardware
