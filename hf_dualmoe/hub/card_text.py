"""The words and tables of a model card, from a `RobustnessReport`; `model_card` puts them into the template."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..evaluation.report import RobustnessReport
from .card_facts import (
    STRONGEST_FIRST,
    accuracies,
    attack_settings,
    certified,
    data_name,
    has_code,
    headline,
    interval,
    is_dual,
    metric_title,
    mixes_weights,
    needs_package,
    number,
    one_line,
    radius,
)

PLOTS = ("tradeoff.png", "eps_curve.png", "expert_load.png", "examples.png")  # those with a place in the template
METHODS = {
    "standard": "ordinary training, without attacks",
    "certified": "training of 1-Lipschitz networks for wide margins, without attacks",
    "at": "adversarial training",
    "trades": "TRADES",
    "rt_er": "RT-ER (adversarial training of a mixture of experts)",
    "jtdmoe": "JTDMoE (joint training of a standard and a robust model)",
}
SETTINGS = {
    "num_images": "training images",
    "train_runtime_s": "training time, s",
    "best_validation": "best on validation",
}
HOW = {  # where the report has no settings
    "sa": "no attack",
    "ra_worst_case": "an image counts only where it withstands every attack on the whole model",
    "ra_expert": "routes held, gradient of the chosen experts",
    "ra_router": "changes the route, then the whole model decides",
}


@dataclass(frozen=True)
class CardSubject:
    """Subject of a card, besides the report.

    Args:
        name: Name of the model.
        repo_id: Hub id under which it is loaded; None = a local folder.
        config: Content of `config.json`; {} where it is not known.
        plots: File names of the plots beside the card.
    """

    name: str
    repo_id: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    plots: Collection[str] = ()


# --- words -----------------------------------------------------------------------------------------------------------


def model_text(report: RobustnessReport | None, subject: CardSubject) -> dict[str, Any]:
    """Texts about the model itself: summary, cautions, how to load it, the dial."""
    config, dual = subject.config, is_dual(report, subject.config)
    known = {} if report is None else report.model
    alpha = config.get("alpha", known.get("alpha")) if dual else None
    # a commit, not a branch: code that comes with a model could change under its users
    pinned = f'"{subject.repo_id}", revision="<commit>"' if subject.repo_id else '"path/to/this/folder"'
    return {
        "title": subject.name,
        "summary": summary(report, config),
        "caution": caution(report, alpha, config),
        "has_code": has_code(report, config),
        "needs_package": needs_package(config),
        "source": pinned,
        "pinned": subject.repo_id is not None,
        "is_dual": dual,
        "mixes_weights": mixes_weights(report, config),
        "alpha": alpha,
        "mild_standard": report is not None and bool(report.training.get("standard_eps")),
        "plots": list(subject.plots),
        "further_plots": [name for name in subject.plots if name not in PLOTS],
    }


def summary(report: RobustnessReport | None, config: dict[str, Any]) -> str:
    """Two or three sentences for somebody who has never heard of adversarial robustness."""
    text = kind_text(report, config)
    if report is None or report.training.get("method") != "standard":
        text += " It was built to stay right when somebody changes the pixels on purpose."
    if report is None or "sa" not in accuracies(report.metrics):
        return text + " How well it does has not been measured yet."
    key, count = headline(report.metrics), report.dataset.get("num_images")
    images = f"{count:,} test images" if count else "the test images"
    text += f"\n\nOn {images} of {data_name(report)} it is right for **{share(report, 'sa')}**"
    if key is None:
        return text + ". How it does under attack has not been measured."
    text += f", and for **{share(report, key)}** when every image is attacked"
    text += f" within {radius(report)}" if radius(report) else ""
    text += f" ({metric_title(key)})."
    if key not in STRONGEST_FIRST:
        text += " Stronger attacks than this one exist and would find more; it was not attacked by them."
    return text


def share(report: RobustnessReport, key: str) -> str:
    """An accuracy with its interval: 94.88 % (95 % interval 92.4 to 96.6)."""
    ends = interval(report, key)
    return f"{report.metrics[key]:.2f} %" + (f" (95 % interval {ends[0]:.1f} to {ends[1]:.1f})" if ends else "")


def kind_text(report: RobustnessReport | None, config: dict[str, Any]) -> str:
    """Say in a sentence what the model is."""
    known = {} if report is None else report.model
    part = {**config.get("robust", config), **known}
    experts, backbone = part.get("num_experts"), part.get("backbone")
    moe = f"a mixture of {experts} experts behind a router" if (experts or 0) > 1 else "a single network"
    of = f" ({backbone})" if backbone else ""
    classes = len((report.dataset.get("class_names") if report else None) or config.get("id2label") or [])
    task = f"that tells {classes} classes of images apart" if classes else "for images"
    if is_dual(report, config) and mixes_weights(report, config):
        return (
            f"A classifier {task}, made of two: one network answers, whose weights lie between those of a standard "
            f"and a robust model; a dial says where. The robust one is {moe}{of}."
        )
    if is_dual(report, config):
        return (
            f"A classifier {task}, made of two: a standard and a robust model behind one dial. The robust one is "
            f"{moe}{of}."
        )
    if "experts" in str(known.get("kind")) or config.get("model_type") == "robust_moe":
        return f"A classifier {task}: {moe}{of}."
    return f"A classifier {task}: {known['kind']}." if "kind" in known else f"A classifier {task}."


def caution(report: RobustnessReport | None, alpha: float | None, config: Mapping[str, Any]) -> str:
    """Warnings to read before the numbers, those of a model saved with this alpha and config; "" = there are none."""
    if report is None:
        return ""
    reasons = []
    if report.suspicious:
        reasons.append(f"{count_text(len(report.suspicious), 'sanity check')} of the evaluation failed; see below.")
    if report.failures:
        reasons.append(f"{count_text(len(report.failures), 'measurement')} failed in part or whole; see below.")
    measured = report.model.get("alpha")
    if None not in (alpha, measured) and alpha != measured:  # the dial was turned after the evaluation
        reasons.append(f"They were measured at alpha = {measured:g}, but the saved dial is at alpha = {alpha:g}.")
    mixed, mixing = report.model.get("mixing"), config.get("mixing")
    if None not in (mixing, mixed) and mixing != mixed:
        reasons.append(f"They were measured with mixing = {mixed}, but the saved model has mixing = {mixing}.")
    for name in ("standard_logit_map", "robust_logit_map"):
        if name in report.model and name in config and report.model[name] != config[name]:
            reasons.append(f"They were measured with another {name} than the saved model has.")
    if report.training.get("method") == "standard":
        reasons.append("The model was trained without attacks: expect no robustness.")
    return " ".join(reasons)


def count_text(count: int, name: str) -> str:
    """1 image, 2 images."""
    return f"{count} {name}{'' if count == 1 else 's'}"


# --- tables ----------------------------------------------------------------------------------------------------------


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, cells escaped; empty where there are no rows."""
    cells = [[one_line(cell).replace("|", "\\|") for cell in row] for row in rows]  # else a name could add columns
    if not cells:
        return ""
    # numbers to the right
    aligned = ["---" if i == 0 else "---:" if "%" in title else "---" for i, title in enumerate(header)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(header), aligned, *cells])


