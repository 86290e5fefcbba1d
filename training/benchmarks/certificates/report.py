"""What `certificates.py` reports: means over seeds, the alpha to use, what each penalty gains, tables."""

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from training.benchmarks.shared.render import folded, markdown_table
from training.benchmarks.shared.store import RESULTS, read_json, write_json

KEPT = 0.95  # of F_R's certified accuracy at the first radius: the goal
ABOUT = {
    "single_plain": "one 1-Lipschitz network, cross-entropy alone",
    "single": "one 1-Lipschitz network, trained for logit margins",
    "mixture_free": "hard-routed mixture of four such networks, load balancing 0.1",
    "mixture": "hard-routed mixture of four such networks, load balancing 1",
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

Spread = dict[str, float | None]
Row = dict[str, Any]


# --- what the runs say together --------------------------------------------------------------------------------------


def spread(values: list[float]) -> Spread:
    """Mean and standard deviation; None for one value."""
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None}


def summarise(runs: list[Row]) -> list[Row]:
    """Mean and standard deviation over seeds of SA and certified accuracy, per arm and alpha, and what is kept of F_R.

    A dual model has one row more, with `chosen`: at each seed the alpha that `chosen_alpha` takes.
    """
    groups: dict[tuple[str, float | str | None], list[tuple[Row, Row | None]]] = {}
    alone = {(run["arm"], run["seed"]): run for run in runs}
    for run in runs:
        base = alone.get((run["arm"].removeprefix("dual_"), run["seed"])) if run["arm"].startswith("dual_") else None
        for entry in run["entries"]:
            groups.setdefault((run["arm"], entry["alpha"]), []).append((entry, base and base["entries"][0]))
        if base is not None:
            alpha = chosen_alpha(run, base)
            chosen = next(entry for entry in run["entries"] if entry["alpha"] == alpha)
            groups.setdefault((run["arm"], "chosen"), []).append((chosen, base["entries"][0]))
    return [summary_row(arm, alpha, pairs) for (arm, alpha), pairs in groups.items()]


def summary_row(arm: str, alpha: float | str | None, pairs: list[tuple[Row, Row | None]]) -> Row:
    """One row of the summary, from the entries of an arm, each with that of its F_R."""
    certified = [entry["certified"] for entry, _ in pairs]
    known = all(values is not None for values in certified)
    row = {"arm": arm, "alpha": alpha, "seeds": len(pairs), "sa": spread([entry["sa"] for entry, _ in pairs])}
    row["certified"] = [spread(list(values)) for values in zip(*certified, strict=True)] if known else None
    if alpha == "chosen":
        row["alpha"], row["chosen"] = None, [entry["alpha"] for entry, _ in pairs]
    if known and all(base and base["certified"] and base["certified"][0] > 0 for _, base in pairs):
        row["kept"] = spread([entry["certified"][0] / base["certified"][0] for entry, base in pairs])
        row["sa_gain"] = spread([entry["sa"] - base["sa"] for entry, base in pairs])
    return row


def chosen_alpha(dual: Row, robust: Row) -> float:
    """The lowest alpha at which a dual model keeps 95 % of F_R's certified accuracy on held-out images; 1 if none."""
    floor = KEPT * robust["held_out"][0]["certified"][0]
    good = [e["alpha"] for e in dual["held_out"] if e["certified"] is not None and e["certified"][0] >= floor]
    return min(good, default=1.0)


def gains(runs: list[Row]) -> dict[str, Row]:
    """What each penalty changes, seed by seed, in points: SA and certified accuracy at each radius."""
    alone = {(run["arm"], run["seed"]): run["entries"][0] for run in runs}
    found = {}
    for arm, other in GAINS.items():
        seeds = [seed for name, seed in alone if name == arm and (other, seed) in alone]
        pairs = [(alone[arm, seed], alone[other, seed]) for seed in seeds]
        changes = [
            [a - b for a, b in zip((own["sa"], *own["certified"]), (base["sa"], *base["certified"]), strict=True)]
            for own, base in pairs
        ]
        if changes:
            sa, *certified = (spread(list(values)) for values in zip(*changes, strict=True))
            found[arm] = {"against": other, "sa": sa, "certified": certified}
    return found


# --- tables ----------------------------------------------------------------------------------------------------------


def text_of(value: Spread | None, form: str = ".1f", scale: float = 1) -> str:
    """A mean, with its standard deviation where there are several seeds."""
    if value is None:
        return "-"
    text = f"{scale * value['mean']:{form}}"
    return text if value["std"] is None else f"{text} ± {scale * value['std']:.1f}"


