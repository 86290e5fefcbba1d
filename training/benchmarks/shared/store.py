"""Where the benchmarks and their results are, and how results are read and written."""

import json
from pathlib import Path
from typing import Any

from hf_dualmoe.evaluation.environment import write_text

BENCHMARKS = Path(__file__).parents[1]
CHECKOUT = BENCHMARKS.parents[1]
TRAINING = BENCHMARKS.parent
RESULTS = BENCHMARKS / "results"


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one step, so that a crash never leaves half of it; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1, default=str) + "\n")


def begin(path: Path, same: dict[str, Any], fresh: bool = False) -> dict[str, Any]:
    """The results of earlier sessions in a file, or `same` where there are none.

    Raises:
        ValueError: They were made with other values of `same`, and `fresh` does not say to start over.
    """
    if not path.is_file() or fresh:
        return same
    results = read_json(path)
    if other := [name for name, value in json.loads(json.dumps(same)).items() if results.get(name) != value]:
        raise ValueError(f"{path} was made with other {', '.join(other)}; start over with --fresh, or elsewhere.")
    return results


def store_run(run: dict[str, Any], path: Path) -> None:
    """Write a run into a file of runs, in the place of one with the same settings.

    Args:
        run: Has `settings` and `rows`; rows of the earlier run stay where this one has none of that `attack`.
        path: The file.
    """
    runs = read_json(path)["runs"] if path.is_file() else []
    measured = {row["attack"] for row in run["rows"]}
    for earlier in [earlier for earlier in runs if earlier["settings"] == run["settings"]]:
        run = run | {"rows": [row for row in earlier["rows"] if row["attack"] not in measured] + run["rows"]}
        runs.remove(earlier)
    write_json(path, {"runs": [*runs, run]})
