"""What the arms of a study are to each other: differences in points, trade-off curves, and which aims were reached."""

from statistics import mean
from typing import Any

import numpy as np

MEASURES = {"sa": "SA", "ra": "RA"}
NOT_MEASURED = "not measured"
MIXTURES = {"rt_er": "RT-ER, thin experts", "rt_er_heads": "RT-ER, four heads on one trunk"}
DUALS = {  # arm: its name in the table of aims
    "jtdmoe_clean": "JTDMoE as in the paper",
    "jtdmoe": "JTDMoE with F_S at eps / 2",
    "separate_dual": "A pair with F_S at eps / 2",
    "separate_heads": "Such a pair of heads and one network",
    "separate_single": "Such a pair of two single networks",
    "separate_warm": "Such a pair of two single networks, F_S started from F_R,",
    "jtdmoe_heads_warm": "JTDMoE of heads with F_S at eps / 2, both started from one network,",
}
SUMMARY = (  # what the README's first table compares: title, arm, other arm (None: the F_R of the arm itself)
    ("The dial: JTDMoE at its alpha against its F_R", "jtdmoe", None),
    ("The dial of a pair without any mixture against its F_R", "separate_single", None),
    ("JTDMoE against one network, trained as long in all", "jtdmoe", "single_long"),
    (
        "JTDMoE of heads, warm start, against one network, trained as long in all",
        "jtdmoe_heads_warm",
        "single_long",
    ),
    ("A warm pair without any mixture against one network, trained as long in all", "separate_warm", "single_long"),
    ("RT-ER, thin experts, against one network of equal cost", "rt_er", "single"),
    ("RT-ER, four heads on one trunk, against one network of equal cost", "rt_er_heads", "single"),
    ("Mixing all (thin) experts against hard routing", "rt_er", "rt_er_hard"),
    ("The second-expert term of RT-ER against none, hard routing", "rt_er_hard", "moe_at"),
    ("The paper's form of RT-ER against one network of equal cost", "rt_er_paper", "single"),
)
CURVES = (  # whose dial should lie above whose
    ("jtdmoe_clean", "separate_clean", "Dial of the paper's JTDMoE above that of its pair trained apart"),
    ("jtdmoe", "separate_clean", "Dial of JTDMoE with F_S at eps / 2 above that of the paper's pair"),
    ("jtdmoe", "separate_dual", "Dial of JTDMoE with F_S at eps / 2 above that of such a pair"),
    ("jtdmoe_heads_warm", "jtdmoe", "Dial of JTDMoE of heads with a warm start above that of thin experts without"),
)
PAIRS = (  # what the list of differences compares: arm, other arm, title
    ("rt_er", "single", "Mixed thin experts against one network of equal cost"),
    ("rt_er_heads", "single", "Four mixed heads on one trunk against one network of equal cost"),
    ("single_half_eps", "single", "One network trained with half of eps against the one network"),
    ("rt_er_hard", "moe_at", "The second-expert term with hard routing against plain adversarial training of it"),
    ("rt_er", "rt_er_hard", "Mixing all (thin) experts against hard routing among full ones"),
    ("rt_er_hard", "rt_er_paper", "Shared trunk, CE term and balance against the paper's form of RT-ER"),
    ("moe_trades", "moe_at", "TRADES against adversarial training, hard routing"),
    ("dense_ensemble", "single", "Four full last stages, all mixed, against one network"),
    ("wide_single", "single", "A wider network with the mixture's parameters against the one network"),
    ("jtdmoe", "separate_dual", "Joint training against joining two models trained apart, each at its alpha"),
    ("jtdmoe", "jtdmoe_clean", "JTDMoE with F_S at eps / 2 against the paper's, on clean images"),
    ("jtdmoe", "jtdmoe_quarter", "JTDMoE with F_S at eps / 2 against a quarter of eps"),
    ("jtdmoe_quarter", "jtdmoe_quarter_0.5", "JTDMoE trained at alpha 0.25 against 0.5"),
    ("separate_dual", "separate_clean", "F_S at eps / 2 against clean, trained apart"),
    ("single_long", "single", "One network trained longer against the one network"),
    ("rt_er_heads_long", "single_long", "Four mixed heads on one trunk against one network, both trained longer"),
    ("jtdmoe", "single", "JTDMoE against one network, at twice the cost of an answer"),
    ("jtdmoe", "single_long", "JTDMoE against one network trained longer"),
    ("jtdmoe", "single_long_milder", "JTDMoE against one network trained longer with 3/4 of eps"),
    ("jtdmoe_heads_warm", "jtdmoe", "JTDMoE of heads, both models started from one network, against JTDMoE"),
    ("jtdmoe_warm", "jtdmoe", "The warm start alone, thin experts in both: JTDMoE with it against without"),
    ("jtdmoe_heads_warm", "single_long", "JTDMoE of heads with a warm start against one network trained longer"),
    ("separate_warm", "single_long", "The warm pair (F_S started from F_R) against one network trained longer"),
    (
        "separate_warm",
        "single_long_milder",
        "The warm pair against one network trained longer with 3/4 of eps",
    ),
    ("separate_heads", "single", "The pair of heads and one network against one network"),
    (
        "separate_heads",
        "separate_single",
        "The pair of heads and one network against two single networks",
    ),
    (
        "separate_heads",
        "single_long_milder",
        "The pair of heads and one network against one network trained longer with 3/4 of eps",
    ),
    ("jtdmoe", "single_half_eps", "JTDMoE against one network trained with half of eps"),
)


