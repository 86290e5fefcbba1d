"""What the arms of a study are to each other: differences in points, trade-off curves, and which aims were reached."""

from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np

from training.benchmarks.shared.render import folded, markdown_table

MEASURES = ("sa", "ra")
GAIN = (3.0, -1.5)  # what a dial should change: SA by at least 3 points, RA by at most 1.5


@dataclass(frozen=True)
class Comparison:
    """An arm against another.

    Args:
        title: In words.
        arm: The arm.
        other: The arm that it is compared with; None = its own F_R.
        aim: The least changes of SA and RA, in points, that were aimed at; None = nothing was.
    """

    title: str
    arm: str
    other: str | None = None
    aim: tuple[float, float] | None = None


NO_WORSE = (0.0, 0.0)  # than one network of equal cost
NEAR = (-1.0, -1.0)  # to one network that was trained as long in all
HEADER = ["in points", "SA", "RA (union)", "aim", "reached"]
COMPARISONS = (
    # --- mixtures
    Comparison("Four mixed heads on one trunk against one network of equal cost", "rt_er_heads", "single", NO_WORSE),
    Comparison("Mixed thin experts against one network of equal cost", "rt_er", "single", NO_WORSE),
    Comparison("Mixing all (thin) experts against hard routing among full ones", "rt_er", "rt_er_hard"),
    Comparison("The second-expert term of RT-ER against none, hard routing", "rt_er_hard", "moe_at"),
    Comparison("Shared trunk, CE term and balance against the paper's form of RT-ER", "rt_er_hard", "rt_er_paper"),
    Comparison("The paper's form of RT-ER against one network of equal cost", "rt_er_paper", "single", NO_WORSE),
    Comparison("TRADES against adversarial training, hard routing", "moe_trades", "moe_at"),
    Comparison("Four full last stages, all mixed, against one network", "dense_ensemble", "single"),
    Comparison("A wider network with the mixture's parameters against one network", "wide_single", "single"),
    Comparison("One network trained longer against one network", "single_long", "single"),
    # --- options of the training, one network
    Comparison("A quarter of the loss on clean images against none", "single_clean_weight", "single"),
    Comparison("Adversarial weight perturbation against none", "single_awp", "single"),
    Comparison("Label smoothing and averaged weights against neither", "single_smooth", "single"),
    Comparison("CutMix and averaged weights against neither", "single_cutmix", "single"),
    Comparison("A fifth of the weight decay against all of it", "single_light_decay", "single"),
    Comparison("SiLU in place of the ReLUs of the start against none", "single_silu", "single"),
    Comparison("One cycle from scratch against a constant rate that falls late", "single_one_cycle", "single"),
    Comparison("TRADES against adversarial training, one network", "single_trades", "single"),
    Comparison("A hardened clean network against one that was robust from the start", "hardened", "single"),
    # --- the dial against its own robust end
    Comparison("The dial of JTDMoE as in the paper against its F_R", "jtdmoe_clean", None, GAIN),
    Comparison("The dial of JTDMoE with F_S at eps / 2 against its F_R", "jtdmoe", None, GAIN),
    Comparison("The dial of JTDMoE, warm start, against its F_R", "jtdmoe_warm", None, GAIN),
    Comparison("The dial of a pair with F_S at eps / 2 against its F_R", "separate_dual", None, GAIN),
    Comparison("The dial in the weights of a warm pair against its F_R", "dial_weights", None, GAIN),
    Comparison("The dial in the outputs of a warm pair against its F_R", "dial_outputs", None, GAIN),
    Comparison("The dial of a pair with clean F_S against its F_R", "pair_clean", None, GAIN),
    Comparison("The dial of that pair behind MixedNUTS' logit map against its F_R", "pair_clean_mapped", None, GAIN),
    Comparison("The dial from a clean network to it hardened against its F_R", "dial_hardened", None, GAIN),
    # --- dials against each other and against one network
    Comparison("A quarter of clean loss against the dial in the weights", "single_clean_weight", "dial_weights"),
    Comparison("The dial in the weights against that in the outputs", "dial_weights", "dial_outputs"),
    Comparison("The dial in the weights against one network as long in all", "dial_weights", "single_long", NEAR),
    Comparison("The dial in the outputs against one network as long in all", "dial_outputs", "single_long", NEAR),
    Comparison("JTDMoE, warm start, against one network as long in all", "jtdmoe_warm", "single_long", NEAR),
    Comparison("The dial of a pair with clean F_S against one network", "pair_clean", "single_long", NEAR),
    Comparison("A pair behind MixedNUTS' logit map against it without", "pair_clean_mapped", "pair_clean"),
    Comparison("JTDMoE, warm start, against the dial in the weights", "jtdmoe_warm", "dial_weights"),
    Comparison("Joint training against joining two models trained apart", "jtdmoe", "separate_dual"),
    Comparison("JTDMoE with F_S at eps / 2 against the paper's, on clean images", "jtdmoe", "jtdmoe_clean"),
    Comparison("F_S at eps / 2 against clean, trained apart", "separate_dual", "separate_clean"),
    Comparison("JTDMoE against one network, at twice the cost of an answer", "jtdmoe", "single"),
)
# Whose dial should lie above whose. Not those in the weights: fewer members of the dial's attack apply to one network,
# which the sweeps show where both are F_R alone.
CURVES = (
    ("pair_clean_mapped", "pair_clean", "The dial behind MixedNUTS' logit map above that without"),
    ("jtdmoe_warm", "pair_clean", "The dial of JTDMoE, warm start, above that of a pair with clean F_S"),
    ("jtdmoe_warm", "dial_outputs", "The dial of JTDMoE, warm start, above that of the warm pair"),
    ("jtdmoe_clean", "separate_clean", "The dial of the paper's JTDMoE above that of its pair trained apart"),
    ("jtdmoe", "separate_clean", "The dial of JTDMoE with F_S at eps / 2 above that of the paper's pair"),
    ("jtdmoe", "separate_dual", "The dial of JTDMoE with F_S at eps / 2 above that of such a pair"),
)


