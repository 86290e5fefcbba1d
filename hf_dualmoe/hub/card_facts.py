"""What a model card takes from a `RobustnessReport` and a config: numbers, attacks, names, the kind of model."""

import math
import re
from typing import Any

from ..evaluation.plots import radius_text
from ..evaluation.report import RobustnessReport

TITLES = {
    "sa": "clean images (SA)",
    "ra_worst_case": "worst case over all attacks, image by image",
    "ra_adaptive_union": "adaptive union",
    "ra_autoattack": "AutoAttack",
}
STRONGEST_FIRST = ("ra_worst_case", "ra_autoattack", "ra_adaptive_union")


def number(value: Any) -> float | None:
    """A finite number as float; None for anything else."""
    # a report may be written by hand: a bool is an int, and JSON of Python has NaN
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def accuracies(metrics: dict[str, Any]) -> dict[str, float]:
    """SA, then every RA in %, the pointwise worst case last."""
    keys = ["sa", *(name for name in metrics if name.startswith("ra_") and name != "ra_worst_case"), "ra_worst_case"]
    return {key: metrics[key] for key in keys if number(metrics.get(key)) is not None}


def headline(metrics: dict[str, Any]) -> str | None:
    """The key of the RA that counts: of the strongest attack that was measured."""
    measured = [key for key in accuracies(metrics) if key != "sa"]
    # only weak attacks: the lowest number is the least flattering
    return next((key for key in STRONGEST_FIRST if key in measured), min(measured, key=metrics.get, default=None))


def interval(report: RobustnessReport, key: str) -> list[float] | None:
    """The 95 % interval of an accuracy, in %."""
    return report.metrics.get("intervals", {}).get(key)


def certified(report: RobustnessReport) -> list[dict[str, Any]]:
    """Points {"radius", "accuracy", ...} of certified accuracy."""
    points = report.metrics.get("certified", [])
    return [p for p in points if None not in (number(p.get("radius")), number(p.get("accuracy")))]


def ball(report: RobustnessReport) -> dict[str, Any]:
    """Norm and radius of the attacks, where the report has them."""
    return {name: report.threat[name] for name in ("norm", "eps") if name in report.threat}


def radius(report: RobustnessReport) -> str:
    """The radius as people write it, such as L∞ 8/255; empty where the report has none."""
    return radius_text(report.threat["eps"], report.threat["norm"]) if len(ball(report)) == 2 else ""


def attack_settings(report: RobustnessReport, key: str) -> str | None:
    """The settings of an attack as the report has them."""
    attacks = report.threat.get("attacks", {})
    # the union's settings are noted under the name of its part, worst_case
    names = (key, key.removeprefix("ra_"), "worst_case" if key == "ra_adaptive_union" else None)
    return None if key == "ra_worst_case" else next((attacks[name] for name in names if name in attacks), None)


def metric_title(key: str) -> str:
    """ra_pgd20 -> PGD-20, ra_expert_pgd20 -> PGD-20 on the expert alone (RA-E)."""
    if key in TITLES:
        return TITLES[key]
    name = key.removeprefix("ra_")
    for part, short in (("expert", "RA-E"), ("router", "RA-R")):
        if name.startswith(part + "_"):
            return f"{metric_title('ra_' + name.removeprefix(part + '_'))} on the {part} alone ({short})"
    return re.sub(r"^pgd(\d+)$", r"PGD-\1", name.replace("_", " "))


def data_name(report: RobustnessReport) -> str:
    """Name of the test data; of a local folder the last part only."""
    name = one_line(report.dataset.get("name") or "unknown data")
    local = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if local else name


def is_dual(report: RobustnessReport | None, config: dict[str, Any]) -> bool:
    """Whether the model has a dial."""
    return config.get("model_type") == "dual_moe" or (report is not None and report.model.get("kind") == "dual model")


def mixes_weights(report: RobustnessReport | None, config: dict[str, Any]) -> bool:
    """Whether the dial is in the weights, so that one network answers."""
    measured = None if report is None else report.model.get("mixing")
    return config.get("mixing", measured) == "weights"


def has_code(report: RobustnessReport | None, config: dict[str, Any]) -> bool:
    """Whether the model comes with code of its own."""
    ours = report is not None and report.model.get("kind") in ("dual model", "mixture of experts")
    return "auto_map" in config or (ours and not config)  # no config at hand: ours are saved with their code


def needs_package(config: dict[str, Any]) -> bool:
    """Whether the model is ours and has no code beside it, so that only this package can load it."""
    return config.get("model_type") in ("dual_moe", "robust_moe") and "auto_map" not in config


def one_line(value: Any) -> str:
    """A value as text without line breaks: they would end a table or start a heading."""
    return re.sub(r"\s+", " ", str(value))


__all__ = ["accuracies", "headline", "number"]