def differences(results: dict[str, Any], arm: str, other: str, measure: str) -> list[float]:
    """By how many points an arm lies above another in `measure`, for each seed that both have."""
    values = {
        name: {run["seed"]: run[measure] for run in results["runs"] if run["arm"] == name} for name in (arm, other)
    }
    return [values[arm][seed] - values[other][seed] for seed in sorted(values[arm].keys() & values[other].keys())]


def in_words(values: list[float]) -> str:
    """Mean difference with its range; "no clear difference" where the seeds disagree on the sign."""
    if not values:
        return NOT_MEASURED
    text = f"{mean(values):+.1f}"
    if len(values) == 1:
        return f"{text} (one seed)"
    text += f" ({min(values):+.1f} to {max(values):+.1f})"
    return text if min(values) > 0 or max(values) < 0 else f"{text}, no clear difference"


def compared(results: dict[str, Any], arm: str, other: str) -> str:
    """Accuracies of an arm against another's."""
    parts = [f"{title} {in_words(differences(results, arm, other, key))}" for key, title in MEASURES.items()]
    return ", ".join(parts)


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


def leads_of_curves(results: dict[str, Any], arm: str, other: str) -> list[float]:
    """`lead_of_curve` of an arm's dial over another's, for each seed where they share attack and a range of RA."""
    own, theirs = ({run["seed"]: run for run in results["runs"] if run["arm"] == name} for name in (arm, other))
    leads = [
        lead_of_curve(own[seed]["sweep"], theirs[seed]["sweep"])
        for seed in sorted(own.keys() & theirs.keys())
        if own[seed]["swept_with"] == theirs[seed]["swept_with"]
    ]
    return [lead for lead in leads if lead is not None]


def in_short(results: dict[str, Any], arm: str, other: str | None) -> str:
    """Mean differences of an arm to another, or of a dual model to its F_R, and how many seeds they are of."""
    values = gains(results, arm) if other is None else [differences(results, arm, other, key) for key in MEASURES]
    if not values[0]:
        return NOT_MEASURED
    count = "1 seed" if len(values[0]) == 1 else f"{len(values[0])} seeds"
    changes = (f"{title} {mean(found):+.1f}" for title, found in zip(MEASURES.values(), values, strict=True))
    return f"{', '.join(changes)} ({count}){mark_of(results, arm, other)}"