def percent_text(value: Any) -> str:
    """An accuracy in %, two digits; "-" where it was not measured."""
    return "-" if number(value) is None else f"{value:.2f}"


def results_text(report: RobustnessReport | None) -> dict[str, Any]:
    """Texts about the numbers: tables, controls, checks; empty without a report."""
    if report is None or not accuracies(report.metrics):
        return {}
    metrics = report.metrics
    members = metrics.get("worst_case", {}).get("members", {})
    return {
        "results_table": results_table(report),
        "threat": threat_text(report),
        "results_note": results_note(report),
        "autoattack_precision": report.autoattack_precision(),
        "outcomes": report.outcomes,
        "members_table": markdown_table(
            ["attack", "accuracy %"],
            [(name, percent_text(value)) for name, value in sorted(members.items(), key=lambda item: item[1])],
        ),
        "certified_table": certified_table(report),
        "dial_table": dial_table(report),
        "dial_note": dial_note(report),
        "choice": choice_text(report),
        "routing": routing_text(metrics),
        "controls_table": controls_table(report),
        "checks": checks_text(report),
        "checks_table": markdown_table(
            ["check", "passed", "finding"],
            [(name, "yes" if c["passed"] else "**no**", c["message"]) for name, c in report.sanity.items()],
        ),
        "suspicious": [one_line(reason) for reason in report.suspicious],
        "failures": [one_line(f"{name}: {reason}") for name, reason in report.failures.items()],
    }


