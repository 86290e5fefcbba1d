"""Plots of a `RobustnessReport`, drawn with matplotlib straight to a file (no display needed)."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..attacks.base import device_of, frozen
from ..attacks.pgd import PGD
from ..data.datasets import ImageTensorDataset, to_unit_range
from ..models.outputs import logits_of
from .report import RobustnessReport

BLUE, RED, GREEN, ORANGE, GREY = "#3b6fb6", "#d1495b", "#2e8b57", "#e08e0b", "#555555"
EXAMPLES = 6  # images in the strip
LONGEST_NAME = 14  # characters of a class name under its picture


def radius_text(eps: float, norm: str) -> str:
    """A radius as people write it: L∞ 8/255, L∞ 0.15, L2 0.5."""
    whole = norm == "linf" and eps > 0 and abs(255 * eps - round(255 * eps)) < 1e-3  # 0.0314 is near 8/255, but not it
    return f"{'L∞' if norm == 'linf' else 'L2'} {f'{255 * eps:.0f}/255' if whole else f'{eps:.3g}'}"


def attack_key(point: dict[str, float]) -> str:
    """The name of the RA in a point of a sweep or curve, such as "ra_pgd20"."""
    return next(name for name in point if name.startswith("ra_"))


def attack_text(key: str) -> str:
    """ra_pgd20 -> PGD-20."""
    return key.removeprefix("ra_").upper().replace("PGD", "PGD-")


def new_axes(width: float = 6.4, height: float = 4.4) -> tuple[Figure, Axes]:
    """An empty figure with light grid lines behind what is drawn."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")  # not pyplot: it would look for a display
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_tradeoff(report: RobustnessReport, path: str | os.PathLike) -> None:
    """Draw robust against standard accuracy along the dial, both components and the recommended alpha marked.

    Args:
        report: Report with an alpha sweep.
        path: Image file to write; its ending chooses the format.

    Raises:
        ValueError: The report has no alpha sweep.
    """
    if not report.alpha_sweep:
        raise ValueError("This report has no alpha_sweep: only a dual model has a dial to draw.")
    key = attack_key(report.alpha_sweep[0])
    sweep = sorted(report.alpha_sweep, key=lambda point: point["alpha"])
    figure, axes = new_axes()
    axes.plot([p["sa"] for p in sweep], [p[key] for p in sweep], "o-", color=BLUE, zorder=2)
    for name, color, marker in (("standard", RED, "s"), ("robust", GREEN, "D")):
        values = report.metrics.get("components", {}).get(name, {})
        if key in values:
            label = f"{name} model alone"
            axes.plot(values["sa"], values[key], marker, color=color, markersize=9, label=label, zorder=3)
    for point in (p for p in sweep if p["alpha"] == report.alpha_choice.get("alpha")):
        style = {"color": ORANGE, "markersize": 18, "markeredgecolor": "white", "zorder": 4}
        axes.plot(point["sa"], point[key], "*", label=f"recommended: α = {point['alpha']:g}", **style)
    axes.margins(x=0.14, y=0.12)
    label_alphas(axes, sweep, key)
    axes.set_xlabel("accuracy on clean images, %")
    radius = radius_text(report.threat["eps"], report.threat["norm"])
    axes.set_ylabel(f"accuracy under {attack_text(key)}, {radius}, %")
    axes.set_title(
        f"The dial of the dual model on {report.dataset['name']} ({report.dataset['num_images']} test images)"
    )
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path)


def label_alphas(axes: Axes, sweep: list[dict[str, float]], key: str) -> None:
    """Write each alpha beside its point; points that lie on each other share one label, so that none overlap."""
    axes.figure.draw_without_rendering()  # fixes the limits
    spots: list[tuple[float, float, list[str], tuple[float, float]]] = []
    for point in sweep:
        x, y = axes.transData.transform((point["sa"], point[key]))
        text = f"{point['alpha']:g}"
        near = next((s for s in spots if abs(s[0] - x) < 70 and abs(s[1] - y) < 30), None)  # pixels that a label takes
        if near is None:
            spots.append((x, y, [text], (point["sa"], point[key])))
        else:
            near[2].append(text)
    for _, _, texts, place in spots:  # below and left of a falling curve there is room
        axes.annotate(
            "α = " + ", ".join(texts),
            place,
            textcoords="offset points",
            xytext=(-7, -7),
            ha="right",
            va="top",
            fontsize=9,
            color="#333333",
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
            zorder=5,
        )


