"""`hf-dualmoe`, also `python -m hf_dualmoe`: one command that lists and runs the scripts and the demo page.

hf-dualmoe                                       # what there is
hf-dualmoe train --help
accelerate launch -m hf_dualmoe train            # on several processes
"""

import difflib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from .. import __version__

PACKAGE = Path(__file__).parents[1]
SCRIPT_FOLDERS = (PACKAGE / "training", PACKAGE.parent / "training")  # in a wheel; in a source checkout


class Command(NamedTuple):
    """A word after `hf-dualmoe`.

    Args:
        target: Name of a script in training/, or of a module of this package; either has a function `main`.
        summary: What it does, in one line.
    """

    target: str
    summary: str


COMMANDS = {
    "train": Command("run.py", "Train a robust classifier on digits, a dataset of the Hub or a folder of images."),
    "evaluate": Command(
        "evaluate.py", "Attack a saved model and report how robust it is: table, results.json, plots."
    ),
    "join": Command("join.py", "Join an accurate and a robust model of any kind, with a dial between them."),
    "certify": Command("certify.py", "Prove, image by image, how far no attack can change the answer."),
    "publish": Command(
        "publish.py", "Upload a trained model with its card and results to the Hub (or list the files)."
    ),
    "demo": Command(
        "hf_dualmoe.demo.__main__", "Open a page in the browser: pick an image, attack it, turn the dial."
    ),
}
EXAMPLES = """Examples:
  hf-dualmoe train                                              minutes on a laptop, nothing to download
  hf-dualmoe train --dataset_name path/to/images --image_size 64 --eps 4/255
  hf-dualmoe evaluate --model outputs/digits-jtdmoe/model --eps 0.15
  hf-dualmoe train --model_name_or_path path/to/model --dataset_name path/to/images --output_dir outputs/hardened
  hf-dualmoe join --standard path/to/model --robust outputs/hardened/model --dataset_name path/to/images --eps 4/255
  hf-dualmoe demo --model outputs/digits-jtdmoe/model
  accelerate launch -m hf_dualmoe train                         on all graphics cards"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run `hf-dualmoe` with these words, by default those of the command line.

    Raises:
        SystemExit: With status 0 after help or version, 2 where the command is unknown or its script is missing, else
            what the command ends with.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        finish(overview())
    if words[0] in ("-V", "--version"):
        finish(f"hf_dualmoe {__version__}")
    if words[0] not in COMMANDS:
        close = difflib.get_close_matches(words[0], COMMANDS, n=1)
        fail(f"{words[0]!r} is no command; {f'did you mean {close[0]!r}? ' if close else ''}See hf-dualmoe --help.")
    run_command(words[0], words[1:])


def run_command(name: str, arguments: Sequence[str]) -> None:
    """Call the `main` of one of `COMMANDS` in this process, which finds "hf-dualmoe NAME" and `arguments` in argv."""
    target = COMMANDS[name].target
    before = sys.argv
    # the scripts read sys.argv, as they do when they are run by themselves
    sys.argv = [f"hf-dualmoe {name}", *arguments]  # argparse shows it in usage and errors
    try:
        module = load_script(name, target) if target.endswith(".py") else importlib.import_module(target)
        status = module.main()
    finally:
        sys.argv = before
    if isinstance(status, int) and status:  # most `main`s return nothing, which is success
        raise SystemExit(status)


def load_script(name: str, target: str) -> ModuleType:
    """The script as a module; leaves with status 2 and what to do where this installation does not have it."""
    script = find_script(target)
    if script is None:
        fail(
            f"{name} runs training/{target}, which this installation does not have. "
            "Get the source code of hf_dualmoe, then in its folder: pip install -e ."
        )
    spec = importlib.util.spec_from_file_location(f"hf_dualmoe_{script.stem}_script", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # what it defines can be pickled for worker processes
    spec.loader.exec_module(module)
    return module


def find_script(name: str) -> Path | None:
    """The script of that name in training/; None where this installation does not have it."""
    return next((folder / name for folder in SCRIPT_FOLDERS if (folder / name).is_file()), None)


def overview() -> str:
    """Text of `hf-dualmoe` alone: the commands, which of them are missing, and examples."""
    lines = []
    for name, command in COMMANDS.items():
        missing = command.target.endswith(".py") and find_script(command.target) is None
        lines.append(f"  {name:10}{command.summary}{' (not in this installation)' if missing else ''}")
    return "\n".join(
        [
            "usage: hf-dualmoe COMMAND [options]",
            "\nImage classifiers that stay accurate under attack. Commands:",
            *lines,
            "\n`hf-dualmoe COMMAND --help` explains the options of one.\n",
            EXAMPLES,
        ]
    )


def finish(text: str) -> None:
    """Print and leave with status 0."""
    sys.stdout.write(text + "\n")
    raise SystemExit(0)


def fail(message: str) -> None:
    """Print an error and leave with status 2."""
    sys.stderr.write(f"hf-dualmoe: error: {message}\n")
    raise SystemExit(2)


__all__ = ["COMMANDS", "main"]
