"""The tables "On a GPU": what speed_gpu.py measured beside the first measurement, made before the step graph."""

from typing import Any

from training.benchmarks.shared.tables import markdown_table
from training.benchmarks.speed.gpu_cases import TOLERANCE
from training.benchmarks.speed.gpu_sizes import CASES

MISSING = "not measured"
IMAGES = 50_000  # of an epoch

Units = dict[str, dict[str, Any]]


def render_text(before: dict[str, Any], now: dict[str, Any] | None) -> str:
    """The whole section.

    Args:
        before: The first measurement.
        now: The newest results; None = there are none.
    """
    first, units = before["units"], {} if now is None else now["units"]
    place = "Nothing has been measured with the step graph yet." if now is None else f"Now: {where(now)}."
    blocks = [f"Before: {where(before)}; {before['source']}. {place}"]
    blocks += [f"**Not measured now**: {name}: {why}." for name, why in (now or {}).get("notes", {}).items()]
    blocks += [
        "A training step. The bare graph is the step's own passes, and nothing else, as one CUDA graph; the share is "
        "its time over that of the step with the step graph. Busy: share of the time in which the GPU works.",
        markdown_table(STEP_HEADER, [step_row(name, first, units) for name in CASES]),
        "A forward and input-gradient pass of one ResNet18, BatchNorm folded, bf16, in ms (before / now):",
        markdown_table(PASS_HEADER, [pass_row(batch, first, units) for batch in (128, 512, 1024)]),
        "Twenty float32 steps with the step graph against twenty eager ones, relative distances; allowed: "
        + ", ".join(f"{name} {limit:g}" for name, limit in TOLERANCE.items())
        + ", or three times the distance of two eager runs:",
        equal_table(units),
        "Attacks in float32 on images that withstand them, so that no work is saved:",
        attack_table(units),
    ]
    return "\n\n".join(blocks)


def where(results: dict[str, Any]) -> str:
    """Hardware and versions, in a line."""
    environment = results["environment"]
    versions = (f"{name} {environment['packages'][name]}" for name in ("torch", "timm", "transformers"))
    return f"{environment['hardware']}, {', '.join(versions)}"


def number(found: dict[str, Any] | None, name: str, form: str = "{:.1f}", scale: float = 1.0) -> str:
    """A value as text; "-" where it is missing."""
    return form.format(scale * found[name]) if found and name in found else "-"


def pair(before: str, now: str) -> str:
    """Two cells in one."""
    return f"{before} / {now}"


STEP_HEADER = ["step", "batch", "ms before", "ms eager now", "ms with the graph", "aim", "bare graph ms"]
STEP_HEADER += ["share of the bare graph", "GPU busy %, before / now", "waits per step", "s per epoch", "GiB"]


def step_row(name: str, first: Units, units: Units) -> list[str]:
    """One training step: before, eager now, with the graph, and the bare graph."""
    case, before = CASES[name], first.get(f"eager {name}")
    eager, graph, bare = (units.get(f"{kind} {name}") for kind in ("eager", "graph", "bare step"))
    share = f"{100 * bare['bare_graph_ms'] / graph['ms']:.0f} %" if graph and bare else "-"
    epochs = [number(found, "ms", "{:.1f}", IMAGES / case.batch / 1e3) for found in (before, graph)]
    return [
        case.title,
        str(case.batch),
        number(before, "ms"),
        number(eager, "ms"),
        number(graph, "ms") if graph else MISSING,
        "-" if case.target_ms is None else f"<= {case.target_ms:g}",
        number(bare, "bare_graph_ms"),
        share,
        pair(number(before, "busy", "{:.0f}", 100), number(graph, "busy", "{:.0f}", 100)),
        pair(number(before, "waits", "{:.0f}"), number(graph, "waits", "{:.0f}")),
        pair(*epochs),
        pair(number(before, "allocated_gib"), number(graph, "reserved_gib")),
    ]


PASS_HEADER = ["batch", "eager", "eager, our PGD's pass", "CUDA graph", "compiled + CUDA graph"]


def pass_row(batch: int, first: Units, units: Units) -> list[str]:
    """A bare pass at one batch size."""
    cells, name = [str(batch)], f"bare {batch}"
    for column in ("eager_ms", "ours_ms", "graph_ms"):
        cells.append(pair(*(number(found.get(name), column, "{:.2f}") for found in (first, units))))
    if batch != 512:  # the one that is compiled
        return [*cells, "-"]
    return [*cells, pair(*(number(found.get("compiled"), "compiled_graph_ms", "{:.2f}") for found in (first, units)))]


def equal_table(units: Units) -> str:
    """Distances between graphed and eager steps."""
    found = {name.removeprefix("equal "): unit for name, unit in units.items() if name.startswith("equal ")}
    if not found:
        return f"({MISSING})"
    rows = [
        [name, *(number(unit, key, "{:.1e}") for key in TOLERANCE), "yes" if unit["holds"] else "**NO**"]
        for name, unit in found.items()
    ]
    return markdown_table(["method, attack", *TOLERANCE, "equal"], rows)


def attack_table(units: Units) -> str:
    """Images per second of the attacks."""
    titles = {
        "autoattack": 'AutoAttack, "fast" budgets, one ResNet18',
        "worst_case": "adaptive union, 10 steps, dual model of cifar10_resnet18",
    }
    rows = [
        [title, *(number(units.get(name), key) for key in ("images_per_s", "forward", "gradient", "stand"))]
        for name, title in titles.items()
    ]
    return markdown_table(["attack", "images/s", "forward passes per image", "gradient passes", "stand %"], rows)
