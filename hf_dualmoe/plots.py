"""Plots of a `RobustnessReport`, drawn with matplotlib straight to a file (no display needed)."""

import os

from matplotlib.figure import Figure

from .evaluation import RobustnessReport


def plot_tradeoff(report: RobustnessReport, path: str | os.PathLike) -> None:
    """Draw robust against standard accuracy along the dial of a dual model, both components marked.

    Args:
        report: Report with an alpha sweep.
        path: Image file to write; its ending chooses the format.

    Raises:
        ValueError: The report has no alpha sweep.
    """
    if not report.alpha_sweep:
        raise ValueError("This report has no alpha_sweep: only a dual model has a dial to draw.")
    attack = next(name for name in report.alpha_sweep[0] if name.startswith("ra_"))
    sweep = sorted(report.alpha_sweep, key=lambda point: point["alpha"])
    figure = Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([p["sa"] for p in sweep], [p[attack] for p in sweep], "o-", color="#3b6fb6", zorder=2)
    for point in sweep:
        axes.annotate(
            f"α = {point['alpha']:g}",
            (point["sa"], point[attack]),
            textcoords="offset points",
            xytext=(7, 5),
            fontsize=9,
            color="#333333",
        )
    for name, color, marker in (("standard", "#d1495b", "s"), ("robust", "#2e8b57", "D")):
        values = report.metrics["components"][name]
        label = f"{name} model alone"
        axes.plot(values["sa"], values[attack], marker, color=color, markersize=9, label=label, zorder=3)
    eps = report.threat["eps"]
    radius = f"{eps * 255:.3g}/255" if report.threat["norm"] == "linf" else f"{eps:g}"
    norm = {"linf": "L∞", "l2": "L2"}[report.threat["norm"]]
    axes.set_xlabel("accuracy on clean images, %")
    axes.set_ylabel(f"accuracy under {attack.removeprefix('ra_').upper()}, {norm} {radius}, %")
    axes.set_title(
        f"The dial of the dual model on {report.dataset['name']} ({report.dataset['num_images']} test images)"
    )
    axes.margins(x=0.12, y=0.1)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", frameon=False)
    figure.savefig(path)


__all__ = ["plot_tradeoff"]
