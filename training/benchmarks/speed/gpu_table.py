"""What gpu.py has measured, in tables beside the first measurement, which was made before there was a step graph."""

from typing import Any

from training.benchmarks.shared.recipes import parse_recipe
from training.benchmarks.shared.render import markdown_table
from training.benchmarks.shared.store import RESULTS, read_json
from training.benchmarks.speed.gpu_sizes import CASES
from training.benchmarks.speed.gpu_steps import TOLERANCE

IMAGES = 50_000  # of an epoch

Units = dict[str, dict[str, Any]]


def read_measurements() -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The first measurement, and the newest: None where there is none.

    Raises:
        ValueError: The newest is a rehearsal's.
    """
    newest = RESULTS / "speed_gpu.json"
    now = read_json(newest) if newest.is_file() else None
    if now and now["rehearsal"]:
        raise ValueError(f"{newest} is a rehearsal on a CPU; its numbers are not rendered.")
    return read_json(RESULTS / "speed_gpu_before.json"), now


def render(before: dict[str, Any], now: dict[str, Any] | None) -> str:
    """The whole section; arguments as `read_measurements` returns them."""
    first, units = before["units"], now["units"] if now else {}
    place = f"Now: {where(now)}." if now else "Nothing has been measured with the step graph yet."
    blocks = [f"Before: {where(before)}; {before['source']}. {place}"]
    blocks += [f"**Not measured now**: {name}: {why}." for name, why in (now["notes"] if now else {}).items()]
    blocks += [
        "A training step. The bare graph is the step's own passes, and nothing else, as one CUDA graph; the share is "
        "its time over that of the step with the step graph. Busy: share of the time in which the GPU works.",
        markdown_table(STEP_HEADER, [step_row(name, first, units) for name in CASES]),
        "A forward and input-gradient pass of one ResNet18, BatchNorm folded, bf16, in ms (before / now):",
        markdown_table(PASS_HEADER, [pass_row(batch, first, units) for batch in (128, 512, 1024)]),
    ]
    if now:
        limits = ", ".join(f"{name} {limit:g}" for name, limit in TOLERANCE.items())
        blocks += [
            "Twenty float32 steps with the step graph against twenty eager ones, relative distances; allowed: "
            f"{limits}, or three times the distance of two eager runs:",
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


def number(found: dict[str, Any] | None, name: str, form: str = ".1f", scale: float = 1.0) -> str:
    """A value as text; "-" where it is missing."""
    return f"{scale * found[name]:{form}}" if found and name in found else "-"


def pair(units: tuple[dict[str, Any] | None, dict[str, Any] | None], name: str, form: str = ".1f", scale: float = 1.0):
    """A value before and now, in one cell."""
    return " / ".join(number(found, name, form, scale) for found in units)


STEP_HEADER = ["step", "batch", "ms before", "ms eager now", "ms with the graph", "aim", "bare graph ms"]
STEP_HEADER += ["share of the bare graph", "GPU busy %, before / now", "waits per step", "s per epoch", "GiB"]


def step_row(name: str, first: Units, units: Units) -> list[str]:
    """One training step: before, eager now, with the graph, and the bare graph."""
    case, before = CASES[name], first.get(f"eager {name}")
    eager, graph, bare = (units.get(f"{kind} {name}") for kind in ("eager", "graph", "bare step"))
    both = before, graph
    return [
        case.title,
        str(case.batch),
        number(before, "ms"),
        number(eager, "ms"),
        number(graph, "ms"),
        "-" if case.target_ms is None else f"<= {case.target_ms:g}",
        number(bare, "bare_graph_ms"),
        f"{100 * bare['bare_graph_ms'] / graph['ms']:.0f} %" if graph and bare else "-",
        pair(both, "busy", ".0f", 100),
        pair(both, "waits", ".0f"),
        pair(both, "ms", ".1f", IMAGES / case.batch / 1e3),
        f"{number(before, 'allocated_gib')} / {number(graph, 'reserved_gib')}",
    ]


PASS_HEADER = ["batch", "eager", "eager, our PGD's pass", "CUDA graph", "compiled + CUDA graph"]


def pass_row(batch: int, first: Units, units: Units) -> list[str]:
    """A bare pass at one batch size."""
    both = first.get(f"bare {batch}"), units.get(f"bare {batch}")
    cells = [str(batch), *(pair(both, name, ".2f") for name in ("eager_ms", "ours_ms", "graph_ms"))]
    compiled = first.get("compiled"), units.get("compiled")
    return [*cells, pair(compiled, "compiled_graph_ms", ".2f") if batch == 512 else "-"]  # the one that is compiled


def equal_table(units: Units) -> str:
    """Distances between graphed and eager steps."""
    rows = [
        [
            name.removeprefix("equal "),
            *(number(unit, key, ".1e") for key in TOLERANCE),
            "yes" if unit["holds"] else "**NO**",
        ]
        for name, unit in units.items()
        if name.startswith("equal ")
    ]
    return markdown_table(["method, attack", *TOLERANCE, "equal"], rows)


def attack_table(units: Units) -> str:
    """Images per second of the attacks."""
    titles = {
        "autoattack": 'AutoAttack, "fast" budgets, one ResNet18',
        "worst_case": "adaptive union, 10 steps, dual model of cifar10_resnet18",
    }
    columns = ("images_per_s", "forward", "gradient", "stand")
    rows = [[title, *(number(units.get(name), key) for key in columns)] for name, title in titles.items()]
    return markdown_table(["attack", "images/s", "forward passes per image", "gradient passes", "stand %"], rows)


def step_time(recipe: str) -> str:
    """What is known of a recipe's time: a step as gpu.py has measured it, with the step graph where it has."""
    advice = "run with --estimate_time"
    batch = parse_recipe(recipe)[2].per_device_train_batch_size
    same = [n for n, case in CASES.items() if (case.recipe, case.batch, case.settings) == (recipe, batch, {})]
    before, now = read_measurements()
    for results, kind, how in ((now, "graph", "with"), (before, "eager", "without")):
        if results and same and (found := results["units"].get(f"{kind} {same[0]}")):
            step = f"{found['ms']:.0f} ms per step of {batch} images {how} the step graph"
            hardware = results["environment"]["hardware"]
            return f"{step}, measured on one {hardware}; for the whole run and your hardware: {advice}."
    return f"not measured; {advice}."
