"""Call a script of `training/` in this process as the command line does, or in several processes."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

CONFIGS = Path(__file__).parents[1] / "training" / "accelerate_configs"


def call(script: ModuleType, *arguments: object) -> int:
    """The exit status of the script's `main` with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [Path(script.__file__).name, *map(str, arguments)])
        try:
            script.main()
        except SystemExit as end:
            return end.code or 0
    return 0


def launch(script: str | Path, *arguments: object, processes: int = 2) -> subprocess.CompletedProcess:
    """Run the script in so many processes of `accelerate launch` on the CPU; it need not succeed."""
    config = ("--config_file", CONFIGS / "two_cpu_processes.yaml", "--num_processes", processes)
    command = [sys.executable, "-m", "accelerate.commands.launch", *config, script, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # processes that share cores must not each use all of them
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, env=env)


def output_of(result: subprocess.CompletedProcess) -> str:
    """What a finished process printed, where it succeeded."""
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout
