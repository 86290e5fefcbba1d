"""Kill a training run again and again, fill its disk, and compare what it ends with to an undisturbed run.

python training/benchmarks/reliability/survival.py                    # 20 kills, minutes on one CPU core
python training/benchmarks/reliability/survival.py --kills 3 --output survival.json

`run.py` trains a small dual model on digits by the digits recipe. It is started with the same arguments again after
each SIGKILL of its process group. The kills are aimed in turn at any time, at an evaluation and at a checkpoint of
which some files are written. In the end weights, moving average, optimizer,
scheduler, random numbers and log must be equal to the bit. Then the run meets a full disk (a small tmpfs; needs root)
and goes on once there is room. Each start is a fork of this process, so that the kills hit training and not imports.
`results/survival.json` has the figures.
"""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[3]))  # the checkout: scripts run from any folder

from hf_dualmoe.evaluation.environment import describe_environment
from hf_dualmoe.trainer.checkpoints import UNFINISHED, last_good_checkpoint, list_checkpoints
from training import run as training
from training.benchmarks.shared.recipes import as_options
from training.benchmarks.shared.run import create_parser, require_positive
from training.benchmarks.shared.store import RESULTS, read_json, write_json

EVERY = 4  # steps between checkpoints; an evaluation comes before each
SPARE = 3  # checkpoints more than kills
SETTINGS = {
    "max_train_samples": 160,
    "max_validation_samples": 40,
    "max_test_samples": 20,
    "per_device_train_batch_size": 32,
    "backbone": "resnet10t",
    "width": "8,8,8,16",
    "num_experts": 2,
    "router_top_k": 2,
    "shared_stages": 1,
    "eval_attack_steps": 3,
    "ema_decay": 0.9,
    "eval_steps": EVERY,
    "save_steps": EVERY,
    "save_total_limit": 2,
    "logging_steps": 1,
    "report": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
FILES = 9  # of a checkpoint, its manifest not counted: with that it is whole
AIMS = ("any", "evaluation", "any", "checkpoint")
TIMED = ("runtime", "per_second")  # parts of names of log entries that tell the time
TIMEOUT = 300.0  # seconds for one start


class Start:
    """One start of `run.py`, watched from outside: by what it prints and by the files that it writes."""

    def __init__(self, output_dir: Path, steps: int, printed: Path):
        self.output_dir, self.resumed_from = output_dir, last_step(output_dir)
        self.step, self.evaluating, self.text = self.resumed_from, False, ""
        options = as_options({"output_dir": output_dir, "max_steps": steps, **SETTINGS})
        folder = next((output_dir / UNFINISHED).glob("checkpoint-*"), None)
        self.leftover = folder.stat().st_mtime_ns if folder else None  # of the start that was killed before
        self.began = time.monotonic()
        self.process = multiprocessing.get_context("fork").Process(target=run, args=(options, printed))
        printed.write_text("", encoding="utf-8")
        self.printed = printed.open(encoding="utf-8")
        self.process.start()

    def look(self) -> None:
        """Read what was printed since the last look."""
        for line in self.printed:
            self.text += line
            if line.startswith("{'loss'"):
                self.step += 1
                self.evaluating = self.step % EVERY == 0
            elif line.startswith("{'eval_"):
                self.evaluating = False

    def wait_until(self, reached: Callable[[], bool]) -> bool:
        """Whether it came to that before the run ended."""
        while self.process.is_alive():
            if time.monotonic() - self.began > TIMEOUT:
                self.kill()
                raise TimeoutError(f"A start took more than {TIMEOUT:g} s:\n{self.text[-2000:]}")
            self.look()
            if reached():
                return True
            time.sleep(0.001)
        self.look()
        return False

    def kill(self) -> None:
        """SIGKILL to the whole process group."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        self.look()
        self.printed.close()

    def finish(self) -> int:
        """Wait for the end; the exit status."""
        self.wait_until(lambda: False)
        self.printed.close()
        return self.process.exitcode

    @property
    def half_written(self) -> list[str]:
        """Files of the checkpoint that is being written, or [] where none is."""
        folder = next((self.output_dir / UNFINISHED).glob("checkpoint-*"), None)
        try:
            is_new = folder is not None and folder.stat().st_mtime_ns != self.leftover
            return [path.name for path in folder.iterdir()] if is_new else []
        except FileNotFoundError:  # it has just been finished
            return []

    def where(self) -> str:
        """What a killed run was doing."""
        if self.half_written:
            return "checkpoint"
        return "evaluation" if self.evaluating else "steps"


def run(options: list[str], printed: Path) -> None:
    """Become `run.py`, with a process group of its own, printing into a file."""
    os.setsid()
    descriptor = os.open(printed, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, encoding="utf-8")
    sys.argv = ["run.py", *options]
    training.main()


def last_step(output_dir: Path) -> int:
    """Step of the checkpoint from which the next start goes on."""
    folder = last_good_checkpoint(output_dir)
    return int(folder.name.split("-")[1]) if folder else 0


def aim(start: Start, target: str, chance: random.Random, seconds_per_round: float) -> bool:
    """Wait for the moment to kill; False where the run ended before.

    Args:
        start: The run.
        target: One of AIMS; "any" time is one after the first step.
        chance: Random numbers.
        seconds_per_round: What steps, evaluation and checkpoint took in the undisturbed run.
    """
    if target == "any":
        reached = start.wait_until(lambda: start.step > start.resumed_from)
        end = time.monotonic() + chance.uniform(0, 2 * seconds_per_round)
        return reached and start.wait_until(lambda: time.monotonic() >= end)
    goal = start.resumed_from + EVERY * chance.choice((1, 2, 2, 2))  # one checkpoint more may be finished before
    if target == "checkpoint":
        count = chance.randint(1, FILES)
        return start.wait_until(lambda: start.step >= goal and len(start.half_written) >= count)
    reached = start.wait_until(lambda: start.step >= goal)
    time.sleep(chance.uniform(0, 0.1 * seconds_per_round))
    return reached


def survive(folder: Path, kills: int, seed: int, steps: int, seconds_per_round: float) -> dict[str, Any]:
    """Train with so many kills; what was hit, and how long it took."""
    chance, began, moments = random.Random(seed), time.monotonic(), []
    printed = folder.with_name("killed.log")
    for number in range(kills):
        start = Start(folder, steps, printed)
        if not aim(start, AIMS[number % len(AIMS)], chance, seconds_per_round) or not start.process.is_alive():
            break
        start.kill()
        moment = {"where": start.where(), "resumed_from": start.resumed_from, "step": start.step}
        moments.append({**moment, "files_written": len(start.half_written), "next_resumes_from": last_step(folder)})
        print(f"kill {len(moments)}: {moments[-1]}", flush=True)
    start = Start(folder, steps, printed)
    if start.finish() != 0:
        raise RuntimeError(f"The run did not end well after {len(moments)} kills:\n{start.text[-2000:]}")
    counts, seconds = Counter(moment["where"] for moment in moments), round(time.monotonic() - began, 1)
    return {"kills": len(moments), "where": dict(counts), "seconds": seconds, "moments": moments}


def fill_disk(folder: Path, steps: int, checkpoint: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Train on a disk with room for two such checkpoints and a half, where a third is needed; then make room."""
    folder.mkdir()
    size = int(2.5 * sum(path.stat().st_size for path in checkpoint.iterdir()))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)])
    if mounted.returncode != 0:
        return {"tried": False}
    try:
        output_dir, printed = folder / "run", folder.with_name("disk.log")
        start = Start(output_dir, steps, printed)
        status = start.finish()
        error = next((line for line in start.text.splitlines() if "run.py: error:" in line), "")
        intact = last_good_checkpoint(output_dir)
        subprocess.run(["mount", "-o", f"remount,size={20 * size}", str(folder)], check=True)
        status_after = Start(output_dir, steps, printed).finish()
        return {
            "tried": True,
            "disk_bytes": size,
            "exit_status": status,
            "error": error.strip().replace(str(folder), "DISK"),
            "intact_checkpoint": intact.name if intact else None,
            "exit_status_with_room": status_after,
            "equal_to_the_bit": same(expected, end_state(output_dir)),
        }
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# --- the end state ---------------------------------------------------------------------------------------------------