def threat_text(report: RobustnessReport) -> str:
    """Data, radius and norm of the evaluation, in a sentence."""
    count = report.dataset.get("num_images")
    images = f"{count_text(count, 'test image')} of" if count else ""
    text = f"Measured on {images} {data_name(report)}."
    if not radius(report):
        return text
    eps, norm = report.threat["eps"], report.threat["norm"]
    reach = "every pixel may change by up to" if norm == "linf" else "all pixels together may change by a distance of"
    return f"{text} The attacker knows the model; {reach} {eps:.6g} on a scale from 0 to 1 ({radius(report)})."


def results_table(report: RobustnessReport) -> str:
    """Accuracy of the whole model, clean and under each attack, and of its components."""
    rows = []
    for key, value in accuracies(report.metrics).items():
        ends, settings = interval(report, key), attack_settings(report, key)
        how = HOW.get(key) or next((text for start, text in HOW.items() if key.startswith(start)), "")
        found = f"{ends[0]:.1f} to {ends[1]:.1f}" if ends else "-"
        rows.append([metric_title(key), percent_text(value), found, f"`{settings}`" if settings else how or "-"])
    for name, values in report.metrics.get("components", {}).items():
        for key, value in accuracies(values).items():
            rows.append([f"{name} model alone, {metric_title(key)}", percent_text(value), "-", "as above"])
    return markdown_table(["attack", "accuracy %", "95 % interval", "settings"], rows)


def results_note(report: RobustnessReport) -> str:
    """How to read the table."""
    key = headline(report.metrics)
    if key is None:
        return "No attack was run."
    text = "An image counts as robust only where it is classified rightly both clean and attacked."
    if key in STRONGEST_FIRST:
        return f"{text} The number that counts is the lowest: {metric_title(key)}, {share(report, key)}."
    return f"{text} These attacks are weak ones: the true robustness is lower."


def certified_table(report: RobustnessReport) -> str:
    """Certified accuracy by radius; the other fields of each point as they are."""
    points = certified(report)
    others = list(dict.fromkeys(name for p in points for name in p if name not in ("radius", "accuracy")))
    rows = [[f"{p['radius']:g}", percent_text(p["accuracy"]), *(p.get(name, "-") for name in others)] for p in points]
    return markdown_table(["radius", "certified accuracy %", *(name.replace("_", " ") for name in others)], rows)


def dial_table(report: RobustnessReport) -> str:
    """SA and RA along the dial."""
    keys = list(dict.fromkeys(key for point in report.alpha_sweep for key in accuracies(point)))
    rows = [[f"{point['alpha']:g}", *(percent_text(point.get(key)) for key in keys)] for point in report.alpha_sweep]
    return markdown_table(["alpha", *(f"{metric_title(key)} %" for key in keys)], rows)


def dial_note(report: RobustnessReport) -> str:
    """How to read the dial's numbers where a stronger attack than theirs was measured."""
    key = headline(report.metrics)
    if key in STRONGEST_FIRST and not any(key in point for point in report.alpha_sweep):
        return "The attack in this table is a weak one: read it as the shape of the dial. The next table counts."
    return ""


def choice_text(report: RobustnessReport) -> str:
    """The recommended alpha, and why."""
    choice = report.alpha_choice
    if not choice:
        return ""
    text = (
        f"Recommended is alpha = {choice['alpha']:g}: {choice['rule']}, chosen on {choice['chosen_on']} "
        f"(there SA {choice['sa']:.2f} %, RA {choice['ra']:.2f} %)."
    )
    measured = report.model.get("alpha")
    if measured is not None and measured != choice["alpha"]:
        text += f" Numbers on this page that name no alpha are at {measured:g}."
    return text


