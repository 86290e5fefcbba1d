"""The raw record of an evaluation: what became of each test image, from which every accuracy can be counted again.

    table = pyarrow.parquet.read_table("outcomes.parquet")
    recount(table)["ra_autoattack"]  # as in results.json

One row per image. `index` is its row in the split of the dataset that it was taken from, `label` its class. Every
other column says whether the image counts as right: classified rightly clean ("sa"), or rightly both clean and under
an attack. Its name is the place of the accuracy in results.json: "ra_pgd20", "components/robust/sa", "worst_case/whole
ce", "autoattack/apgd-t" (after this attack and those before it), "alpha_sweep/0.75/ra_pgd20". It is empty where an
image could not be evaluated, which counts as wrong. "broken_by" names the attack of AutoAttack that broke an image:
"clean" where it was wrong before, empty where it stands.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch import Tensor

from .store import Outcome

OUTCOMES_NAME = "outcomes.parquet"
BROKEN_BY = "broken_by"


class Outcomes:
    """The columns of a record, which grows with each measurement.

    Args:
        index: (N,) int64 rows of the images in the split that they were taken from.
        labels: (N,) int64.
    """

    def __init__(self, index: Tensor, labels: Tensor):
        self.columns = {"index": pa.array(index.tolist(), pa.int64()), "label": pa.array(labels.tolist(), pa.int32())}

    def add(self, name: str, outcome: Outcome) -> None:
        """Add which images count as right; empty where that is not known."""
        right, failed = outcome.right.tolist(), outcome.failed.tolist()
        values = [None if lost else good for good, lost in zip(right, failed, strict=True)]  # not known is not wrong
        self.columns[name] = pa.array(values, pa.bool_())

    def add_broken_by(self, broken_by: Tensor, attacks: Sequence[str]) -> None:
        """Add which of AutoAttack's `attacks` broke each image, by their numbers (N,); -1 = none."""
        numbers = broken_by.tolist()
        self.columns[BROKEN_BY] = pa.array([attacks[i] if i >= 0 else None for i in numbers], pa.string())
        for number, attack in enumerate(attacks):
            stands = [broken < 0 or broken > number for broken in numbers]
            self.columns[f"autoattack/{attack}"] = pa.array(stands, pa.bool_())

    def save(self, path: Path) -> None:
        """Write parquet, replacing the file in one step: a reader or a crash never meets half of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        pq.write_table(pa.table(self.columns), partial, compression="zstd")
        partial.replace(path)


def outcomes_path(results: str | os.PathLike) -> Path:
    """Path of a report's record: outcomes.parquet beside results.json, x-outcomes.parquet beside x.json."""
    results = Path(results)
    start = "" if results.stem == "results" else f"{results.stem}-"
    return results.with_name(start + OUTCOMES_NAME)


def check_record(path: Path) -> None:
    """Raise a ValueError unless the file is a record of an evaluation."""
    names = pq.read_schema(path).names  # a ValueError where it is no parquet
    if not {"index", "label"} <= set(names):
        raise ValueError(f"it has the columns {', '.join(names[:10])}; a record has index and label")


def recount(table: pa.Table) -> dict[str, float]:
    """Every accuracy of a record in %: name of the column -> share of the images that count as right."""
    names = [name for name in table.column_names if pa.types.is_boolean(table.schema.field(name).type)]
    return {name: 100 * (pc.sum(table[name]).as_py() or 0) / len(table) for name in names}


__all__ = ["OUTCOMES_NAME", "Outcomes", "check_record", "outcomes_path", "recount"]