def end_state(output_dir: Path) -> dict[str, Any]:
    """Everything that must not depend on interruptions."""
    last = list(list_checkpoints(output_dir).values())[-1]
    state = read_json(last / "trainer_state.json")
    log = [{k: v for k, v in e.items() if not any(t in k for t in TIMED)} for e in state["log_history"]]
    pickled = {"optimizer": "optimizer.pt", "scheduler": "scheduler.pt", "random numbers": "rng_state.pth"}
    of_numpy = [np.ndarray, np.dtype, np._core.multiarray._reconstruct, np.dtypes.UInt32DType]
    with torch.serialization.safe_globals(of_numpy):
        states = {name: torch.load(last / file, weights_only=True) for name, file in pickled.items()}
    return {
        "trained weights": load_file(last / "model.safetensors"),
        "moving average": load_file(last / "ema.safetensors"),
        **states,
        "log": log,
        "steps and best": {n: state[n] for n in ("global_step", "epoch", "best_global_step", "best_metric")},
        "saved model": load_file(output_dir / "model" / "model.safetensors"),
    }


def same(one: Any, other: Any) -> bool:
    """Equality to the bit of nested containers, tensors and arrays."""
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


def log_is_whole(log: list[dict[str, Any]], steps: int) -> bool:
    """One training entry for each step, one evaluation for each checkpoint: no gaps, no doubles."""
    trained = [entry["step"] for entry in log if "loss" in entry]
    evaluated = [entry["step"] for entry in log if "eval_sa" in entry]
    return trained == list(range(1, steps + 1)) and evaluated == list(range(EVERY, steps + 1, EVERY))


