"""Compare training methods at equal compute, over seeds, judged by the adaptive union.

python training/benchmarks/study/study.py --study digits
python training/benchmarks/study/study.py --study cifar10 --dataset_name path/to/cifar10 --jobs 2
python training/benchmarks/study/study.py --study cifar10 --arms single rt_er --seeds 0 1
python training/benchmarks/study/study.py --study cifar10 --scale 10 --jobs 4  # ten times the images, on a GPU
python training/benchmarks/study/study.py --study cifar10 --confirm  # judge again, on images not used so far
python training/benchmarks/study/study.py --study digits --render    # keep the results, table into the README

A study is a YAML file: settings of `training/run.py` that all arms share, the arms with what they change, the seeds,
and a budget. The budget counts forward+backward passes of one plain backbone per training image, those of the attack
included; an arm whose steps need more arithmetic gets fewer of them. An arm may change `settings`, have a budget of
its own (`passes`), a `lever` of levers.py, an `evaluation` of its own (such as union_restarts), or start from the
model of another arm (`init_from`), one network or a mixture of the same shape, whose passes then count as its own. An
arm may join the trained models of two others (`standard` and `robust`): it mixes their probabilities, or `mixing:
logits`, or `mixing: weights` into one network, or with `calibrate: true` probabilities behind a logit map of F_R that
is chosen on held-out images (MixedNUTS). Arms marked `extra` run only where `--arms` names them.
Each run is a process of its own with a log. A run whose run.json is there is not repeated, and one that was stopped
goes on from its checkpoint. `results.json` has all runs and their mean and range per arm; it is written after each
run.

Who changes arms after a look at the results fits them to the test images. `--confirm` judges the models of finished
runs once more, at the alphas chosen before, on test images that no seed has drawn.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[3]))  # the checkout: scripts run from any folder

from hf_dualmoe.evaluation.environment import write_text
from hf_dualmoe.models.configuration_dualmoe import MIXINGS
from training.benchmarks.shared.tables import RESULTS, replace_section
from training.benchmarks.study.levers import lever_trainer
from training.benchmarks.study.summary import render_table, summarise, table

HERE = Path(__file__).parent
KEYS = {"dataset_name", "passes", "seeds", "settings", "evaluation", "arms"}
OPTIONAL_KEYS = {"reference", "most"}  # an arm that the tables show the differences to; limits that --scale keeps to
LIMITS = ("max_train_samples", "max_validation_samples", "max_test_samples")
PARTS = ("standard", "robust", "init_from")  # of an arm: other arms whose trained models it needs
REFERENCES = ("same_steps_as", "match_parameters", *PARTS)
NOTES = {"about", "extra"}  # keys of an arm that its result does not depend on
JOINING = {"standard", "robust", "mixing", "calibrate"}  # keys of an arm that joins two models
ARM_KEYS = {*NOTES, *JOINING, "settings", "passes", "lever", "lever_args", "evaluation", *REFERENCES}
SHAPE = ("backbone", "stem", "width", "num_experts", "shared_stages", "router")  # settings that weights depend on
POLL = 0.5  # seconds between two looks at a running process


@dataclass(frozen=True)
class Run:
    """One arm with one seed; `parts` are runs whose models it joins or starts from."""

    arm: str
    seed: int
    parts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"


def read_study(path: Path) -> dict[str, Any]:
    """Read and check a study.

    Raises:
        ValueError: The file does not exist, a key is unknown or missing, or an arm refers to one that is not there.
    """
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (HERE / "studies").glob("*.yaml")))
        raise ValueError(f"study={str(path)!r} is neither a file nor one of {known}.")
    study = yaml.safe_load(path.read_text(encoding="utf-8"))
    if wrong := sorted((set(study) - OPTIONAL_KEYS) ^ KEYS):
        raise ValueError(f"study {path.name}: unknown or missing keys {', '.join(wrong)}.")
    if study.get("reference", next(iter(study["arms"]))) not in study["arms"]:
        raise ValueError(f"study {path.name}: reference={study['reference']!r} is not an arm.")
    for name in study["arms"]:
        try:
            check_arm(study, name)
        except ValueError as error:
            raise ValueError(f"study {path.name}, arm {name}: {error}") from error
    return study


def check_arm(study: dict[str, Any], name: str) -> None:
    """Refuse an arm that cannot be trained, before anything is.

    Raises:
        ValueError: A key is unknown or does not go with another, or an arm that is referred to is missing or unfit.
    """
    arm = study["arms"][name]
    if unknown := sorted(set(arm) - ARM_KEYS):
        raise ValueError(f"unknown keys {', '.join(unknown)}.")
    for key in REFERENCES:
        if key in arm and arm[key] not in study["arms"]:
            raise ValueError(f"{key}={arm[key]!r} is not an arm.")
    if ("standard" in arm) != ("robust" in arm):
        raise ValueError("standard and robust go together.")
    if "standard" in arm and (wrong := sorted(set(arm) - NOTES - JOINING - {"evaluation"})):
        raise ValueError(f"it joins trained models, so that {', '.join(wrong)} have no meaning.")
    check_joining(study, arm)
    if not isinstance(arm.get("extra", False), bool):
        raise ValueError(f"extra={arm['extra']!r} must be true or false.")
    if "lever_args" in arm and "lever" not in arm:
        raise ValueError("lever_args needs a lever.")
    if "lever" in arm:
        lever_trainer(arm["lever"], arm.get("lever_args"))
    check_no_circle(study["arms"], name)
    check_budget(study, name)


def check_joining(study: dict[str, Any], arm: dict[str, Any]) -> None:
    """Raise a ValueError unless `mixing` and `calibrate` fit an arm and the two models that it joins."""
    given, mixing = sorted({"mixing", "calibrate"} & set(arm)), arm.get("mixing", MIXINGS[0])
    if given and "standard" not in arm:
        raise ValueError(f"{', '.join(given)} given: only an arm that joins models (standard, robust) has them.")
    if mixing not in MIXINGS:
        raise ValueError(f"mixing={mixing!r} is not one of {', '.join(map(repr, MIXINGS))}.")
    if not isinstance(arm.get("calibrate", False), bool):
        raise ValueError(f"calibrate={arm['calibrate']!r} must be true or false.")
    if arm.get("calibrate") and mixing != "probs":
        raise ValueError(f"calibrate goes with mixing='probs', not {mixing!r}.")
    if mixing == "weights":
        settings = [{**study["settings"], **study["arms"][arm[part]].get("settings", {})} for part in PARTS[:2]]
        if wrong := [name for name in (*SHAPE, "router_top_k") if settings[0].get(name) != settings[1].get(name)]:
            raise ValueError(f"mixing='weights' needs two models of one shape; they differ in {', '.join(wrong)}.")


def check_no_circle(arms: dict[str, Any], name: str, above: tuple[str, ...] = ()) -> None:
    """Raise a ValueError if an arm refers to itself, at last."""
    if name in above:
        raise ValueError(f"{' -> '.join((*above, name))} is a circle.")
    for key in REFERENCES:
        if arms[name].get(key) in arms:
            check_no_circle(arms, arms[name][key], (*above, name))


def check_budget(study: dict[str, Any], name: str) -> None:
    """Raise a ValueError unless an arm has one budget, and its init_from is a fitting model that leaves some of it."""
    arm = study["arms"][name]
    if "same_steps_as" in arm and ("passes" in arm or "init_from" in arm):
        raise ValueError("same_steps_as sets the steps; it does not go with passes or init_from.")
    if not arm.get("passes", 1) > 0:
        raise ValueError(f"passes={arm['passes']!r} must be > 0.")
    if "init_from" not in arm:
        return
    source = arm["init_from"]
    entry = study["arms"][source]
    settings = {**study["settings"], **entry.get("settings", {})}
    own = {**study["settings"], **arm.get("settings", {})}
    fits = settings.get("num_experts") == 1 or all(own.get(name) == settings.get(name) for name in SHAPE)
    if "standard" in entry or settings.get("method") == "jtdmoe" or not fits:
        raise ValueError(f"init_from={source!r} must be one network (num_experts: 1), or a mixture of the same shape.")
    passes, before = (study["arms"][each].get("passes", study["passes"]) for each in (name, source))
    if not before < passes:
        raise ValueError(f"init_from={source!r} costs {before} of {passes} passes: give it fewer passes of its own.")
    if "same_steps_as" in entry:
        raise ValueError(f"init_from={source!r} must have a budget of its own, not same_steps_as.")


def plan(study: dict[str, Any], arms: list[str], seeds: list[int]) -> list[Run]:
    """The runs, seed by seed, so that a study that is stopped early has whole seeds.

    Raises:
        ValueError: An arm is unknown, or needs models of arms that are not asked for.
    """
    runs = []
    for seed in seeds:
        for name in arms:
            if name not in study["arms"]:
                raise ValueError(f"arms: {name!r} is not one of {', '.join(study['arms'])}.")
            parts = parts_of(study, name)
            if missing := sorted(set(parts) - set(arms)):
                raise ValueError(f"arms: {name!r} needs the models of {', '.join(missing)}: ask for them too.")
            runs.append(Run(name, seed, tuple(f"{part}-seed{seed}" for part in parts)))
    return sorted(runs, key=lambda run: (run.seed, depth(study, run.arm)))  # else a run could wait for one after it


def usual_arms(study: dict[str, Any]) -> list[str]:
    """The arms that run where none are named."""
    return [name for name, arm in study["arms"].items() if not arm.get("extra")]


def parts_of(study: dict[str, Any], arm: str) -> list[str]:
    """Arms whose trained models an arm needs."""
    return [study["arms"][arm][key] for key in PARTS if key in study["arms"][arm]]


def depth(study: dict[str, Any], arm: str) -> int:
    """How many arms must be trained one after the other before an arm can be."""
    return max((1 + depth(study, part) for part in parts_of(study, arm)), default=0)


def definition(study: dict[str, Any], arm: str) -> dict[str, Any] | None:
    """All that the result of an arm depends on, that of the arms it refers to included; None if it is not there."""
    if arm not in study["arms"]:
        return None
    entry = {key: value for key, value in study["arms"][arm].items() if key not in NOTES}
    shared = {key: study[key] for key in ("dataset_name", "passes", "settings", "evaluation")}
    return {**shared, "arm": entry, "others": [definition(study, entry[key]) for key in REFERENCES if key in entry]}


class Study:
    """Runs what is missing, several processes at a time, and keeps the results up to date."""

    def __init__(
        self,
        study: dict[str, Any],
        runs: list[Run],
        output_dir: Path,
        jobs: int,
        threads: int,
        confirm: bool = False,
    ):
        self.study, self.runs, self.output_dir, self.jobs, self.threads = study, runs, output_dir, jobs, threads
        self.confirm = confirm
        self.failed: dict[str, str] = {}
        self.writing = Lock()

    def folder(self, name: str) -> Path:
        return self.output_dir / "runs" / name

    def result(self, name: str) -> dict[str, Any] | None:
        """What a run has written, with its numbers on unused images as "confirmed"; None before it has ended."""
        path, confirmed = (self.folder(name) / file for file in ("run.json", "confirmed.json"))
        if not path.is_file():
            return None
        more = {"confirmed": json.loads(confirmed.read_text(encoding="utf-8"))} if confirmed.is_file() else {}
        return {**json.loads(path.read_text(encoding="utf-8")), **more}

    def work(self) -> None:
        """Run everything; a run that fails costs no other.

        Raises:
            ValueError: The folder has runs of an arm that the study now defines in another way.
        """
        settled = self.output_dir / "study.json"
        if settled.is_file():
            before, begun = json.loads(settled.read_text(encoding="utf-8")), self.output_dir.glob("runs/*-seed*")
            arms = {folder.name.rpartition("-seed")[0] for folder in begun} & set(self.study["arms"])
            if other := sorted(arm for arm in arms if definition(self.study, arm) != definition(before, arm)):
                raise ValueError(
                    f"output_dir={str(self.output_dir)!r} holds another study: runs of {', '.join(other)} with other "
                    "settings; choose another --output_dir, or remove these runs."
                )
        self.output_dir.mkdir(parents=True, exist_ok=True)
        write_text(settled, json.dumps(self.study, indent=2) + "\n")
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(self.confirm_one if self.confirm else self.one, self.runs))

    def confirm_one(self, run: Run) -> None:
        """Judge one finished run on unused images, unless that has been done."""
        result = self.result(run.name)
        if result is None:
            self.failed[run.name] = "it has not been run, so that there is nothing to confirm"
        elif "confirmed" not in result:
            self.attempt(run, "confirm")
        self.write()

    def one(self, run: Run) -> None:
        """One run, unless its result is there; waits for the runs whose models it needs."""
        while any(self.result(part) is None and part not in self.failed for part in run.parts):
            time.sleep(POLL)
        if any(part in self.failed for part in run.parts):
            self.failed[run.name] = "a model that it needs is missing"
        elif self.result(run.name) is None:
            self.attempt(run)
        self.write()

    def attempt(self, run: Run, *more: str) -> None:
        """`start` a run; what goes wrong is noted, since another run may be waiting for this one."""
        try:
            self.start(run, *more)
        except OSError as error:
            self.failed[run.name] = str(error)

    def start(self, run: Run, *more: str) -> None:
        folder, started = self.folder(run.name), time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(HERE / "run.py"), str(self.output_dir / "study.json")]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            code = subprocess.run(
                [*command, run.arm, str(run.seed), str(folder), *more], stdout=log, stderr=log, env=environment
            ).returncode
        if code:
            self.failed[run.name] = f"exit status {code}; see {folder / 'log.txt'}"
        print(f"{run.name}: {'FAILED' if code else 'done'} after {time.perf_counter() - started:.0f} s", flush=True)

    def write(self) -> None:
        """Bring results.json and table.txt up to date."""
        with self.writing:
            results = [self.result(path.parent.name) for path in sorted(self.output_dir.glob("runs/*/run.json"))]
            summary = summarise(results, self.study)
            content = {"study": self.study, "arms": summary, "runs": results, "failed": self.failed}
            write_text(self.output_dir / "results.json", json.dumps(content, indent=2) + "\n")
            write_text(self.output_dir / "table.txt", table(summary) + "\n")


def scaled(study: dict[str, Any], scale: float) -> dict[str, Any]:
    """The study with its numbers of images times `scale`, as far as the dataset has them (`most`)."""
    limits = {name: round(study["settings"][name] * scale) for name in LIMITS if study["settings"].get(name)}
    most = study.get("most", {})
    limits = {name: min(limit, most.get(name, limit)) for name, limit in limits.items()}
    return {**study, "settings": {**study["settings"], **limits}}


def keep(name: str, results: dict[str, Any]) -> None:
    """Keep the results of a study in the repository, and put the table into the README."""
    RESULTS.mkdir(exist_ok=True)
    write_text(RESULTS / f"study_{name}.json", json.dumps(results, indent=1) + "\n")
    replace_section(f"study_{name}", render_table(results))


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="digits", help="a study by name (studies/*.yaml) or a YAML file")
    parser.add_argument("--dataset_name", help="instead of the study's, such as a local folder of the same dataset")
    parser.add_argument("--arms", nargs="+", help="default: all of the study that are not extra")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the study")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the numbers of images")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, help="CPU threads per run; default: the cores shared out")
    parser.add_argument("--confirm", action="store_true", help="judge finished runs on test images not used so far")
    parser.add_argument(
        "--render", action="store_true", help="run nothing: keep the results there are, if any, and render"
    )
    parser.add_argument("--output_dir", type=Path, help="default: outputs/study-<name>")
    args = parser.parse_args(arguments)
    for name in ("jobs", "scale"):
        if not getattr(args, name) > 0:
            parser.error(f"{name}={getattr(args, name)!r} must be > 0.")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    path = Path(args.study) if args.study.endswith(".yaml") else HERE / "studies" / f"{args.study}.yaml"
    try:
        study = read_study(path)
        study["dataset_name"] = args.dataset_name or study["dataset_name"]
        study = scaled(study, args.scale)
        runs = plan(study, args.arms or usual_arms(study), args.seeds or study["seeds"])
        output_dir = args.output_dir or Path("outputs") / f"study-{path.stem}"
        if args.render:
            made, kept = output_dir / "results.json", RESULTS / f"study_{path.stem}.json"
            results = json.loads((made if made.is_file() else kept).read_text(encoding="utf-8"))
            keep(path.stem, {**results, "arms": summarise(results["runs"], results["study"])})
            return 0
        threads = args.threads or max(1, (os.cpu_count() or 1) // args.jobs)
        work = Study(study, runs, output_dir, args.jobs, threads, confirm=args.confirm)
        work.work()
    except (ValueError, FileNotFoundError) as error:
        print(f"study.py: error: {error}", file=sys.stderr)
        return 2
    print((work.output_dir / "table.txt").read_text(encoding="utf-8"))
    for name, reason in work.failed.items():
        print(f"FAILED: {name}: {reason}")
    return 1 if work.failed else 0


if __name__ == "__main__":
    sys.exit(main())
