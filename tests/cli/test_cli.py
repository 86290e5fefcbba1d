"""`hf-dualmoe` lists and runs the scripts, and says what to do where one is missing."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from hf_dualmoe import __version__
from hf_dualmoe.cli import main as cli


@pytest.fixture
def call(capsys):
    """call(*words) -> (exit status, stdout, stderr) of `hf-dualmoe` in this process."""

    def run(*words):
        try:
            cli.main(words)
            status = 0
        except SystemExit as exit_info:
            status = exit_info.code or 0
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def own_scripts(tmp_path, monkeypatch):
    """A folder that stands for training/, with an own `publish.py` and nothing else."""
    (tmp_path / "publish.py").write_text("import sys\ndef main():\n    print(__file__, sys.argv)\n    return 7\n")
    monkeypatch.setattr(cli, "SCRIPT_FOLDERS", (tmp_path / "not_there", tmp_path))
    return tmp_path


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)], ids=str)
def test_overview_lists_every_command(call, words):
    status, out, _ = call(*words)
    assert status == 0
    for name, command in cli.COMMANDS.items():
        assert f"  {name} " in out and command.summary in out
    assert max(map(len, out.splitlines())) <= 120
    assert "not in this installation" not in out


def test_version(call):
    assert call("--version") == (0, f"hf_dualmoe {__version__}\n", "")


def test_unknown_command_suggests_one(call):
    status, out, err = call("trian", "--help")
    assert (status, out) == (2, "") and "'trian' is no command; did you mean 'train'?" in err


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_of_each_command_under_its_own_name(call, name):
    before = list(sys.argv)
    status, out, _ = call(name, "--help")
    assert status == 0 and f"usage: hf-dualmoe {name}" in out and "--" in out.partition("\n")[2]
    assert sys.argv == before


def test_every_script_in_the_checkout_is_a_command():
    scripts = {path.name for path in (Path(__file__).parents[2] / "training").glob("*.py")}
    assert scripts <= {command.target for command in cli.COMMANDS.values()}


def test_arguments_and_status_pass_through(call, own_scripts):
    script = own_scripts / "publish.py"
    before, argv = list(sys.argv), ["hf-dualmoe publish", "--dry_run", "a b"]
    assert call("publish", "--dry_run", "a b") == (7, f"{script} {argv}\n", "")
    assert sys.argv == before


def test_missing_script_says_what_to_do(call, own_scripts):
    status, _, err = call("train")
    assert status == 2 and "training/run.py" in err and "pip install -e ." in err
    _, out, _ = call()
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert lines["train"].endswith("(not in this installation)") and not lines["publish"].endswith(")")


def test_errors_of_a_command_name_it(call):
    status, _, err = call("evaluate", "--model", "somewhere", "--eps", "eight")
    assert status == 2 and "hf-dualmoe evaluate: error: argument --eps" in err


@pytest.mark.slow  # the test below does this in process
def test_module_runs_from_anywhere(tmp_path):
    result = subprocess.run([sys.executable, "-m", "hf_dualmoe"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and "usage: hf-dualmoe COMMAND" in result.stdout, result.stderr


def test_main_module_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf_dualmoe", "--version"])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_module("hf_dualmoe", run_name="__main__")
    assert exit_info.value.code == 0 and __version__ in capsys.readouterr().out
