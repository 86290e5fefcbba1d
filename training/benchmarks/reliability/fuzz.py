"""Nonsense for the public interface: each case must work on a tiny model or be refused with a documented error.

python training/benchmarks/reliability/fuzz.py --cases 1000

Settings, call arguments, config files, weight files and images are drawn by hypothesis, from sensible values and from
wrong types and extreme numbers. Outcomes of a case:

- works
- refused: a documented error that names an argument of the case (or, for files: a documented error)
- fault: any other error, more than `DEADLINE` seconds, or a file written, a program started or a connection opened
  outside the folder of the case
"""

import contextlib
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import strategies as st
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[3]))  # the checkout: scripts run from any folder

from hf_dualmoe.evaluation.environment import describe_environment
from training.benchmarks.reliability.fuzz_cases import TARGETS, Target
from training.benchmarks.shared.run import Clock, OutOfTime, create_parser
from training.benchmarks.shared.store import RESULTS, write_json

DEADLINE = 120  # seconds per case
CHUNK = 100  # cases per seed
OUTSIDE = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
CHANGES = ("os.mkdir", "os.remove", "os.rmdir", "os.rename", "shutil.rmtree")


class Watch:
    """Notes what happens outside a folder while one is set: files changed, programs started, connections."""

    def __init__(self):
        self.folder: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self.hook)  # stays for the life of the process

    def hook(self, event: str, args: tuple) -> None:
        """Called by Python at each audited event."""
        if self.folder is None:
            return
        writes = event == "open" and isinstance(args[0], (str, bytes)) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if event in OUTSIDE:
            self.seen.append(f"{event} {args[:2]}")
        elif writes or event in CHANGES:
            path = Path(os.fsdecode(args[0])).absolute()
            if path != Path(os.devnull) and self.folder not in (path, *path.parents):
                self.seen.append(f"{event} {path}")


@cache
def watch() -> Watch:
    """The one audit hook of this process."""
    return Watch()


@contextlib.contextmanager
def watched_folder() -> Iterator[Path]:
    """A temporary folder that is the current one, and the only one that the block may change."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.chdir(folder)
        watch().seen, watch().folder = [], Path(folder).absolute()
        try:
            yield Path(folder)
        finally:
            watch().folder = None
            os.chdir(before)


def run_case(target: Target, drawn: Any, seconds: int = DEADLINE) -> tuple[str, str]:
    """The outcome of a case (see above), and the error message."""
    with watched_folder() as folder:
        outcome = attempt(target, drawn, folder, seconds)
    seen = watch().seen
    return ("fault", f"outside its folder: {seen[0]}") if seen else outcome


def attempt(target: Target, drawn: Any, folder: Path, seconds: int) -> tuple[str, str]:
    """Run a case; the outcome but for what it did outside its folder."""
    try:
        with Clock(seconds).limit():
            target.run(drawn, folder)
    except target.errors as error:
        message = f"{type(error).__name__}: {error}"
        if not isinstance(drawn, dict) or any(name.removeprefix("robust_") in message for name in drawn):
            return "refused", message
        return "fault", f"names no argument: {message}"
    except OutOfTime:
        return "fault", f"more than {seconds} s"
    except Exception as error:
        return "fault", f"{type(error).__name__}: {error}"
    return "works", ""


def fuzz(cases: int, seed: int, targets: list[Target] = TARGETS) -> list[dict[str, str]]:
    """Draw and run cases; a record of each."""
    records = []
    weighted = [target for target in targets for _ in range(target.weight)]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.data())
    def draw(data: st.DataObject) -> None:
        target = data.draw(st.sampled_from(weighted))
        drawn = data.draw(target.drawn)
        outcome, message = run_case(target, drawn)
        record = {"target": target.name, "outcome": outcome, "drawn": shorten(drawn), "message": message[:400]}
        records.append(record)

    draw()
    return records


def shorten(drawn: Any) -> str:
    """What was drawn, as text of bounded length."""
    try:
        return repr(drawn)[:400]
    except ValueError:  # an integer too long to be printed
        return "..."


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of the outcomes, of all and by target, and the cases that should not be."""
    outcomes = Counter(record["outcome"] for record in records)
    by_target = {name: Counter() for name in sorted({record["target"] for record in records})}
    for record in records:
        by_target[record["target"]][record["outcome"]] += 1
    faults = [record for record in records if record["outcome"] == "fault"]
    return {"cases": len(records), "outcomes": outcomes, "by_target": by_target, "faults": faults}


def quiet() -> None:
    """No progress bars, messages or compiled files."""
    sys.dont_write_bytecode = True
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="number of cases")
    parser.add_argument("--seed", type=int, default=0, help=f"seed of the first {CHUNK} cases; the next have the next")
    parser.add_argument("--output", type=Path, default=RESULTS / "fuzz.json", help="JSON file to write")
    args = parser.parse_args()
    quiet()
    records, seeds, started = [], [], time.perf_counter()
    while len(records) < args.cases:
        seeds.append(args.seed + len(seeds))
        records += fuzz(min(CHUNK, args.cases - len(records)), seeds[-1])
        print(f"{len(records)} cases, {dict(summary(records)['outcomes'])}", flush=True)
    result = summary(records) | {"seconds": round(time.perf_counter() - started, 1), "seeds": seeds}
    packages = describe_environment("cpu") | {"hypothesis": version("hypothesis")}
    write_json(args.output, result | {"environment": packages})
    for record in result["faults"]:
        print(f"FAULT {record['target']}({record['drawn']}): {record['message']}")
    sys.exit(1 if result["faults"] else 0)


if __name__ == "__main__":
    main()
