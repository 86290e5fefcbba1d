"""What the runs of a study say together: mean and range per arm, and the tables of `study.py`."""

from statistics import mean
from typing import Any

from training.benchmarks.shared.tables import markdown_table


def spread(values: list[float]) -> dict[str, float]:
    """Mean and range."""
    return {"mean": mean(values), "min": min(values), "max": max(values)}


def summarise(results: list[dict[str, Any]], study: dict[str, Any]) -> dict[str, Any]:
    """Mean and range over the seeds, per arm, of accuracies in %, cost and load."""
    summary: dict[str, Any] = {}
    plain = next((r["flops"] for r in results if r["arm"] == "single"), None)
    for arm in study["arms"]:
        own = [result for result in results if result["arm"] == arm]
        if not own:
            continue
        entry = {"about": study["arms"][arm].get("about", ""), "seeds": [result["seed"] for result in own]}
        if mark := earlier_union(study, own, arm):
            entry["mark"] = mark
        entry |= {name: spread([result[name] for result in own]) for name in ("sa", "ra", "ra_pgd")}
        entry |= {name: own[0][name] for name in ("parameters", "flops")}
        entry |= {name: own[0]["training"][name] for name in ("steps", "passes")}
        if plain:
            entry["relative_flops"] = own[0]["flops"] / plain
        if own[0].get("expert_load") and len(own[0]["expert_load"]) > 1:
            entry["least_load"] = min(min(result["expert_load"]) for result in own)
        if "robust" in own[0]:
            entry["robust"] = {name: spread([result["robust"][name] for result in own]) for name in ("sa", "ra")}
            entry["alpha"] = [result["alpha"] for result in own]
            entry["gain_sa"] = spread([result["sa"] - result["robust"]["sa"] for result in own])
            entry["loss_ra"] = spread([result["robust"]["ra"] - result["ra"] for result in own])
            entry["sweep"] = mean_sweep([result["sweep"] for result in own])
        summary[arm] = entry
    if "reference" in study:
        compare(summary, results, study["reference"])
    return summary


EARLIER = "†"  # behind numbers of hard-routed mixtures that an earlier adaptive union made
EARLIER_NOTE = (
    f"{EARLIER} Routes an image to one expert, and was measured with an earlier adaptive union, which did not go "
    "through every expert: RA may be too high."
)


def routes_hard(study: dict[str, Any], arm: str) -> bool:
    """Whether the model of an arm, or its F_R, sends each image to one of several experts."""
    entry = study["arms"][arm]
    if "robust" in entry:
        return routes_hard(study, entry["robust"])
    settings = {**study["settings"], **entry.get("settings", {})}
    return settings.get("num_experts", 4) > 1 and settings.get("router_top_k", 1) == 1


def earlier_union(study: dict[str, Any], runs: list[dict[str, Any]], arm: str) -> str:
    """`EARLIER` where a run of a hard-routed arm was judged before the union went through every expert, else ""."""
    own = [run for run in runs if run["arm"] == arm]
    return EARLIER if routes_hard(study, arm) and any("union" not in run for run in own) else ""


def mean_sweep(sweeps: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """The dial averaged over seeds, at the positions that all of them measured."""
    points = [{point["alpha"]: point for point in sweep} for sweep in sweeps]
    common = [alpha for alpha in points[0] if all(alpha in other for other in points)]
    return [{"alpha": a, **{name: mean(p[a][name] for p in points) for name in ("sa", "ra")}} for a in common]


def compare(summary: dict[str, Any], results: list[dict[str, Any]], reference: str) -> None:
    """Add to each entry the differences in SA and RA to the reference with the same seed, over the seeds of both."""
    base = {result["seed"]: result for result in results if result["arm"] == reference}
    for arm, entry in summary.items():
        pairs = [
            (result, base[result["seed"]]) for result in results if result["arm"] == arm and result["seed"] in base
        ]
        if not pairs:
            continue
        entry["against"] = {name: spread([own[name] - other[name] for own, other in pairs]) for name in ("sa", "ra")}
        if "robust" in entry:
            entry["robust"]["against"] = {
                name: spread([own["robust"][name] - other[name] for own, other in pairs]) for name in ("sa", "ra")
            }


HEADER = ["arm", "seeds", "param.", "FLOPs", "passes", "SA %", "RA % (union)", "PGD %", "least load %"]
COMPARED = ["SA +-", "RA +-"]  # two columns more, in points, where the study has a reference


def header(summary: dict[str, Any]) -> list[str]:
    """The head of the table."""
    return HEADER + (COMPARED if is_compared(summary) else [])


def is_compared(summary: dict[str, Any]) -> bool:
    return any("against" in entry for entry in summary.values())


def table_rows(summary: dict[str, Any]) -> list[list[str]]:
    """Two rows for a dual model, one for any other arm: mean over the seeds and, in brackets, the range."""
    rows = []

    def cell(values: dict[str, float], ranged: bool = True) -> str:
        text = f"{values['mean']:.1f}"
        return f"{text} ({values['min']:.1f} to {values['max']:.1f})" if ranged else text

    def differences(entry: dict[str, Any]) -> list[str]:
        if not is_compared(summary):
            return []
        return [f"{entry['against'][name]['mean']:+.1f}" if "against" in entry else "-" for name in ("sa", "ra")]

    for arm, entry in summary.items():
        cost = [
            f"{entry['parameters'] / 1e3:.0f}k",
            f"{entry['relative_flops']:.2f}x" if "relative_flops" in entry else "-",
        ]
        mark = entry.get("mark", "")
        accuracy = [cell(entry["sa"]), cell(entry["ra"]) + mark, cell(entry["ra_pgd"], False)]
        load = f"{entry['least_load']:.0f}" if "least_load" in entry else "-"
        rows.append(
            [arm, str(len(entry["seeds"])), *cost, f"{entry['passes']:.0f}", *accuracy, load, *differences(entry)]
        )
        if "robust" in entry:
            robust = entry["robust"]
            rows.append([f"F_R of {arm}", "", "", "", "", cell(robust["sa"]), cell(robust["ra"]) + mark, "", ""])
            rows[-1] += differences(robust)
    return rows


def table(summary: dict[str, Any]) -> str:
    """The table for the terminal."""
    rows = [header(summary), *table_rows(summary)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def notes(summary: dict[str, Any]) -> list[str]:
    """What has to stand below a table of these arms, each with an empty line behind it."""
    return [EARLIER_NOTE, ""] if any("mark" in entry for entry in summary.values()) else []


def render_table(results: dict[str, Any]) -> str:
    """The table in Markdown, what each arm is, and the gain of the dial at the recommended alpha."""
    arms = results["arms"]
    lines = [markdown_table(header(arms), table_rows(arms)), "", *notes(arms)]
    lines += [f"- {name}: {arm['about']}." for name, arm in arms.items() if arm["about"]]
    for name, arm in arms.items():
        if "robust" in arm:
            gain, loss, alphas = arm["gain_sa"]["mean"], arm["loss_ra"]["mean"], ", ".join(map(str, arm["alpha"]))
            lines.append(f"- {name} at alpha {alphas}: SA {gain:+.1f}, RA {-loss:+.1f} points against its F_R.")
    return "\n".join(lines)