def undisturbed(folder: Path, steps: int) -> float:
    """Train without a kill; seconds of a round of steps, evaluation and checkpoint."""
    start = Start(folder, steps, folder.with_name("undisturbed.log"))
    start.wait_until(lambda: start.step >= 1)
    first = time.monotonic()
    start.wait_until(lambda: start.step >= steps)
    seconds = time.monotonic() - first
    if start.finish() != 0:
        sys.exit(start.text[-2000:])
    return seconds * EVERY / steps


def measure(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """The undisturbed run, the killed one, and the one on a full disk; what they ended with."""
    began, steps = time.monotonic(), EVERY * (kills + SPARE)
    seconds_per_round = undisturbed(folder / "undisturbed", steps)
    expected, last = end_state(folder / "undisturbed"), [*list_checkpoints(folder / "undisturbed").values()][-1]
    killed = survive(folder / "killed", kills, seed, steps, seconds_per_round)
    ended = end_state(folder / "killed")
    full = fill_disk(folder / "disk", steps, last, expected)
    return {
        **killed,
        "steps": steps,
        "steps_between_checkpoints": EVERY,
        "equal_to_the_bit": {name: same(value, ended[name]) for name, value in expected.items()},
        "log_without_gaps_or_doubles": log_is_whole(ended["log"], steps),
        "disk_full": full,
        "seed": seed,
        "total_seconds": round(time.monotonic() - began, 1),
        "environment": describe_environment("cpu"),
    }


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--kills", type=int, default=20, help="how often to kill the run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--output", type=Path, default=RESULTS / "survival.json", help="results file")
    args = parser.parse_args()
    require_positive(parser, args, "kills")
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="survival_", ignore_cleanup_errors=True) as folder:
        results = measure(Path(folder), args.kills, args.seed)
    write_json(args.output, results)
    print("\n".join(f"{name}: {value}" for name, value in results.items() if name != "moments"))
    full = results["disk_full"]
    checks = [*results["equal_to_the_bit"].values(), results["log_without_gaps_or_doubles"]]
    checks += [results["kills"] == args.kills, not full["tried"] or full["equal_to_the_bit"]]
    if not all(checks):
        sys.exit("The run did not survive.")


if __name__ == "__main__":
    main()
