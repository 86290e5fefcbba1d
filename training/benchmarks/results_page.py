"""Render every result table from the files that scripts have written; no number in them is typed.

    python training/benchmarks/results_page.py

Writes the sections of the README beside this file, from `results/`; ten rows into the README of the checkout, from
`model_cards/*/results.json` and the studies; and the measured time of a step into the comments of the recipes. The
scripts that keep results of theirs in `results/` (`study.py --render`, `certificates.py --render`) call it.
"""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout: scripts run from any folder

from hf_dualmoe.evaluation import RobustnessReport
from training.benchmarks.certificates import report as certificates
from training.benchmarks.full_scale import full_scale
from training.benchmarks.parity import parity
from training.benchmarks.reliability import smoke_recipes
from training.benchmarks.shared.render import folded, markdown_table, replace_section
from training.benchmarks.shared.run import create_parser
from training.benchmarks.shared.store import BENCHMARKS, CHECKOUT, RESULTS, TRAINING, read_json
from training.benchmarks.speed import cpu, gpu_table
from training.benchmarks.study.findings import render_findings
from training.benchmarks.study.summary import mean_sweep, render_arms, summarise

MISSING = "Not measured yet."
TIME_LINE = "# Time: "


def kept(name: str) -> Any:
    """A file of `results/` by its name; None where there is none."""
    path = RESULTS / f"{name}.json"
    return read_json(path) if path.is_file() else None


def rendered(name: str, render: Callable[[Any], str]) -> str:
    """A file of `results/` as text."""
    results = kept(name)
    return MISSING if results is None else render(results)


# --- studies ---------------------------------------------------------------------------------------------------------

LABELLED = (0, 0.5, 0.8, 0.9, 1)  # alphas that the picture names
DIALS = {  # arm: label, color, marker, line of the plot; not those in the weights, which meet a weaker attack
    "separate_clean": ("trained apart, clean F_S (paper)", "#b9b9b9", "s", "--"),
    "pair_clean": ("trained apart, clean F_S (paper)", "#b9b9b9", "s", "--"),
    "jtdmoe_clean": ("JTDMoE, clean F_S (paper)", "#8fbde0", "o", "--"),
    "separate_dual": ("trained apart, F_S at eps / 2", "#6b6b6b", "s", "-"),
    "dial_outputs": ("warm pair, outputs mixed", "#6b6b6b", "s", "-"),
    "jtdmoe": ("JTDMoE, F_S at eps / 2", "#1f6fb4", "o", "-"),
    "jtdmoe_warm": ("JTDMoE, warm start", "#c8641e", "D", "-"),
}


def render_study(results: dict[str, Any]) -> str:
    """What one study found: its arms and their differences."""
    arms = summarise(results["runs"], results["study"])
    about, names = describe_study(results, arms)
    extra = {arm: entry for arm, entry in arms.items() if results["study"]["arms"][arm].get("extra")}
    blocks = [
        about,
        render_arms({arm: entry for arm, entry in arms.items() if arm not in extra}),
        *([folded("More arms, some with fewer seeds", render_arms(extra))] if extra else []),
        folded("What the names mean", names),
        render_findings({**results, "arms": arms}),
    ]
    return "\n\n".join(filter(None, blocks))


def render_old_study(results: dict[str, Any]) -> str:
    """The arms of a study that others have taken the place of."""
    arms = summarise(results["runs"], results["study"])
    about, names = describe_study(results, arms)
    return f"{about}\n\n{render_arms(arms)}\n\n{names}"


def describe_study(results: dict[str, Any], arms: dict[str, Any]) -> tuple[str, str]:
    """What was equal in a study and how much it measured, and a list of its arms in words."""
    images = max(run["num_images"] for run in results["runs"])
    about = (
        f"Each arm trains for what {results['study']['passes']} passes of one network over the training images cost, "
        f'attack included, unless "passes" says otherwise: a dual model has two models to train. {images:,} test '
        "images; mean of the seeds, range in brackets."
    )
    if halved := sorted({run["seed"] for run in results["runs"] if run["training"].get("bf16")}):
        about += f" Trained under bfloat16 autocast: seed {', '.join(map(str, halved))}; all attacks are in float32."
    for run in results["runs"]:
        if not run["training"].get("calibration", {"accepted": True})["accepted"]:
            about += (
                f" Held-out images accepted no logit map for `{run['arm']}`, seed {run['seed']}: it mixes plainly."
            )
    return about, "\n".join(f"- `{arm}`: {entry['about']}." for arm, entry in arms.items() if entry["about"])


