"""Plots: PNG files that change with every number they show, and refuse reports without those numbers."""

import pytest
import torch

from hf_dualmoe.attacks.pgd import PGD
from hf_dualmoe.evaluation.evaluation import RobustnessReport
from hf_dualmoe.evaluation.plots import (
    attack_examples,
    attack_text,
    plot_eps_curve,
    plot_examples,
    plot_expert_load,
    plot_tradeoff,
    radius_text,
    shorten,
)


def make_report() -> RobustnessReport:
    sweep = [(0.0, 94.0, 3.0), (0.5, 93.5, 11.0), (0.75, 90.0, 44.0), (0.9, 85.0, 50.0), (1.0, 82.0, 51.0)]
    return RobustnessReport(
        model={"kind": "dual model", "alpha": 0.75, "parameters": 10},
        dataset={"name": "toy", "num_images": 500, "class_names": [*"abcdefghij"]},
        threat={"norm": "linf", "eps": 8 / 255, "attacks": {}},
        metrics={
            "sa": 90.0,
            "ra_pgd20": 44.0,
            "components": {"standard": {"sa": 94.0, "ra_pgd20": 3.0}, "robust": {"sa": 82.0, "ra_pgd20": 51.0}},
            "eps_curve": [{"eps": e / 255, "ra_pgd20": ra} for e, ra in ((0, 90.0), (4, 66.0), (8, 44.0), (16, 12.0))],
            "expert_load": {"clean": [40.0, 30.0, 20.0, 10.0], "attacked": [25.0, 5.0, 50.0, 20.0]},
            "route_flip_rate": 37.0,
        },
        alpha_sweep=[{"alpha": alpha, "sa": sa, "ra_pgd20": ra} for alpha, sa, ra in sweep],
        alpha_choice={"alpha": 0.75, "sa": 90.0, "ra": 44.0, "rule": "r", "chosen_on": "c"},
    )


CHANGES = {
    plot_tradeoff: {
        "alpha_sweep 2 sa": 97.0,
        "alpha_sweep 2 ra_pgd20": 20.0,
        "metrics components robust sa": 83.0,
        "metrics components standard ra_pgd20": 5.0,
        "alpha_choice alpha": 0.9,
        "threat eps": 4 / 255,
        "dataset num_images": 501,
    },
    plot_eps_curve: {
        "metrics eps_curve 1 ra_pgd20": 50.0,
        "threat eps": 4 / 255,
        "threat norm": "l2",
        "dataset class_names": ["a", "b"],
    },
    plot_expert_load: {
        "metrics expert_load clean": [10.0, 30.0, 20.0, 40.0],
        "metrics expert_load attacked": [20.0, 10.0, 50.0, 20.0],
        "metrics route_flip_rate": 38.0,
    },
}


def changed(place: str, value) -> RobustnessReport:
    """The report with another value at a place, as "alpha_sweep 2 sa"."""
    report = make_report()
    first, *between, last = (int(key) if key.isdigit() else key for key in place.split())
    part = getattr(report, first)
    for key in between:
        part = part[key]
    assert part[last] != value
    part[last] = value
    return report


@pytest.mark.parametrize("plot", CHANGES, ids=lambda plot: plot.__name__)
def test_plots_are_pngs_that_depend_on_every_number(plot, tmp_path):
    def draw(report):
        plot(report, tmp_path / "plot.png")
        content = (tmp_path / "plot.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        return content

    original = draw(make_report())
    assert draw(make_report()) == original  # so that a difference below is one of the numbers
    for place, value in CHANGES[plot].items():
        assert draw(changed(place, value)) != original, place


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        (plot_tradeoff, "alpha_sweep"),
        (plot_eps_curve, "level='standard'"),
        (plot_expert_load, "no mixture of experts"),
    ],
)
def test_reports_without_the_numbers_are_refused(plot, message, tmp_path):
    report = make_report()
    report.alpha_sweep, report.metrics = [], {}
    with pytest.raises(ValueError, match=message):
        plot(report, tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def test_examples_show_what_the_attack_did(toy_dual, toy_data, tmp_path):
    strips = {}
    for eps in (0.0, 0.3):
        examples = attack_examples(toy_dual, toy_data, attack=PGD(eps=eps, steps=5, seed=0))
        assert examples.clean.shape == (6, 1, 10, 10)
        assert (examples.attacked - examples.clean).abs().max() == pytest.approx(eps, abs=1e-6)
        for points, predictions in (
            (examples.clean, examples.clean_predictions),
            (examples.attacked, examples.attacked_predictions),
        ):
            assert torch.equal(predictions, toy_dual(points).logits.argmax(dim=1))
        plot_examples(examples, tmp_path / f"{eps}.png")
        strips[eps] = (tmp_path / f"{eps}.png").read_bytes()
        assert strips[eps].startswith(b"\x89PNG")
    assert (examples.attacked_predictions != examples.labels).any()
    assert strips[0.0] != strips[0.3]


def test_texts():
    assert radius_text(8 / 255, "linf") == "L∞ 8/255" and radius_text(0.5, "l2") == "L2 0.5"
    assert radius_text(0.05, "linf") == "L∞ 0.05" and radius_text(0.0, "linf") == "L∞ 0"
    assert attack_text("ra_pgd20") == "PGD-20"
    assert shorten("short") == "short" and shorten("a very long class name") == "a very long c…"