def mark_of(results: dict[str, Any], *arms: str | None) -> str:
    """The mark of the first of these arms that has one, else ""."""
    return next((results["arms"][arm]["mark"] for arm in arms if "mark" in results["arms"].get(arm, {})), "")


def gains(results: dict[str, Any], arm: str) -> list[list[float]]:
    """By how many points a dual model lies above its own F_R: for each of MEASURES, and for each seed."""
    runs = [run for run in results["runs"] if run["arm"] == arm]
    return [[run[key] - run["robust"][key] for run in runs] for key in MEASURES]


def verdict(met: list[bool], on_average: bool) -> str:
    """Whether an aim was reached in the mean, and by how many of the seeds."""
    answer = "**no**" if not on_average else "in the mean only" if 2 * sum(met) < len(met) else "yes"
    return f"{answer} ({sum(met)} of {len(met)} seeds)"


def targets(results: dict[str, Any]) -> list[list[str]]:
    """What was aimed at, what came out, and whether that is enough; one row for each aim, measured or not."""
    rows = []
    for name, title in MIXTURES.items():
        sa, ra = (differences(results, name, "single", key) for key in MEASURES)
        aim = f"{title} against one network: RA and SA at least equal"
        if sa:
            met = [change >= 0 <= other for change, other in zip(ra, sa, strict=True)]
            found = f"RA {in_words(ra)}; SA {in_words(sa)}"
            rows.append([aim, found, verdict(met, mean(ra) >= 0 <= mean(sa))])
        else:
            rows.append([aim, NOT_MEASURED, "-"])
    for name, title in DUALS.items():
        if name not in results["study"]["arms"]:
            continue
        gain, loss = gains(results, name)
        aim = f"{title} at its alpha against its F_R: SA +3 for at most 1.5 RA"
        if gain:
            met = [more >= 3 and less >= -1.5 for more, less in zip(gain, loss, strict=True)]
            found = f"SA {in_words(gain)}; RA {in_words(loss)}"
            rows.append([aim, found, verdict(met, mean(gain) >= 3 and mean(loss) >= -1.5)])
        else:
            rows.append([aim, NOT_MEASURED, "-"])
    loads = [min(run["expert_load"]) for run in results["runs"] if run["arm"] == "rt_er"]
    found = f"least {min(loads):.0f} %" if loads else NOT_MEASURED
    answer = verdict([load >= 5 for load in loads], min(loads) >= 5) if loads else "-"
    return [*rows, ["No expert of the RT-ER mixture with less than 5 % of the load", found, answer]]


def targets_of_curves(results: dict[str, Any]) -> list[list[str]]:
    """Rows as those of `targets`, on held-out images: whose dial lies above whose."""
    rows, arms = [], {run["arm"] for run in results["runs"]}
    for joint, apart, title in CURVES:
        if not {joint, apart} <= set(results["study"]["arms"]):
            continue
        if leads := leads_of_curves(results, joint, apart):
            found = f"on held-out images, without the union: SA at equal RA {in_words(leads)}"
            rows.append([title, found, verdict([lead > 0 for lead in leads], mean(leads) > 0)])
        else:
            rows.append([title, "no common range of RA" if {joint, apart} <= arms else NOT_MEASURED, "-"])
    return rows


def findings(results: dict[str, Any]) -> list[str]:
    """Differences that say what works, in points, mean and range over the seeds."""
    arms, lines = results["arms"], []
    for arm, other, title in PAIRS:
        if arm in arms and other in arms:
            passes = [arms[name]["passes"] for name in (arm, other)]
            unequal = max(passes) > 1.05 * min(passes)
            budget = f" ({passes[0]:.0f} against {passes[1]:.0f} passes)" if unequal else ""
            lines.append(f"- {title}{budget}: {compared(results, arm, other)}{mark_of(results, arm, other)}.")
    return lines
