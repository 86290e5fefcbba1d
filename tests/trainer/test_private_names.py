"""What of transformers' Trainer we rely on without a promise: all of it is listed here, and a change is loud."""

import inspect
import re
from pathlib import Path

import pytest
from transformers import Trainer, trainer, trainer_utils

import hf_dualmoe
from hf_dualmoe.trainer.trainer import RobustTrainer

ROOT = Path(hf_dualmoe.__file__).parent
# Private methods that we override or look at, with their arguments
PRIVATE = {
    "_get_output_dir": ["self", "trial"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_prepare_inputs": ["self", "inputs"],
}
NAME = re.compile(r"(?:self\.|def |\")(_[a-z]\w*)")
OURS = [*(ROOT / "trainer").glob("*.py"), ROOT / "hub" / "trainer_publishing.py"]


def arguments(function) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", PRIVATE)
def test_private_methods_are_as_we_know_them(name):
    assert hasattr(Trainer, name), f"transformers has no Trainer.{name} any more"
    assert arguments(getattr(Trainer, name)) == PRIVATE[name], f"transformers has changed Trainer.{name}"


def test_we_share_no_other_private_name_with_the_trainer():
    """Neither on purpose, nor by a name of ours that transformers now uses for something else."""
    theirs = set(NAME.findall(inspect.getsource(trainer)))
    found = {name: path.name for path in OURS for name in NAME.findall(path.read_text(encoding="utf-8"))}
    assert {name: where for name, where in found.items() if name in theirs}.keys() == PRIVATE.keys(), found


def test_public_methods_that_we_override_take_the_same_arguments():
    names = [n for n, parent in inspect.getmembers(Trainer, inspect.isfunction) if not n.startswith("_")]
    overridden = [n for n in names if getattr(RobustTrainer, n) is not getattr(Trainer, n)]
    assert {"train", "training_step", "compute_loss", "log", "get_batch_samples"} <= set(overridden)
    for name in set(overridden) - {"push_to_hub"}:  # ours names what theirs takes as kwargs
        assert arguments(getattr(RobustTrainer, name)) == arguments(getattr(Trainer, name)), name


def test_what_else_the_checkpoints_need():
    assert "_internal_call" in arguments(Trainer.save_model)
    assert arguments(trainer_utils.rotate_checkpoints)[:4] == [
        "output_dir",
        "save_total_limit",
        "best_model_checkpoint",
        "use_mtime",
    ]
    saving = inspect.getsource(Trainer._save_checkpoint)
    assert "self._get_output_dir(" in saving, "transformers asks another method where to write checkpoints"
    assert "self.get_batch_samples(" in inspect.getsource(Trainer._run_epoch), "finished runs would take another step"