def dials(results: dict[str, Any]) -> tuple[dict[str, list[dict[str, float]]], list[int]]:
    """The dials to draw, each the mean over the same seeds, all swept alike, and these seeds.

    Raises:
        ValueError: The dials were swept with different attacks.
    """
    runs, seeds = of_the_same_seeds([run for run in results["runs"] if run["arm"] in DIALS])
    if any(run["swept_with"] != runs[0]["swept_with"] for run in runs):
        raise ValueError("The dials were swept with different attacks: sweep them again before drawing them together.")
    sweeps = {arm: [run["sweep"] for run in runs if run["arm"] == arm] for arm in DIALS}
    return {arm: mean_sweep(own) for arm, own in sweeps.items() if own}, seeds


def of_the_same_seeds(runs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
    """The runs of the arms and seeds that can be compared, and these seeds.

    Seeds differ in their test images, so each arm must have all of them: the most arms, then the most seeds.
    """
    arms = {seed: {run["arm"] for run in runs if run["seed"] == seed} for seed in sorted({r["seed"] for r in runs})}
    seeds = max(
        ([s for s in arms if arms[s] == own] for own in arms.values()), key=lambda s: (len(arms[s[0]]), len(s))
    )
    return [run for run in runs if run["seed"] in seeds], seeds


def draw(studies: dict[str, dict[str, Any]], path: Path) -> None:
    """Trade-off of the dual models along the dial, one panel for each study, by its title."""
    figure = Figure(figsize=(5.2 * len(studies), 4), layout="constrained")
    panels = figure.subplots(1, len(studies), squeeze=False)[0]
    for axes, (title, results) in zip(panels, studies.items(), strict=True):
        curves, seeds = dials(results)
        for arm, points in curves.items():
            label, color, marker, line = DIALS[arm]
            where = [p["ra"] for p in points], [p["sa"] for p in points]
            axes.plot(*where, marker=marker, color=color, label=label, linestyle=line)
        for point in curves.get("jtdmoe", curves.get("dial_outputs", [])):
            if point["alpha"] in LABELLED:
                at = (point["ra"], point["sa"])
                axes.annotate(f"{point['alpha']:g}", at, (4, 4), textcoords="offset points", fontsize=8)
        over = f"seed {seeds[0]}" if len(seeds) == 1 else f"mean of {len(seeds)} seeds"
        axes.set(title=f"{title}, {over}", xlabel="RA %, dial's attack, held-out images", ylabel="SA %")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


# --- other sections --------------------------------------------------------------------------------------------------


def render_public(results: dict[str, Any]) -> str:
    """Numbers that others have published, for scale."""
    rows = [[row["what"], row["clean"], row["robust"], row["source"]] for row in results["rows"]]
    return markdown_table(["CIFAR-10, L∞ 8/255 unless said otherwise", "clean %", "robust %", "source"], rows, 4)


def render_attack_dtype(results: dict[str, Any]) -> str:
    """AutoAttack in full and in half precision: two reports of `evaluate.py` on the same model and images."""
    rows, whole = [], results["fp32"]
    attacks = [name for name in whole["metrics"]["autoattack"] if name != "clean"]
    for dtype, report in results.items():
        cost = next(cost for name, cost in report["cost"].items() if name.startswith("AutoAttack"))
        left = [f"{report['metrics']['autoattack'][name]:.1f}" for name in attacks]
        rows.append([dtype, *left, f"{cost['seconds']:.0f}", f"{cost['forward'] + cost['gradient']:.0f}"])
    where = f"{whole['dataset']['num_images']} images, {whole['environment']['hardware']}"
    header = ["precision", *(f"RA % after {name}" for name in attacks), "seconds", "passes per image"]
    precision = RobustnessReport(**results["bf16"]).autoattack_precision()
    return f"{where}:\n\n{markdown_table(header, rows)}\n\n{precision}"


def render_reliability() -> str:
    """What was tried to break runs and loading, and what came of it."""
    survival, fuzz, recipes = (kept(name) for name in ("survival", "fuzz", "smoke_recipes"))
    where = ", ".join(f"{count} in {place}" for place, count in sorted(survival["where"].items()))
    equal = [name for name, same in survival["equal_to_the_bit"].items() if same]
    smoked = [name for name, recipe in recipes["recipes"].items() if "smoke" in recipe]
    versions = ", ".join(f"{name} {version}" for name, version in survival["environment"]["packages"].items())
    rows = [
        ["SIGKILL during one run", f"{survival['kills']} ({where})"],
        ["equal to the bit afterwards", f"{len(equal)} of {len(survival['equal_to_the_bit'])}: {', '.join(equal)}"],
        ["full disk", f"ends with a message; {survival['disk_full']['intact_checkpoint']} is whole, the run goes on"],
        ["fuzzed calls, configs, weight files and images", f"{fuzz['cases']:,}"],
        ["of these: work, refused with a clear error", f"{fuzz['outcomes']['works']} / {fuzz['outcomes']['refused']}"],
        ["of these: crash, hang or write elsewhere", str(len(fuzz["faults"]))],
        ["full-scale recipes killed and gone on with", ", ".join(smoked)],
        ["versions of these runs", versions],
    ]
    core = ("torch", "transformers", "timm", "datasets", "huggingface_hub")
    for name, suite in (kept("environments") or {"environments": {}})["environments"].items():
        if "passed" in suite:
            packages = ", ".join(f"{package} {suite['packages'][package]}" for package in core)
            counts = ", ".join(f"{suite[count]:,} {count}" for count in ("passed", "failed", "errors", "skipped"))
            rows.append([f"test suite, {name}: {packages}", counts])
    return markdown_table(["tried", "outcome"], rows, 2)


SECTIONS: dict[str, Callable[[], str]] = {
    "study_cifar10_full": partial(rendered, "study_cifar10_full", render_study),
    "study_digits": partial(rendered, "study_digits", render_study),
    "public_numbers": partial(rendered, "public_numbers", render_public),
    "certificates_digits": partial(rendered, "certificates_digits", certificates.render),
    "certificates_cifar10": partial(rendered, "certificates_cifar10", certificates.render),
    "certified_literature": certificates.render_literature,
    "speed": partial(rendered, "speed", cpu.render),
    "speed_gpu": lambda: gpu_table.render(*gpu_table.read_measurements()),
    "full_scale": partial(rendered, "full_scale", full_scale.render),
    "attack_dtype": partial(rendered, "attack_dtype", render_attack_dtype),
    "autoattack_parity": partial(rendered, "autoattack_parity", parity.render),
    "reliability": render_reliability,
    "smoke_recipes": partial(rendered, "smoke_recipes", smoke_recipes.render),
    "study_cifar10": partial(rendered, "study_cifar10", render_old_study),
}


# --- ten rows --------------------------------------------------------------------------------------------------------

ROWS = 10
HEADER = ["model", "dataset", "eps", "parameters", "networks per answer", "SA %", "RA % (attack)", "source"]
STRONG = {"ra_adaptive_union": "adaptive union", "ra_autoattack": "AutoAttack"}  # what a row names
STUDY = "cifar10_full"  # whose arms have rows
ARMS = {  # the arms that may have a row, most interesting first, and what they are
    "single": "one network",
    "half_eps": "one network, in the end trained with half of eps",
    "single_long": "one network, trained as long as a dual model in all",
    "dial_weights": "weights of two networks mixed",
    "dial_outputs": "outputs of the same two networks mixed",
    "jtdmoe_warm": "JTDMoE, warm start",
    "rt_er_heads": "RT-ER, four heads on one trunk",
    "rt_er": "RT-ER, four thin experts",
    "pair_clean": "outputs of a clean and a robust network mixed, as in the paper",
}


def radius(eps: float) -> str:
    """A radius as a fraction of 255 where it is one."""
    levels = 255 * eps
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-6 else f"{eps:g}"


def robust_cell(metrics: dict[str, Any]) -> str:
    """Robust accuracies with the attacks that gave them: the strong ones, else the PGD of the report."""
    found = {title: metrics[name] for name, title in STRONG.items() if name in metrics}
    weak = {name.replace("ra_pgd", "PGD-"): metrics[name] for name in metrics if name.startswith("ra_pgd")}
    return ", ".join(f"{value:.1f} ({title})" for title, value in (found or weak).items())


def card_rows(folder: Path) -> list[list[str]]:
    """A shared model at its alpha, and its controls."""
    path = folder / "results.json"
    report, link = read_json(path), f"[card]({path.relative_to(CHECKOUT).parent.as_posix()}/README.md)"
    model, threat = report["model"], (report["dataset"]["name"], radius(report["threat"]["eps"]))
    networks = "2" if "alpha" in model and model["mixing"] != "weights" else "1"
    name = f"{folder.name}, alpha {model['alpha']:g}" if "alpha" in model else folder.name
    described = [(name, f"{model['parameters'] / 1e6:.2f} M", networks, report["metrics"])]
    described += [(f"{folder.name}: {control}", "-", "-", metrics) for control, metrics in report["controls"].items()]
    return [
        [title, *threat, size, count, f"{metrics['sa']:.1f}", robust_cell(metrics), link]
        for title, size, count, metrics in described
    ]


def study_rows() -> list[list[str]]:
    """Arms of the study of all CIFAR-10, each the mean over the same seeds."""
    results = kept(f"study_{STUDY}")
    if results is None:
        return []
    study, rows = results["study"], []
    runs, seeds = of_the_same_seeds([run for run in results["runs"] if run["arm"] in ARMS])
    summary = summarise(runs, study)
    count = "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    link = f"[study](training/benchmarks/README.md), {STUDY}, {count}"
    for arm, title in ARMS.items():
        if entry := summary.get(arm):
            networks = "2" if "robust" in entry and study["arms"][arm].get("mixing") != "weights" else "1"
            size, sa, ra = f"{entry['parameters'] / 1e6:.2f} M", entry["sa"]["mean"], entry["ra"]["mean"]
            cells = ["cifar10", str(study["settings"]["eps"]), size, networks, f"{sa:.1f}"]
            rows.append([title, *cells, f"{ra:.1f} (adaptive union)", link])
    return rows


def render_summary() -> str:
    """The ten rows: shared models with their controls, then arms of the study."""
    rows = [row for path in sorted(CHECKOUT.glob("model_cards/*/results.json")) for row in card_rows(path.parent)]
    return markdown_table(HEADER, (rows + study_rows())[:ROWS])


# --- writing ---------------------------------------------------------------------------------------------------------


def with_time(recipe: str, text: str) -> str:
    """A recipe whose last comment before the settings is the time that it takes."""
    line = f"{TIME_LINE}{text}\n"
    if re.search(f"^{TIME_LINE}.*\n", recipe, flags=re.MULTILINE):
        return re.sub(f"^{TIME_LINE}.*\n", lambda _: line, recipe, flags=re.MULTILINE)
    head = re.match(r"(#.*\n)*", recipe).group()
    return head + line + recipe[len(head) :]


def render_page(readme: Path = BENCHMARKS / "README.md", front: Path = CHECKOUT / "README.md") -> None:
    """Write all sections, the ten rows of the front page, the picture of the dials, and the times of the recipes.

    Raises:
        ValueError: A README has no place for a section, or a results file is not fit to be shown.
    """
    texts = {name: render() for name, render in SECTIONS.items()}
    for name, text in texts.items():
        replace_section(name, text, readme)
    replace_section("results", render_summary(), front)
    titles = {"cifar10_full": "CIFAR-10", "digits": "Digits"}
    studies = {title: kept(f"study_{name}") for name, title in titles.items()}
    draw({title: results for title, results in studies.items() if results}, RESULTS / "dials.png")
    for recipe in smoke_recipes.FULL_SCALE:
        path = TRAINING / "recipes" / f"{recipe}.yaml"
        path.write_text(with_time(path.read_text(encoding="utf-8"), gpu_table.step_time(recipe)), encoding="utf-8")


def main() -> int:
    create_parser(__doc__).parse_args()
    try:
        render_page()
    except (ValueError, FileNotFoundError) as error:
        print(f"results_page.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