def routing_text(metrics: dict[str, Any]) -> str:
    """Weight of the experts in the outputs and share of first choices that an attack changes."""
    load, flips = metrics.get("expert_load", {}), number(metrics.get("route_flip_rate"))
    if any(len(values) == 1 for values in load.values()):
        return ""  # one expert gets every image
    parts = [f"{name} images: {', '.join(f'{v:g}' for v in values)} %" for name, values in load.items()]
    text = (
        f"Weight of the experts in the outputs (with hard routing, share of images), {'; '.join(parts)}."
        if parts
        else ""
    )
    return text + (
        f" The attack changes the first choice of expert for {flips:.2f} % of the images." if flips is not None else ""
    )


def controls_table(report: RobustnessReport) -> str:
    """The same measurements on other models, with what their training cost where known; "-" = not measured.

    The worst case stands only where all the strong attacks were made: that of fewer is no match for it.
    """
    if not report.controls:
        return ""
    models = {"**this model**": {"passes": report.training.get("passes"), **report.metrics}}
    models |= {name: values if isinstance(values, dict) else {} for name, values in report.controls.items()}
    keys = list(dict.fromkeys(key for values in models.values() for key in accuracies(values)))
    attacks = [key for key in ("ra_adaptive_union", "ra_autoattack") if key in keys]
    costs = {name: number(values.get("passes")) for name, values in models.items()}
    has_costs = any(cost is not None for cost in costs.values())
    rows = []
    for name, values in models.items():
        cost = "-" if costs[name] is None else f"{costs[name]:.0f}"
        found = accuracies(values)
        if any(attack not in found for attack in attacks):
            found.pop("ra_worst_case", None)
        rows.append([name, *[cost] * has_costs, *(percent_text(found.get(key)) for key in keys)])
    header = ["model", *["training passes per image"] * has_costs, *(f"{metric_title(key)} %" for key in keys)]
    return markdown_table(header, rows)


def checks_text(report: RobustnessReport) -> str:
    """Say how many sanity checks passed, and whether those against weak attacks were among them."""
    if not report.sanity:
        return "No sanity checks were run with this evaluation."
    passed = sum(bool(check["passed"]) for check in report.sanity.values())
    counted = f"{passed} of {count_text(len(report.sanity), 'check')} passed."
    if set(report.sanity) == {"worst_case"}:  # all that is checked without the part "sanity"
        return f"Gradients that hide and attacks that are too weak were not looked for: {counted}"
    return f"The evaluation checks itself, for gradients that hide and for attacks that are too weak: {counted}"


def training_text(report: RobustnessReport | None) -> dict[str, Any]:
    """Training recipe, versions and hardware, as far as the report knows them."""
    if report is None:
        return {}
    training = dict(report.training)
    if "method" in training:
        training["method"] = METHODS.get(training["method"], training["method"])
    settings = [*report.model.items(), *((SETTINGS.get(name, name), value) for name, value in training.items())]
    rows = [(name.replace("_", " "), value_text(v)) for name, v in settings if v not in (None, {}, [], "")]
    rows += [(f"seed of the {name}", value_text(seed)) for name, seed in report.seeds.items()]
    environment = report.environment
    packages = {"Python": environment.get("python"), **environment.get("packages", {})}
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    hardware = ", ".join(str(environment[name]) for name in ("hardware", "device") if environment.get(name))
    lines = [f"{versions}." if versions else "", f"Evaluated on {hardware}." if hardware else ""]
    return {"recipe_table": markdown_table(["setting", "value"], rows), "versions": " ".join(lines).strip()}


def value_text(value: Any) -> str:
    """A setting as text: numbers short, lists and dictionaries without brackets."""
    if isinstance(value, bool):  # which is an int, too
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {value_text(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(value_text(inner) for inner in value)
    return f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def squeeze(text: str) -> str:
    """No spaces at line ends, and no more than one empty line in a row."""
    # parts of the template may be empty
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip() + "\n"


__all__ = ["CardSubject", "model_text", "results_text", "training_text"]