def plot_eps_curve(report: RobustnessReport, path: str | os.PathLike) -> None:
    """Draw accuracy against the radius of the attack, with the radius of the report marked and chance as a line.

    Args:
        report: Report with an `eps_curve` among its metrics.
        path: Image file to write; its ending chooses the format.

    Raises:
        ValueError: The report has no such curve.
    """
    curve = sorted(report.metrics.get("eps_curve", []), key=lambda point: point["eps"])
    if not curve:
        raise ValueError("This report has no eps_curve: evaluate with level='standard' or 'full'.")
    key, norm, eps = attack_key(curve[0]), report.threat["norm"], report.threat["eps"]
    unit = 255 if norm == "linf" else 1  # L-inf radii are known as n/255
    figure, axes = new_axes()
    axes.plot([p["eps"] * unit for p in curve], [p[key] for p in curve], "o-", color=BLUE, zorder=3)
    for index, point in enumerate(curve):
        axes.annotate(
            f"{point[key]:.1f}",
            (point["eps"] * unit, point[key]),
            textcoords="offset points",
            xytext=(7 if index < len(curve) - 1 else -4, 8),  # the last label would run out of the figure on the right
            ha="left" if index < len(curve) - 1 else "right",
            fontsize=9,
            color=GREY,
        )
    axes.axvline(eps * unit, color=ORANGE, linestyle="--", label=f"evaluated radius, {radius_text(eps, norm)}")
    classes = len(report.dataset["class_names"])
    axes.axhline(100 / classes, color=GREY, linestyle=":", label=f"chance, {classes} classes")
    axes.set(ylim=(0, 108), yticks=range(0, 101, 20), ylabel=f"accuracy under {attack_text(key)}, %")
    axes.set_xlabel("radius of the attack, L∞, in 255ths of the pixel range" if norm == "linf" else "radius, L2")
    axes.set_title(f"Accuracy against the size of the attack on {report.dataset['name']}")
    axes.legend(loc="upper right", frameon=False)
    figure.savefig(path)


def plot_expert_load(report: RobustnessReport, path: str | os.PathLike) -> None:
    """Draw the weight of each expert in the outputs, clean against attacked, as grouped bars.

    Args:
        report: Report with an `expert_load` among its metrics.
        path: Image file to write; its ending chooses the format.

    Raises:
        ValueError: The report has no expert load.
    """
    load = report.metrics.get("expert_load")
    if not load:
        raise ValueError("This report has no expert_load: its model has no mixture of experts.")
    count = len(load["clean"])
    figure, axes = new_axes(width=max(6.4, 0.9 * count))
    highest = max(*load["clean"], *load["attacked"], 100 / count)
    for side, name, color in ((-0.2, "clean", BLUE), (0.2, "attacked", RED)):
        bars = axes.bar([i + side for i in range(count)], load[name], width=0.38, color=color, label=name)
        if count <= 12:  # more bars leave no room for numbers
            axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=9, color=GREY)
    axes.axhline(100 / count, color=GREY, linestyle=":", label="even load")
    axes.set(
        xticks=range(count), ylim=(0, 1.25 * highest), ylabel="weight of the expert in the outputs, %", xlabel="expert"
    )
    flips = report.metrics["route_flip_rate"]
    axes.set_title(
        f"Load of the experts on {report.dataset['name']}; the attack changes {flips:.0f} % of routes", fontsize=11
    )
    axes.grid(False, axis="x")
    axes.legend(loc="upper center", ncols=3, frameon=False)
    figure.savefig(path)


