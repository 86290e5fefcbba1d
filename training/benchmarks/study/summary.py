"""What the runs of a study say together: mean and range per arm, and the table of arms."""

from statistics import mean
from typing import Any

from training.benchmarks.shared.render import markdown_table
from training.benchmarks.study.definition import settings_of

Runs = list[dict[str, Any]]
Summary = dict[str, dict[str, Any]]

EARLIER = "†"  # behind numbers of hard-routed mixtures that an earlier adaptive union made
EARLIER_NOTE = (
    f"{EARLIER} Routes an image to one expert, and was measured with an earlier adaptive union, which did not go "
    "through every expert: RA may be too high."
)


def spread(values: list[float]) -> dict[str, float]:
    """Mean and range."""
    return {"mean": mean(values), "min": min(values), "max": max(values)}


def summarise(results: Runs, study: dict[str, Any]) -> Summary:
    """Mean and range over the seeds, per arm, of accuracies in %, cost and load."""
    summary: Summary = {}
    plain = next((run["flops"] for run in results if run["arm"] == "single"), None)
    for arm in study["arms"]:
        own = [run for run in results if run["arm"] == arm]
        if not own:
            continue
        entry = {"about": study["arms"][arm].get("about", ""), "seeds": [run["seed"] for run in own]}
        if routes_hard(study, arm) and any("union" not in run for run in own):
            entry["mark"] = EARLIER
        entry |= {name: spread([run[name] for run in own]) for name in ("sa", "ra", "ra_pgd")}
        entry |= {name: own[0][name] for name in ("parameters", "flops")}
        entry |= {name: own[0]["training"][name] for name in ("steps", "passes")}
        if plain:
            entry["relative_flops"] = own[0]["flops"] / plain
        if own[0].get("expert_load") and len(own[0]["expert_load"]) > 1:
            entry["least_load"] = min(min(run["expert_load"]) for run in own)
        if "robust" in own[0]:
            entry |= dial_of(own)
        summary[arm] = entry
    return summary


def routes_hard(study: dict[str, Any], arm: str) -> bool:
    """Whether the model of an arm, or its F_R, sends each image to one of several experts."""
    if "robust" in study["arms"][arm]:
        return routes_hard(study, study["arms"][arm]["robust"])
    settings = settings_of(study, arm)
    return settings.get("num_experts", 4) > 1 and settings.get("router_top_k", 1) == 1


def dial_of(runs: Runs) -> dict[str, Any]:
    """What a dual model has besides: its F_R, its alphas, what they gain, and the dial."""
    return {
        "robust": {name: spread([run["robust"][name] for run in runs]) for name in ("sa", "ra")},
        "alpha": [run["alpha"] for run in runs],
        "gain_sa": spread([run["sa"] - run["robust"]["sa"] for run in runs]),
        "loss_ra": spread([run["robust"]["ra"] - run["ra"] for run in runs]),
        "sweep": mean_sweep([run["sweep"] for run in runs]),
    }


def mean_sweep(sweeps: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """The dial averaged over seeds, at the positions that all of them measured."""
    points = [{point["alpha"]: point for point in sweep} for sweep in sweeps]
    common = [alpha for alpha in points[0] if all(alpha in other for other in points)]
    return [{"alpha": a, **{name: mean(p[a][name] for p in points) for name in ("sa", "ra")}} for a in common]


# --- the table -------------------------------------------------------------------------------------------------------

HEADER = ["arm", "seeds", "param.", "FLOPs", "passes", "SA %", "RA % (union)", "PGD %", "least load %", "alpha"]


def table_rows(summary: Summary) -> list[list[str]]:
    """Two rows for a dual model, one for any other arm: mean over the seeds and, in brackets, the range."""
    rows = []

    def cell(values: dict[str, float]) -> str:
        text = f"{values['mean']:.1f}"
        return text if values["min"] == values["max"] else f"{text} ({values['min']:.1f} to {values['max']:.1f})"

    for arm, entry in summary.items():
        cost = f"{entry['relative_flops']:.2f}x" if "relative_flops" in entry else "-"
        size, passes, mark = f"{entry['parameters'] / 1e3:.0f}k", f"{entry['passes']:.0f}", entry.get("mark", "")
        load = f"{entry['least_load']:.0f}" if "least_load" in entry else "-"
        alphas = ", ".join(f"{alpha:g}" for alpha in entry.get("alpha", [])) or "-"
        accuracy = [cell(entry["sa"]), cell(entry["ra"]) + mark, f"{entry['ra_pgd']['mean']:.1f}"]
        costs = [", ".join(map(str, entry["seeds"])), size, cost, passes]
        rows.append([arm, *costs, *accuracy, load, alphas])
        if robust := entry.get("robust"):
            accuracy = [cell(robust["sa"]), cell(robust["ra"]) + mark]
            rows.append([f"F_R of {arm}", "", "", "", "", *accuracy, "", "", ""])
    return rows


def render_arms(summary: Summary) -> str:
    """The table in Markdown, with what has to stand below it."""
    table = markdown_table(HEADER, table_rows(summary))
    return f"{table}\n\n{EARLIER_NOTE}" if EARLIER in table else table
