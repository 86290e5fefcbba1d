"""Write the README's "Results" and "Reliability" sections from kept results; no number in them is typed.

python training/benchmarks/results_page.py

Reads results/study_*.json, which `study.py --render` keeps, results/public_numbers.json, what others
published, results/{survival,fuzz,smoke_recipes}.json, and results/environments.json of tests/environments.py.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout: scripts run from any folder

from training.benchmarks.shared.tables import HERE, RESULTS, markdown_table, replace_section
from training.benchmarks.study.findings import (
    MEASURES,
    SUMMARY,
    differences,
    findings,
    in_short,
    in_words,
    targets,
    targets_of_curves,
)
from training.benchmarks.study.summary import EARLIER, EARLIER_NOTE, mean_sweep, notes, summarise

README = HERE.parents[1] / "README.md"
PICTURE = "dials.png"
LABELLED = (0, 0.5, 0.8, 0.9, 1)  # alphas that the picture names
TITLES = {"cifar10": "CIFAR-10, L∞ 8/255", "digits": "Digits, L∞ 0.15"}

Arms = dict[str, dict[str, Any]]


DIALS = {  # arm: label, color, marker, line of the plot
    "separate_clean": ("trained apart, clean F_S (paper)", "#b9b9b9", "s", "--"),
    "jtdmoe_clean": ("JTDMoE, clean F_S (paper)", "#8fbde0", "o", "--"),
    "separate_dual": ("trained apart, F_S at eps / 2", "#6b6b6b", "s", "-"),
    "separate_heads": ("trained apart, heads, F_S at eps / 2", "#2f2f2f", "^", "-"),
    "jtdmoe": ("JTDMoE, F_S at eps / 2", "#1f6fb4", "o", "-"),
    "jtdmoe_heads_warm": ("JTDMoE of heads, warm start", "#c8641e", "D", "-"),
}


def read(name: str) -> dict[str, Any]:
    """The kept results of a study.

    Raises:
        FileNotFoundError: There are none yet.
    """
    path = RESULTS / f"study_{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the study {name!r}, then study.py --study {name} --render.")
    results = json.loads(path.read_text(encoding="utf-8"))
    return {**results, "arms": summarise(results["runs"], results["study"])}


# --- parts of the page -----------------------------------------------------------------------------------------------


def main_table(arms: Arms) -> str:
    """One row per arm, dual models with their F_R below."""
    header = ["", "seeds", "parameters", "cost of an answer", "passes"]
    header += ["SA %", "RA %, adaptive union", "RA %, PGD-10"]

    def cell(values: dict[str, float]) -> str:
        text = f"{values['mean']:.1f}"
        return text if values["min"] == values["max"] else f"{text} ({values['min']:.1f} to {values['max']:.1f})"

    rows = []
    for name, arm in arms.items():
        cost = [str(len(arm["seeds"])), f"{arm['parameters'] / 1e3:.0f}k", f"{arm['relative_flops']:.2f}x"]
        cost.append(f"{arm['passes']:.0f}")
        mark = arm.get("mark", "")
        rows.append([name, *cost, cell(arm["sa"]), cell(arm["ra"]) + mark, f"{arm['ra_pgd']['mean']:.1f}"])
        if "robust" in arm:
            parts = [cell(arm["robust"]["sa"]), cell(arm["robust"]["ra"]) + mark]
            rows.append([f"F_R of {name}", "", "", "", "", *parts, ""])
    return "\n\n".join([markdown_table(header, rows), *notes(arms)[:1]])


def confirmed(results: dict[str, Any]) -> dict[str, Any] | None:
    """The study's results with the numbers of `study.py --confirm` in the place of the first; None before that ran."""
    runs = [{**run, **run["confirmed"]} for run in results["runs"] if "confirmed" in run]
    return {**results, "runs": runs, "arms": summarise(runs, results["study"])} if runs else None


def levers_table(results: dict[str, Any]) -> str:
    """What each lever changes against the study's reference arm, and what it leaves of the training steps."""
    reference = results["study"]["reference"]
    rows = []
    for name, arm in results["arms"].items():
        changes = [in_words(differences(results, name, reference, key)) for key in MEASURES]
        if name == reference:
            changes = [f"{arm[key]['mean']:.1f} %" for key in MEASURES]
        load = f"{arm['least_load']:.0f}" if "least_load" in arm else "-"
        changes[-1] += arm.get("mark", "")
        rows.append([f"`{name}`: {arm['about']}", *changes, str(arm["steps"]), load])
    table = markdown_table(["lever", "SA, points", "RA (union), points", "steps", "least load %"], rows)
    return "\n\n".join([table, *notes(results["arms"])[:1]])


