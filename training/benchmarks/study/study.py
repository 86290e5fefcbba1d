"""Compare training methods at equal compute, over seeds, judged by the adaptive union.

python training/benchmarks/study/study.py --study digits
python training/benchmarks/study/study.py --study cifar10_full --dataset_name path/to/cifar10 --jobs 2
python training/benchmarks/study/study.py --study digits --arms single rt_er --seeds 0 1
python training/benchmarks/study/study.py --study digits --render  # keep the results, render the page

A study is a YAML file: settings of `training/run.py` that all arms share, the arms with what they change, the seeds,
and a budget. The budget counts forward+backward passes of one plain backbone per training image, those of the attack
included; an arm whose steps need more arithmetic gets fewer of them. An arm may change `settings`, have a budget of
its own (`passes`), an `evaluation` of its own (such as union_restarts), or start from the
model of another arm (`init_from`), one network or a mixture of the same shape, whose passes then count as its own. An
arm may join the trained models of two others (`standard` and `robust`): it mixes their probabilities, or `mixing:
logits`, or `mixing: weights` into one network, or with `calibrate: true` probabilities behind a logit map of F_R that
is chosen on held-out images (MixedNUTS). Arms marked `extra` run only where `--arms` names them.
Each run is a process of its own with a log. A run whose run.json is there is not repeated, and one that was stopped
goes on from its checkpoint. `results.json` has all runs and their mean and range per arm; it is written after each
run.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))  # the checkout: scripts run from any folder

from hf_dualmoe.evaluation.environment import write_text
from training.benchmarks.shared.run import create_parser, require_positive
from training.benchmarks.shared.store import RESULTS, read_json, write_json
from training.benchmarks.study.definition import STUDIES, Run, definition, plan, read_study, usual_arms
from training.benchmarks.study.summary import render_arms, summarise

POLL = 0.5  # seconds between two looks at a running process


class Study:
    """Runs what is missing, several processes at a time, and keeps the results up to date."""

    def __init__(self, study: dict[str, Any], runs: list[Run], output_dir: Path, jobs: int, threads: int):
        self.study, self.runs, self.output_dir, self.jobs, self.threads = study, runs, output_dir, jobs, threads
        self.failed: dict[str, str] = {}
        self.writing = Lock()

    def folder(self, name: str) -> Path:
        return self.output_dir / "runs" / name

    def result(self, name: str) -> dict[str, Any] | None:
        """What a run has written; None before it has ended."""
        path = self.folder(name) / "run.json"
        return read_json(path) if path.is_file() else None

    def work(self) -> None:
        """Run everything; a run that fails costs no other.

        Raises:
            ValueError: The folder has runs of an arm that the study now defines in another way.
        """
        settled = self.output_dir / "study.json"
        if settled.is_file():
            before, begun = read_json(settled), self.output_dir.glob("runs/*-seed*")
            arms = {folder.name.rpartition("-seed")[0] for folder in begun} & set(self.study["arms"])
            anew = before.get("bf16") != self.study.get("bf16")
            if other := sorted(arm for arm in arms if anew or definition(self.study, arm) != definition(before, arm)):
                raise ValueError(
                    f"output_dir={str(self.output_dir)!r} holds another study: runs of {', '.join(other)} with other "
                    "settings; choose another --output_dir, or remove these runs."
                )
        write_json(settled, self.study)
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(self.one, self.runs))

    def one(self, run: Run) -> None:
        """One run, unless its result is there; waits for the runs whose models it needs."""
        while any(self.result(part) is None and part not in self.failed for part in run.parts):
            time.sleep(POLL)
        if any(part in self.failed for part in run.parts):
            self.failed[run.name] = "a model that it needs is missing"
        elif self.result(run.name) is None:
            self.attempt(run)
        self.write()

    def attempt(self, run: Run) -> None:
        """Start a run; what goes wrong is noted, since another run may be waiting for this one."""
        folder, started = self.folder(run.name), time.perf_counter()
        script, study = Path(__file__).with_name("run.py"), self.output_dir / "study.json"
        command = [sys.executable, str(script), str(study), run.arm, str(run.seed), str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "log.txt", "a", encoding="utf-8") as log:
                code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
        except OSError as error:
            self.failed[run.name] = str(error)
            return
        if code:
            self.failed[run.name] = f"exit status {code}; see {folder / 'log.txt'}"
        print(f"{run.name}: {'FAILED' if code else 'done'} after {time.perf_counter() - started:.0f} s", flush=True)

    def write(self) -> None:
        """Bring results.json and table.txt up to date."""
        with self.writing:
            results = [self.result(path.parent.name) for path in sorted(self.output_dir.glob("runs/*/run.json"))]
            summary = summarise(results, self.study)
            content = {"study": self.study, "arms": summary, "runs": results, "failed": self.failed}
            write_json(self.output_dir / "results.json", content)
            write_text(self.output_dir / "table.txt", render_arms(summary) + "\n")


def keep(name: str, results: dict[str, Any], dataset_name: str, output_dir: Path) -> None:
    """Keep the results of a study in the repository, without places on this machine, and render the page."""
    from training.benchmarks.results_page import render_page  # here, since it imports what the whole page needs

    study = {**results["study"], "dataset_name": dataset_name}
    study.pop("bf16", None)  # each run tells its own
    failed = {run: why.replace(str(output_dir), "OUTPUT_DIR") for run, why in results["failed"].items()}
    path = RESULTS / f"study_{name}.json"
    runs = with_kept(results["runs"], study, read_json(path)) if path.is_file() else results["runs"]
    write_json(path, {"study": study, "arms": summarise(runs, study), "runs": runs, "failed": failed})
    render_page()


def with_kept(runs: list[dict[str, Any]], study: dict[str, Any], kept: dict[str, Any]) -> list[dict[str, Any]]:
    """These runs, and those kept before of other arms or seeds, as far as the study still defines them alike."""
    made = {(run["arm"], run["seed"]): run for run in runs}
    old = {
        (run["arm"], run["seed"]): run
        for run in kept["runs"]
        if definition(study, run["arm"]) == definition(kept["study"], run["arm"])
    }
    return [run for _, run in sorted((old | made).items())]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = create_parser(__doc__)
    add = parser.add_argument
    add("--study", default="digits", help="a study by name (studies/*.yaml) or a YAML file")
    add("--dataset_name", help="instead of the study's, such as a local folder of the same dataset")
    add("--arms", nargs="+", help="default: all of the study that are not extra")
    add("--seeds", nargs="+", type=int, help="default: those of the study")
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--threads", type=int, help="CPU threads per run; default: the cores shared out")
    add(
        "--bf16",
        action="store_true",
        help="train under bfloat16 autocast; each run tells it",
    )
    add("--render", action="store_true", help="run nothing: keep the results there are, if any, and render the page")
    add("--output_dir", type=Path, help="default: outputs/study-<name>")
    args = parser.parse_args(arguments)
    require_positive(parser, args, "jobs", "threads")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    path = Path(args.study) if args.study.endswith(".yaml") else STUDIES / f"{args.study}.yaml"
    output_dir = args.output_dir or Path("outputs") / f"study-{path.stem}"
    try:
        study = read_study(path)
        own_name, study["dataset_name"] = study["dataset_name"], args.dataset_name or study["dataset_name"]
        study |= {"bf16": True} if args.bf16 else {}
        runs = plan(study, args.arms or usual_arms(study), args.seeds or study["seeds"])
        if args.render:
            made, kept = output_dir / "results.json", RESULTS / f"study_{path.stem}.json"
            keep(path.stem, read_json(made if made.is_file() else kept), own_name, output_dir)
            return 0
        threads = args.threads or max(1, (os.cpu_count() or 1) // args.jobs)
        work = Study(study, runs, output_dir, args.jobs, threads)
        work.work()
    except (ValueError, FileNotFoundError) as error:
        print(f"study.py: error: {error}", file=sys.stderr)
        return 2
    print((output_dir / "table.txt").read_text(encoding="utf-8"))
    for name, reason in work.failed.items():
        print(f"FAILED: {name}: {reason}")
    return 1 if work.failed else 0


if __name__ == "__main__":
    sys.exit(main())