# --- differences -----------------------------------------------------------------------------------------------------


def differences(results: dict[str, Any], comparison: Comparison) -> list[tuple[float, float]]:
    """By how many points of SA and RA an arm lies above the other, for each seed that both have."""
    own, theirs = (
        {run["seed"]: run for run in results["runs"] if run["arm"] == arm}
        for arm in (comparison.arm, comparison.other or comparison.arm)
    )
    pairs = [(own[seed], theirs[seed]) for seed in sorted(own.keys() & theirs.keys())]
    if comparison.other is None:
        pairs = [(run, run["robust"]) for run, _ in pairs if "robust" in run]
    return [tuple(run[key] - other[key] for key in MEASURES) for run, other in pairs]


def in_words(values: list[float]) -> str:
    """Mean difference with its range; "no clear difference" where the seeds disagree on the sign."""
    text = f"{mean(values):+.1f}"
    if len(values) == 1:
        return f"{text} (one seed)"
    text += f" ({min(values):+.1f} to {max(values):+.1f})"
    return text if min(values) > 0 or max(values) < 0 else f"{text}, no clear difference"


def verdict(met: list[bool], on_average: bool) -> str:
    """Whether an aim was reached in the mean, and by how many of the seeds."""
    answer = "**no**" if not on_average else "in the mean only" if 2 * sum(met) < len(met) else "yes"
    return f"{answer} ({sum(met)} of {len(met)} seeds)"


def comparison_row(results: dict[str, Any], comparison: Comparison) -> list[str] | None:
    """One row of the table; None where the study has not measured both arms."""
    changes = differences(results, comparison)
    if not changes:
        return None
    sa, ra = ([change[i] for change in changes] for i in (0, 1))
    aim, reached = "-", "-"
    if comparison.aim:
        least_sa, least_ra = comparison.aim
        aim = f"SA {least_sa:+g}, RA {least_ra:+g}"
        met = [gain >= least_sa and loss >= least_ra for gain, loss in changes]
        reached = verdict(met, mean(sa) >= least_sa and mean(ra) >= least_ra)
    arms = {name: results["arms"].get(name, {}) for name in (comparison.arm, comparison.other) if name}
    passes = [arm["passes"] for arm in arms.values() if "passes" in arm]
    unequal = len(passes) == 2 and max(passes) > 1.05 * min(passes)
    budget = f" ({passes[0]:.0f} against {passes[1]:.0f} passes)" if unequal else ""
    mark = next((arm["mark"] for arm in arms.values() if "mark" in arm), "")
    return [comparison.title + budget, in_words(sa), in_words(ra) + mark, aim, reached]


# --- curves ----------------------------------------------------------------------------------------------------------


def lead_of_curve(curve: list[dict], other: list[dict]) -> float | None:
    """Mean lead in SA points of one trade-off curve over another, over the range of RA that both reach.

    Args:
        curve, other: Points with `sa` and `ra` in %.

    Returns:
        None where they share no range.
    """

    def frontier(points: list[dict]) -> tuple[np.ndarray, np.ndarray]:
        best: list[tuple[float, float]] = []  # from the most robust point on: each must gain SA
        for point in sorted(points, key=lambda p: (-p["ra"], -p["sa"])):
            if not best or point["sa"] > best[-1][1]:
                best.append((point["ra"], point["sa"]))
        ra, sa = np.array(best[::-1]).T
        return ra, sa

    (ra, sa), (other_ra, other_sa) = frontier(curve), frontier(other)
    low, high = max(ra[0], other_ra[0]), min(ra[-1], other_ra[-1])
    if low >= high:
        return None
    grid = np.linspace(low, high, 101)
    return float((np.interp(grid, ra, sa) - np.interp(grid, other_ra, other_sa)).mean())


def curve_row(results: dict[str, Any], arm: str, other: str, title: str) -> list[str] | None:
    """A row as that of a comparison: lead of a dial over another, for the seeds where both were swept alike."""
    own, theirs = ({run["seed"]: run for run in results["runs"] if run["arm"] == name} for name in (arm, other))
    shared = [(own[seed], theirs[seed]) for seed in sorted(own.keys() & theirs.keys())]
    alike = [(run["sweep"], base["sweep"]) for run, base in shared if run["swept_with"] == base["swept_with"]]
    leads = [lead for pair in alike if (lead := lead_of_curve(*pair)) is not None]
    if not leads:
        return None
    reached = verdict([lead > 0 for lead in leads], mean(leads) > 0)
    return [f"{title} (held-out images, no union)", f"{in_words(leads)} at equal RA", "-", "SA > 0", reached]


def render_findings(results: dict[str, Any]) -> str:
    """All comparisons that the study has measured, in points, mean and range over the seeds; folded without an aim."""
    rows = [(comparison.aim, comparison_row(results, comparison)) for comparison in COMPARISONS]
    rows += [("SA > 0", curve_row(results, *curve)) for curve in CURVES]
    aimed, others = ([row for aim, row in rows if row and bool(aim) == wanted] for wanted in (True, False))
    blocks = [markdown_table(HEADER, aimed)] * bool(aimed)
    return "\n\n".join(blocks + [folded("More differences", markdown_table(HEADER, others))] * bool(others))