@dataclass(frozen=True)
class AttackExamples:
    """Some images before and after an attack.

    Args:
        clean, attacked: (n, C, H, W) floats in [0, 1] on the CPU.
        labels, clean_predictions, attacked_predictions: (n,) int64.
        class_names: Name of each class, in label order.
        title: What the strip shows.
    """

    clean: Tensor
    attacked: Tensor
    labels: Tensor
    clean_predictions: Tensor
    attacked_predictions: Tensor
    class_names: list[str]
    title: str


@torch.no_grad()
def attack_examples(model: nn.Module, dataset: ImageTensorDataset, *, attack: PGD) -> AttackExamples:
    """Attack a few images for `plot_examples`, chosen by chance and not by outcome.

    Args:
        model: Classifier of images in [0, 1]; held in eval mode.
        dataset: Images to choose from.
        attack: Attack to show.
    """
    sample = dataset.take(EXAMPLES) if len(dataset) > EXAMPLES else dataset  # seed 0: the same images for every model
    device = device_of(model)
    clean, labels = to_unit_range(sample.images).to(device), sample.labels.to(device)
    with frozen(model):
        attacked = attack(model, clean, labels)
        seen, fooled = (logits_of(model, images).argmax(dim=1).cpu() for images in (clean, attacked))
    title = f"PGD-{attack.steps}, {radius_text(attack.eps, attack.norm)}"
    return AttackExamples(clean.cpu(), attacked.cpu(), sample.labels, seen, fooled, sample.class_names, title)


def plot_examples(examples: AttackExamples, path: str | os.PathLike) -> None:
    """Draw a strip: clean images, amplified perturbations, attacked images, with predictions and the true classes.

    Args:
        examples: Made by `attack_examples`.
        path: Image file to write; its ending chooses the format.
    """
    count = len(examples.labels)
    delta = examples.attacked - examples.clean
    largest = float(delta.abs().max())
    gain = 0.5 / largest if largest > 0 else 1.0  # the largest change becomes black or white
    figure = Figure(figsize=(max(1.5 * count, 4.5) + 0.6, 5.9), dpi=150, layout="constrained")
    grid = figure.subplots(3, count, squeeze=False)
    rows = (
        ("clean", examples.clean, examples.clean_predictions),
        (f"perturbation\n× {gain:.3g}, grey = 0", 0.5 + gain * delta, None),
        ("attacked", examples.attacked, examples.attacked_predictions),
    )
    for axes_row, (name, images, predictions) in zip(grid, rows, strict=True):
        axes_row[0].set_ylabel(name, fontsize=10)
        for i, axes in enumerate(axes_row):
            axes.imshow(images[i].clamp(0, 1).permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            if predictions is not None:
                right = bool(predictions[i] == examples.labels[i])
                color, mark = (GREEN, "✓") if right else (RED, "✗")
                text = shorten(examples.class_names[int(predictions[i])])
                axes.set_xlabel(f"{mark} {text}", color=color, fontsize=10)
    for axes, label in zip(grid[0], examples.labels.tolist(), strict=True):
        axes.set_title(f"true: {shorten(examples.class_names[label])}", fontsize=10)
    figure.suptitle(f"{examples.title}; below each image what the model sees", fontsize=11)
    figure.savefig(path)


def save_plots(report: RobustnessReport, folder: Path, examples: AttackExamples | None = None) -> list[str]:
    """Draw all plots that the report has numbers for into a folder; returns their file names."""
    curve, load = (report.metrics.get(name) for name in ("eps_curve", "expert_load"))
    plots = {
        "tradeoff.png": (plot_tradeoff, report.alpha_sweep),
        "eps_curve.png": (plot_eps_curve, curve),
        "expert_load.png": (plot_expert_load, load),
    }
    drawn = [name for name, (_, numbers) in plots.items() if numbers]
    for name in drawn:
        plots[name][0](report, folder / name)
    if examples is not None:
        plot_examples(examples, folder / "examples.png")
        drawn.append("examples.png")
    return drawn


def shorten(name: str) -> str:
    """A class name that fits under its picture."""
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


__all__ = [
    "AttackExamples",
    "attack_examples",
    "plot_examples",
    "plot_eps_curve",
    "plot_expert_load",
    "plot_tradeoff",
    "save_plots",
]
