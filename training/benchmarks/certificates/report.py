"""What `certificates.py` reports: means over seeds, the alpha to use, what each penalty gains, tables and curves."""

import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from hf_dualmoe.evaluation.environment import write_text
from training.benchmarks.shared.tables import HERE, RESULTS, markdown_table, replace_section

KEPT = 0.95  # of F_R's certified accuracy at the first radius: the goal
PAGE = HERE.parents[1] / "README.md"  # has the overview; the README beside this file has all rows
KEPT_DATASETS = ("digits", "cifar10")
ABOUT = {
    "single_plain": "one 1-Lipschitz network, cross-entropy alone",
    "single": "one 1-Lipschitz network, trained for logit margins",
    "mixture_free": "hard-routed mixture of four such networks, load balancing 0.1",
    "mixture": "the same, load balancing 1",
    "mixture_trained": "mixture, also trained for route margins",
    "mixture_soft": "dense mixture of four such networks",
    "mixture_soft_gate": "mixture_soft, also trained for a small gate constant",
    "standard": "a free ResNet, F_S",
}
GAINS = {  # what a penalty is measured against
    "single": "single_plain",
    "mixture_free": "single",
    "mixture": "single",
    "mixture_trained": "mixture",
    "mixture_soft_gate": "mixture_soft",
}


def spread(values: list[float]) -> dict[str, float | None]:
    """Mean and standard deviation; None for one value."""
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None}


