"""Reports: numbers recomputed by hand, JSON round trip, table and plot."""

import copy
import json

import pytest
import torch

from hf_dualmoe import DualMoEConfig, DualMoEForImageClassification, MoEConfig, MoEForImageClassification
from hf_dualmoe.attacks import PGD
from hf_dualmoe.data import ImageTensorDataset
from hf_dualmoe.evaluation import DialedModel, RobustnessReport, correct_mask, evaluate_robustness
from hf_dualmoe.plots import plot_tradeoff

TINY = {"width": [8, 8, 8, 16], "num_labels": 3, "image_size": 10, "num_channels": 1, "num_experts": 2}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = DualMoEConfig(standard=MoEConfig(**TINY), robust=MoEConfig(**TINY), alpha=0.6)
    return DualMoEForImageClassification(config).eval()


@pytest.fixture(scope="module")
def dataset(model):
    """Random images with the labels that the standard model gives, so that accuracies are neither 0 nor 100 %."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (23, 1, 10, 10), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        labels = model(images / 255).standard_logits.argmax(dim=1)
    labels[:5] = (labels[:5] + 1) % 3
    return ImageTensorDataset(images, labels, ["a", "b", "c"])


@pytest.fixture(scope="module")
def report(model, dataset):
    return evaluate_robustness(model, dataset, eps=0.01, steps=3, dataset_name="toy", progress=False)


def test_correct_mask_matches_a_loop_over_images(model, dataset):
    attack = PGD(eps=0.01, steps=3, seed=0)
    mask = correct_mask(model, dataset, attack=attack, batch_size=7)
    for i in range(len(dataset)):
        image, label = dataset.images[i : i + 1] / 255, dataset.labels[i : i + 1]
        attacked = attack(model, image, label, ids=torch.tensor([i]))
        assert bool(model(attacked).logits.argmax() == label) == bool(mask[i]), i


def test_evaluation_leaves_a_training_model_as_it_was(model, dataset):
    trained = copy.deepcopy(model).train()
    before = copy.deepcopy(trained.state_dict())
    evaluate_robustness(trained, dataset, eps=0.01, steps=2, progress=False)
    assert trained.training
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())


def test_report_holds_components_dial_and_routing(model, dataset, report):
    key = "ra_pgd3"
    assert report.metrics["components"]["standard"]["sa"] == pytest.approx(100 * 18 / 23, abs=1e-4)
    sweep = {point["alpha"]: point for point in report.alpha_sweep}
    assert list(sweep) == [0.0, 0.5, 0.75, 0.9, 1.0]
    for alpha, name in ((0.0, "standard"), (1.0, "robust")):
        attack = PGD(eps=0.01, steps=3, seed=0)
        clean = correct_mask(DialedModel(model, alpha), dataset)
        attacked = correct_mask(DialedModel(model, alpha), dataset, attack=attack)
        expected = {"sa": 100 * clean.float().mean(), key: 100 * (clean & attacked).float().mean()}
        for metric, value in expected.items():
            assert sweep[alpha][metric] == pytest.approx(float(value), abs=1e-4)
            assert report.metrics["components"][name][metric] == pytest.approx(float(value), abs=1e-4)
    assert all(point[key] <= point["sa"] for point in report.alpha_sweep)
    for load in report.metrics["expert_load"].values():
        assert sum(load) == pytest.approx(100, abs=0.02)
    routes = model.robust.route(dataset.images / 255).argmax(dim=1)
    assert report.metrics["expert_load"]["clean"][0] == pytest.approx(
        100 * float((routes == 0).float().mean()), abs=0.01
    )
    assert report.threat["eps"] == 0.01
    assert report.dataset["num_images"] == 23


def test_report_survives_json_and_is_written_as_numbers_come(model, dataset, report, tmp_path, monkeypatch):
    path = tmp_path / "sub" / "results.json"
    report.save(path)
    assert RobustnessReport.load(path) == report
    assert not list(path.parent.glob("*.partial"))

    def break_down(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("hf_dualmoe.evaluation.DialedModel", break_down)
    early = tmp_path / "early.json"
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate_robustness(model, dataset, eps=0.01, steps=3, path=early, progress=False)
    saved = json.loads(early.read_text())
    assert saved["metrics"]["components"]["robust"] == report.metrics["components"]["robust"]


def test_table_shows_every_row(report):
    table = report.table()
    assert "SA %" in table and "RA PGD3 %" in table
    assert "dual model (alpha = 0.6)" in table
    for row in ("standard alone", "robust alone", "dial at alpha = 0.9"):
        assert row in table
    assert f"{report.metrics['sa']:.2f}" in table
    assert len({len(line) for line in table.splitlines()}) == 1  # aligned


def test_a_single_mixture_has_no_dial(dataset, tmp_path):
    moe = MoEForImageClassification(MoEConfig(**TINY)).eval()
    report = evaluate_robustness(moe, dataset, eps=0.01, steps=2, progress=False)
    assert report.alpha_sweep == [] and "components" not in report.metrics
    assert "expert_load" in report.metrics
    with pytest.raises(ValueError, match="alpha_sweep"):
        plot_tradeoff(report, tmp_path / "plot.png")


def test_plot_is_a_png_that_depends_on_the_numbers(report, tmp_path):
    plot_tradeoff(report, tmp_path / "a.png")
    other = copy.deepcopy(report)
    other.alpha_sweep[2]["sa"] += 7
    plot_tradeoff(other, tmp_path / "b.png")
    content = [(tmp_path / name).read_bytes() for name in ("a.png", "b.png")]
    assert all(c.startswith(b"\x89PNG") for c in content)
    assert content[0] != content[1]