def public_table() -> str:
    """Numbers that others have published, for scale."""
    rows = json.loads((RESULTS / "public_numbers.json").read_text(encoding="utf-8"))["rows"]
    cells = [[row["what"], row["clean"], row["robust"], row["source"]] for row in rows]
    return markdown_table(["CIFAR-10, L∞ 8/255 unless said otherwise", "clean %", "robust %", "source"], cells)


def drawn(results: dict[str, Any]) -> tuple[dict[str, list[dict[str, float]]], list[int]]:
    """The dials to draw, each the mean over the seeds that all of them have and all swept alike, and these seeds."""
    runs: dict[str, dict[int, Any]] = {arm: {} for arm in DIALS}
    for run in results["runs"]:
        if run["arm"] in runs:
            runs[run["arm"]][run["seed"]] = run
    runs = {arm: own for arm, own in runs.items() if own}
    common = sorted(set.intersection(*(set(own) for own in runs.values())))
    attacks = [run["swept_with"] for own in runs.values() for seed, run in own.items() if seed in common]
    if any(attack != attacks[0] for attack in attacks):
        raise ValueError("The dials were swept with different attacks: sweep them again before drawing them together.")
    return {arm: mean_sweep([own[seed]["sweep"] for seed in common]) for arm, own in runs.items()}, common


def draw(studies: dict[str, dict[str, Any]], path: Path) -> None:
    """Trade-off of the dual models along the dial, one panel per study."""
    figure, panels = plt.subplots(
        1, len(studies), figsize=(5.2 * len(studies), 4), layout="constrained", squeeze=False
    )
    for axes, (name, results) in zip(panels[0], studies.items(), strict=True):
        dials, seeds = drawn(results)
        for arm, points in dials.items():
            label, color, marker, line = DIALS[arm]
            where = ([p["ra"] for p in points], [p["sa"] for p in points])
            axes.plot(*where, marker=marker, color=color, label=label, linestyle=line)
            for point in points if arm == "jtdmoe" else []:
                if point["alpha"] not in LABELLED:
                    continue
                axes.annotate(
                    f"{point['alpha']:g}", (point["ra"], point["sa"]), (4, 4), textcoords="offset points", fontsize=8
                )
        over = "seed " + str(seeds[0]) if len(seeds) == 1 else f"mean of {len(seeds)} seeds"
        axes.set(title=f"{TITLES[name]}, {over}", xlabel="RA %, dial's attack, held-out images")
        axes.set(ylabel="SA %, held-out images")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def folded(title: str, text: str) -> str:
    """Markdown that a reader may open."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def sweep_text(results: dict[str, Any], arm: str) -> str:
    """What an arm's dial was swept with, where that was less than the whole attack of the dial."""
    members = [run["swept_with"] for run in results["runs"] if run["arm"] == arm and "swept_with" in run]
    weakest = min(members, key=len, default=None)
    return f"; its dial was chosen under {' and '.join(weakest)} alone" if weakest and len(weakest) == 1 else ""


def by_extra(results: dict[str, Any]) -> tuple[Arms, Arms]:
    """The arms that a study runs always, and those that only `--arms` runs."""
    extra = {arm for arm, entry in results["study"]["arms"].items() if entry.get("extra")}
    arms = results["arms"]
    return {n: arms[n] for n in arms if n not in extra}, {n: arms[n] for n in arms if n in extra}


def study_section(name: str, results: dict[str, Any]) -> list[str]:
    """What one study found: all arms, differences, aims, and what is left of it on images not used before."""
    seeds = max(len(arm["seeds"]) for arm in results["arms"].values())
    images, trained = max(run["num_images"] for run in results["runs"]), results["study"]["settings"]
    limit = trained.get("max_train_samples")
    about = {arm: f"{entry['about']}{sweep_text(results, arm)}" for arm, entry in results["arms"].items()}
    names = "\n".join(f"- `{arm}`: {text}." for arm, text in about.items())
    usual, extra = by_extra(results)
    lines = [
        f"### {TITLES[name]}" + (f", {limit:,} training images" if limit else ""),
        f"Each method trains for what {results['study']['passes']} passes of one backbone over the training "
        'images cost, attack included, unless "passes" says otherwise: a dual model has two models to train. '
        f"{images:,} test images; seeds per method in the table, {seeds} at most (mean, range in brackets).",
        main_table(usual),
        *([folded("More arms, of which some have fewer seeds", main_table(extra))] if extra else []),
        folded("What the names mean", names),
        folded("Differences in points, mean and range over the seeds", "\n".join(findings(results))),
        markdown_table(["aim", "found", "met"], [*targets(results), *targets_of_curves(results)]),
    ]
    if again := confirmed(results):
        images = max(run["num_images"] for run in again["runs"])
        lines += [
            f"The same models, at the same alphas, on {images:,} test images that no seed had drawn and no choice was "
            "made by:",
            main_table(again["arms"]),
            markdown_table(["aim", "found", "met"], targets(again)),
        ]
    return lines