def entry_spread(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """SA and certified accuracies of several seeds."""
    certified = [entry["certified"] for entry in entries]
    known = all(values is not None for values in certified)
    return {
        "sa": spread([entry["sa"] for entry in entries]),
        "certified": [spread(list(values)) for values in zip(*certified, strict=True)] if known else None,
    }


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of SA and certified accuracy, per arm and alpha, and what is kept of F_R.

    A dual model has one row more, with `chosen`: at each seed the alpha that `chosen_alpha` takes.
    """
    groups: dict[tuple[str, float | str | None], list[tuple[dict, dict | None]]] = {}
    alone = {(run["arm"], run["seed"]): run for run in runs}
    for run in runs:
        base = alone.get((run["arm"].removeprefix("dual_"), run["seed"])) if run["arm"].startswith("dual_") else None
        for entry in run["entries"]:
            groups.setdefault((run["arm"], entry["alpha"]), []).append((entry, base and base["entries"][0]))
        if base is not None:
            alpha = chosen_alpha(run, base)
            chosen = next(entry for entry in run["entries"] if entry["alpha"] == alpha)
            groups.setdefault((run["arm"], "chosen"), []).append((chosen, base["entries"][0]))
    rows = []
    for (arm, alpha), pairs in groups.items():
        row = {"arm": arm, "alpha": alpha, "seeds": len(pairs), **entry_spread([entry for entry, _ in pairs])}
        if alpha == "chosen":
            row["alpha"], row["chosen"] = None, [entry["alpha"] for entry, _ in pairs]
        if all(base and base["certified"] and base["certified"][0] > 0 and own["certified"] for own, base in pairs):
            row["kept"] = spread([entry["certified"][0] / base["certified"][0] for entry, base in pairs])
            row["sa_gain"] = spread([entry["sa"] - base["sa"] for entry, base in pairs])
            row["goal_reached"] = row["kept"]["mean"] >= KEPT and row["sa_gain"]["mean"] > 0
        rows.append(row)
    return rows


def chosen_alpha(dual: dict[str, Any], robust: dict[str, Any]) -> float:
    """The lowest alpha at which a dual model keeps 95 % of F_R's certified accuracy on held-out images; 1 if none."""
    floor = KEPT * robust["held_out"][0]["certified"][0]
    good = [e["alpha"] for e in dual["held_out"] if e["certified"] is not None and e["certified"][0] >= floor]
    return min(good, default=1.0)


def gains(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What each penalty changes, seed by seed, in points: SA and certified accuracy at each radius."""
    alone = {(run["arm"], run["seed"]): run["entries"][0] for run in runs}
    found = {}
    for arm, other in GAINS.items():
        seeds = [seed for name, seed in alone if name == arm and (other, seed) in alone]
        pairs = [(alone[arm, seed], alone[other, seed]) for seed in seeds]
        if pairs:
            changes = zip(
                *([a - b for a, b in zip(own["certified"], base["certified"], strict=True)] for own, base in pairs),
                strict=True,
            )
            found[arm] = {
                "against": other,
                "sa": spread([own["sa"] - base["sa"] for own, base in pairs]),
                "certified": [spread(list(values)) for values in changes],
            }
    return found


def plot(results: dict[str, Any], path: Path) -> None:
    """Certified accuracy against the radius, mean over the seeds; SA against it for the dual models along alpha."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = ("#888888", "#3b6fb6", "#d1495b", "#2e8b57", "#e08e0b", "#7b4ba0", "#17a2b8")
    arms = [arm for arm in results["arms"] if arm != "standard"]
    for arm, colour in zip(arms, colours, strict=False):
        curves = [e["curve"] for run in results["runs"] if run["arm"] == arm for e in run["entries"] if e["curve"]]
        grid = torch.linspace(0, max(curve["radius"][-1] for curve in curves), 200).tolist()
        shares = [mean(share_at(curve, radius) for curve in curves) for radius in grid]
        left.plot([*grid, grid[-1]], [*shares, 0], color=colour, linewidth=1.4, label=arm)
        rows = [r for r in results["summary"] if r["arm"] == f"dual_{arm}" and r["certified"] and "chosen" not in r]
        x, y = [row["certified"][0]["mean"] for row in rows], [row["sa"]["mean"] for row in rows]
        right.plot(x, y, "o-", color=colour, linewidth=1.2, markersize=3)
    for radius in results["radii"]:
        left.axvline(radius, color="#bbbbbb", linewidth=0.8, zorder=0)
    left.set(xlim=(0, None), ylim=(0, 100), xlabel="L2 radius, pixel units", ylabel="certified accuracy, %")
    right.set(xlabel=f"certified accuracy at {results['radii'][0]:.3g}, %", ylabel="SA, %", title="dual models, alpha")
    left.set_title(f"{results['dataset']['name']}, mean of {len(results['seeds'])} seeds")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path)


def share_at(curve: dict[str, list[float]], radius: float) -> float:
    """Certified accuracy of a curve at a radius, not more than there is: its value at the next larger radius drawn."""
    return next((s for r, s in zip(curve["radius"], curve["accuracy"], strict=True) if r >= radius), 0.0)


def text_of(value: dict[str, float | None] | None, form: str = ".1f", scale: float = 1) -> str:
    """A mean, with its standard deviation where there are several seeds."""
    if value is None:
        return "-"
    text = f"{scale * value['mean']:{form}}"
    return text if value["std"] is None else f"{text} ± {scale * value['std']:.1f}"


def radius_name(radius: float) -> str:
    """0.1 -> "0.1"; a multiple of 1/255 as a fraction."""
    levels = round(255 * radius)
    return f"{levels}/255" if abs(levels - 255 * radius) < 1e-9 else f"{radius:g}"


def render_table(results: dict[str, Any]) -> str:
    """Two tables in Markdown, arms and dual models at the chosen alpha and along it, and what each penalty gains."""
    radii = [f"L2 {radius_name(radius)}" for radius in results["radii"]]
    count = len(radii)
    parameters = {run["arm"]: run.get("parameters", 0) for run in results["runs"]}
    loads: dict[str, list[float]] = {}
    for run in results["runs"]:
        loads.setdefault(run["arm"], []).extend(run.get("expert_load") or [])

    def accuracies(row: dict[str, Any]) -> list[str]:
        return [text_of(value) for value in (row["sa"], *(row["certified"] or [None] * count))]

    alone = [row for row in results["summary"] if not row["arm"].startswith("dual_")]
    rows = []
    for row in alone:
        most = f"{max(loads[row['arm']]):.0f}" if loads[row["arm"]] else "-"
        rows.append([row["arm"], str(row["seeds"]), f"{parameters[row['arm']] / 1e3:.0f}k", most, *accuracies(row)])
    lines = [markdown_table(["arm", "seeds", "param.", "most load %", "SA %", *radii], rows), ""]
    lines += [f"- {arm}: {ABOUT[arm]}." for arm in results["arms"]]
    for arm, gain in results["gains"].items():
        changes = ", ".join(text_of(value, "+.1f") for value in gain["certified"])
        sa = text_of(gain["sa"], "+.1f")
        lines.append(f"- {arm} against {gain['against']}: SA {sa}, certified {changes} points.")
    duals = [row for row in results["summary"] if row["arm"].startswith("dual_")]
    if duals:
        full = first_dual(results)
        rows = []
        for row in duals:
            if "chosen" in row:
                alpha = "chosen: " + ", ".join(f"{value:g}" for value in row["chosen"])
            elif row["arm"] == full:
                alpha = f"{row['alpha']:g}"
            else:
                continue
            rows.append([row["arm"], alpha, *accuracies(row), text_of(row.get("kept"), ".1f", 100)])
        lines += ["", markdown_table(["dual model", "alpha", "SA %", *radii, "kept %"], rows)]
    return "\n".join(lines)


def first_dual(results: dict[str, Any]) -> str:
    """The dual model whose whole dial is shown: that of the arm with the highest certified accuracy."""
    robust = [r for r in results["summary"] if f"dual_{r['arm']}" in {s["arm"] for s in results["summary"]}]
    return f"dual_{max(robust, key=lambda row: row['certified'][0]['mean'])['arm']}"


def literature_table(path: Path = RESULTS / "certified_literature.json") -> str:
    """What others published, in Markdown, each row with the page that states it."""
    rows = []
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        values = [row["clean"], *row["certified"].values()]
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        rows.append([f"[{row['what']}]({row['source']})", *cells])
    return markdown_table(["published", "clean %", *(f"L2 {r}" for r in ("36/255", "72/255", "108/255"))], rows)


def overview(results: dict[str, dict[str, Any]]) -> str:
    """All datasets next to each other, in Markdown: the arms, the dual model of the best one, and the goal.

    Args:
        results: Kept results by the name of the dataset.
    """
    rows, lines = [], []
    for name, found in results.items():
        count = len(found["seeds"])
        title = f"{name}, {count} seed{'s' * (count > 1)}, L2 {' / '.join(map(radius_name, found['radii']))}"
        dual = best_dual(found)
        for row in found["summary"]:
            if row["arm"].startswith("dual_") and row is not dual:
                continue
            certified = " / ".join(text_of(value) for value in row["certified"] or ()) or "-"
            rows.append([title, row["arm"], text_of(row["sa"]), certified])
            title = ""
        if dual is not None:
            lines.append(goal_line(name, dual))
    arms = dict.fromkeys(arm for found in results.values() for arm in found["arms"])
    lines = [f"- {arm}: {ABOUT[arm]}." for arm in arms] + lines
    return "\n".join([markdown_table(["dataset, radii", "model", "SA %", "certified %"], rows), "", *lines])


def best_dual(results: dict[str, Any]) -> dict[str, Any] | None:
    """The row of the dual model of the best arm, at the alpha chosen on held-out images; None without dual models."""
    if not any(row["arm"].startswith("dual_") for row in results["summary"]):
        return None
    name = first_dual(results)
    return next(row for row in results["summary"] if row["arm"] == name and "chosen" in row)


def goal_line(name: str, dual: dict[str, Any]) -> str:
    """Whether a dual model keeps 95 % of F_R's certified accuracy at the first radius and clearly gains SA."""
    text = (
        f"- {name}: {dual['arm']}, its alpha chosen on held-out images ({', '.join(f'{a:g}' for a in dual['chosen'])})"
    )
    if "kept" not in dual:
        return f"{text}: F_R has no certified accuracy that could be kept."
    kept, gain = dual["kept"], dual["sa_gain"]
    if gain["std"] is None:
        verdict = "open: one seed says nothing about the spread"
    else:
        verdict = "reached" if kept["mean"] >= KEPT and gain["mean"] > gain["std"] else "missed"
    return (
        f"{text}, keeps {text_of(kept, '.1f', 100)} % of F_R's certified accuracy at the first radius and changes SA "
        f"by {text_of(gain, '+.1f')} points. The goal, {100 * KEPT:g} % and an SA gain above its spread, is {verdict}."
    )


def render(name: str, folder: Path) -> int:
    """Keep results and curves of a preset in the repository, and put the tables into both READMEs; the exit status."""
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        name = name.removesuffix("_cpu")  # two sizes of one study: the settings are in the results
        RESULTS.mkdir(exist_ok=True)
        plot(results, RESULTS / f"certificates_{name}.png")
        for run in results["runs"]:
            for entry in run["entries"]:
                entry.pop("curve")  # the picture has them
        write_text(RESULTS / f"certificates_{name}.json", json.dumps(results, indent=1) + "\n")
        replace_section(f"certificates_{name}", render_table(results))
        if name == "cifar10":
            replace_section("certified_literature", literature_table())
        replace_section("certificates", overview(kept_results()), PAGE)
    except (ValueError, FileNotFoundError) as error:
        print(f"certificates.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def compare(name: str, folders: list[Path]) -> int:
    """Keep what the trainings of the kept results gave when they were repeated in other folders; the exit status."""
    paths = [RESULTS / f"certificates_{name}.json", *(folder / "results.json" for folder in folders)]
    try:
        first, *repeats = [cells_of(json.loads(path.read_text(encoding="utf-8"))) for path in paths]
        repeated = {(cell["arm"], cell["seed"]) for found in repeats for cell in found["cells"]}
        first["cells"] = [cell for cell in first["cells"] if (cell["arm"], cell["seed"]) in repeated]
        replace_section(f"repeats_{name}", repeats_table([first, *repeats]))
    except (ValueError, FileNotFoundError) as error:
        print(f"certificates.py: error: {error}", file=sys.stderr)
        return 2
    write_text(RESULTS / f"repeats_{name}.json", json.dumps([first, *repeats], indent=1) + "\n")
    return 0


def cells_of(results: dict[str, Any]) -> dict[str, Any]:
    """Where a study ran, its radii, and SA and certified accuracies of each arm and seed that is no dual model."""
    runs = [run for run in results["runs"] if not run["arm"].startswith("dual_")]
    cells = [
        {"arm": r["arm"], "seed": r["seed"], **{k: r["entries"][0][k] for k in ("sa", "certified")}} for r in runs
    ]
    return {"environment": results["environment"], "radii": results["radii"], "cells": cells}


def repeats_table(found: list[dict[str, Any]]) -> str:
    """A row for each arm, seed and repeat, in Markdown: torch, processor, threads, SA and certified accuracies."""
    rows = []
    for repeat in found:
        where = repeat["environment"]
        machine = [where["packages"]["torch"], where["hardware"].split(",")[0], str(where.get("threads", "-"))]
        for cell in repeat["cells"]:
            values = [f"{value:.2f}" for value in (cell["sa"], *cell["certified"])]
            rows.append([cell["arm"], str(cell["seed"]), *machine, *values])
    rows.sort(key=lambda row: row[:2])
    radii = [f"L2 {radius_name(radius)}" for radius in found[0]["radii"]]
    return markdown_table(["arm", "seed", "torch", "processor", "threads", "SA %", *radii], rows)


def kept_results() -> dict[str, dict[str, Any]]:
    """The results in the repository by the name of their dataset."""
    paths = {name: RESULTS / f"certificates_{name}.json" for name in KEPT_DATASETS}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}