def radius_name(radius: float) -> str:
    """0.1 -> "L2 0.1"; a multiple of 1/255 as a fraction."""
    levels = round(255 * radius)
    return f"L2 {levels}/255" if abs(levels - 255 * radius) < 1e-9 else f"L2 {radius:g}"


def render(results: dict[str, Any]) -> str:
    """Tables of the arms and of the dual models, the goal, and what each penalty gains."""
    blocks = [arm_table(results)]
    if results["gains"]:
        blocks.append("\n".join(gain_line(arm, gain) for arm, gain in results["gains"].items()))
    if any(row["arm"].startswith("dual_") for row in results["summary"]):
        blocks += dual_blocks(results)
    return "\n\n".join(blocks)


def accuracies(row: Row, radii: list[float]) -> list[str]:
    """SA and the certified accuracy at each radius."""
    return [text_of(value) for value in (row["sa"], *(row["certified"] or [None] * len(radii)))]


def arm_table(results: dict[str, Any]) -> str:
    """A row for each arm."""
    radii, rows = results["radii"], []
    for row in (row for row in results["summary"] if not row["arm"].startswith("dual_")):
        runs = [run for run in results["runs"] if run["arm"] == row["arm"]]
        loads = [load for run in runs for load in run.get("expert_load") or []]
        size, most = f"{runs[0].get('parameters', 0) / 1e3:.0f}k", f"{max(loads):.0f}" if loads else "-"
        rows.append([f"{row['arm']}: {ABOUT[row['arm']]}", str(row["seeds"]), size, most, *accuracies(row, radii)])
    return markdown_table(["arm", "seeds", "param.", "most load %", "SA %", *map(radius_name, radii)], rows)


def gain_line(arm: str, gain: Row) -> str:
    """What a penalty gains, in words."""
    changes = ", ".join(text_of(value, "+.1f") for value in gain["certified"])
    return f"- {arm} against {gain['against']}: SA {text_of(gain['sa'], '+.1f')}, certified {changes} points."


def dual_blocks(results: dict[str, Any]) -> list[str]:
    """The dual models at their chosen alphas, the goal, and the whole dial of the best one."""
    best, chosen, dial = first_dual(results), [], []
    for row in (row for row in results["summary"] if row["arm"].startswith("dual_")):
        alphas = ", ".join(f"{alpha:g}" for alpha in row.get("chosen", [row["alpha"]]))
        kept = text_of(row.get("kept"), ".1f", 100)
        cells = [row["arm"], alphas, *accuracies(row, results["radii"]), kept]
        (chosen if "chosen" in row else dial).append((row, cells))
    header = ["dual model", "alpha", "SA %", *map(radius_name, results["radii"]), "kept %"]
    whole = markdown_table(header, [cells for row, cells in dial if row["arm"] == best])
    return [
        markdown_table(header, [cells for _, cells in chosen]),
        goal_line(next(row for row, _ in chosen if row["arm"] == best)),
        folded(f"The whole dial of {best}", whole),
    ]


def first_dual(results: dict[str, Any]) -> str:
    """The dual model whose whole dial is shown: that of the arm with the highest certified accuracy."""
    joined = {row["arm"] for row in results["summary"]}
    robust = [row for row in results["summary"] if f"dual_{row['arm']}" in joined]
    return f"dual_{max(robust, key=lambda row: row['certified'][0]['mean'])['arm']}"


def goal_line(dual: Row) -> str:
    """Whether a dual model keeps 95 % of F_R's certified accuracy at the first radius and clearly gains SA."""
    text = f"{dual['arm']}, its alpha chosen on held-out images"
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


def render_literature(path: Path = RESULTS / "certified_literature.json") -> str:
    """What others published, each row with the page that states it."""
    rows = []
    for row in read_json(path)["rows"]:
        values = [row["clean"], *row["certified"].values()]
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        rows.append([f"[{row['what']}]({row['source']})", *cells])
    return markdown_table(["published", "clean %", *(f"L2 {r}" for r in ("36/255", "72/255", "108/255"))], rows)


# --- kept results ----------------------------------------------------------------------------------------------------


def keep(name: str, folder: Path) -> None:
    """Keep the results of a study in the repository, without its curves, which are long.

    Raises:
        FileNotFoundError: The folder has no results.
    """
    results = read_json(folder / "results.json")
    for run in results["runs"]:
        for entry in run["entries"]:
            entry.pop("curve")
    write_json(RESULTS / f"certificates_{name}.json", results)