def summary() -> str:
    """What the studies found, in one table: CIFAR-10, the same on images not used before, digits."""
    studies = {name: read(name) for name in TITLES}
    columns = [studies["cifar10"], confirmed(studies["cifar10"]) or {"runs": []}, studies["digits"]]
    rows = [[title, *(in_short(results, arm, other) for results in columns)] for title, arm, other in SUMMARY]
    table = markdown_table(["in points", "CIFAR-10", "CIFAR-10, fresh images", "digits"], rows)
    return f"{table}\n\n{EARLIER_NOTE}" if EARLIER in table else table


def page() -> str:
    """The whole section in Markdown."""
    studies = {name: read(name) for name in TITLES}
    lines = [line for name, results in studies.items() for line in study_section(name, results)]
    draw(studies, RESULTS / PICTURE)
    lines.append(f"![Trade-off of the dual models along the dial](training/benchmarks/results/{PICTURE})")
    if (RESULTS / "study_digits_levers.json").is_file():
        levers = read("digits_levers")
        lines += [
            "### Levers, on digits",
            f"{levers['study']['passes']} passes of a plain backbone per training image, but where the lever is the "
            "length. That is far too short to saturate: levers that make a step dearer mostly show what fewer steps "
            f"cost. Differences are to `{levers['study']['reference']}`; those smaller than the ranges over seeds in "
            "the table above say nothing.",
            folded("All levers", levers_table(levers)),
        ]
    lines += ["### For scale: what others have published", public_table()]
    return "\n\n".join(lines)


def reliability() -> str:
    """What was tried to break runs and loading, and what came of it."""
    kept = {
        name: json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("survival", "fuzz", "smoke_recipes")
    }
    survival, fuzz = kept["survival"], kept["fuzz"]
    where = ", ".join(f"{count} in {place}" for place, count in sorted(survival["where"].items()))
    equal = [name for name, same in survival["equal_to_the_bit"].items() if same]
    smoked = [name for name, recipe in kept["smoke_recipes"]["recipes"].items() if "smoke" in recipe]
    versions = ", ".join(f"{name} {version}" for name, version in survival["environment"]["packages"].items())
    rows = [
        ["SIGKILL during one run", f"{survival['kills']} ({where})"],
        ["equal to the bit afterwards", f"{len(equal)} of {len(survival['equal_to_the_bit'])}: {', '.join(equal)}"],
        ["full disk", f"ends with a message; {survival['disk_full']['intact_checkpoint']} is whole, the run goes on"],
        ["fuzzed calls, configs, weight files and images", f"{fuzz['cases']:,}"],
        [
            "of these: work, refused with a clear error",
            " / ".join(str(fuzz["outcomes"][n]) for n in ("works", "refused")),
        ],
        ["of these: crash, hang or write elsewhere", str(len(fuzz["faults"]))],
        ["full-scale recipes killed and gone on with", ", ".join(smoked)],
        ["versions of these runs", versions],
        *environments(),
    ]
    return markdown_table(["tried", "outcome"], rows).replace("| --- | ---: |", "| --- | --- |")


CORE = ("torch", "transformers", "timm", "datasets", "huggingface_hub")  # named in the table for each environment


def environments() -> list[list[str]]:
    """A row for each environment of tests/environments.py that had an interpreter."""
    path = RESULTS / "environments.json"
    rows = []
    for name, result in json.loads(path.read_text(encoding="utf-8"))["environments"].items() if path.is_file() else ():
        if "passed" not in result:
            continue
        packages = ", ".join(f"{package} {result['packages'][package]}" for package in CORE)
        counts = ", ".join(f"{result[count]:,} {count}" for count in ("passed", "failed", "errors", "skipped"))
        rows.append([f"test suite, {name}: {packages}", counts])
    return rows


def main() -> int:
    try:
        replace_section("summary", summary(), README)
        replace_section("results", page(), README)
        replace_section("reliability", reliability(), README)
    except (ValueError, FileNotFoundError) as error:
        print(f"results_page.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
