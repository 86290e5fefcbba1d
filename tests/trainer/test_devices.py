"""Which device the arguments choose; other hardware is pretended, as far as a CPU allows."""

import logging

import pytest
import tiny_training
import torch
from transformers import training_args

from hf_dualmoe.trainer.trainer import RobustTrainer


@pytest.fixture
def said(caplog, monkeypatch):
    """said(): the lines of the log."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_dualmoe"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records]


def test_one_process_uses_one_of_several_gpus(said, tmp_path, monkeypatch):
    """nn.DataParallel's replicas have no parameters: a bare StopIteration, or routers without their loss."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        args = tiny_training.arguments(tmp_path, use_cpu=False, max_steps=1)
    (line,) = [line for line in said() if "GPUs" in line]
    assert line.startswith("Training on one of 2 GPUs") and "accelerate launch --num_processes 2" in line
    assert args.n_gpu == 1 and args.train_batch_size == 20 and args.parallel_mode.value == "not_parallel"
    trainer = RobustTrainer(tiny_training.build("jtdmoe"), args, train_dataset=tiny_training.noise(20))
    trainer.train()
    assert not isinstance(trainer.model_wrapped, torch.nn.DataParallel)


@pytest.mark.parametrize("use_cpu", [False, True])
def test_apple_gpus_are_left_alone(use_cpu, said, tmp_path, monkeypatch):
    """They have no double precision, which attacks and evaluations need."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(training_args, "is_torch_mps_available", lambda: True)
    args = tiny_training.arguments(tmp_path, use_cpu=use_cpu, bf16=True)
    assert args.use_cpu and args.device == torch.device("cpu")
    lines = [line for line in said() if "(mps)" in line]
    assert len(lines) == (0 if use_cpu else 1)


def test_a_cpu_says_nothing(said, tmp_path):
    args = tiny_training.arguments(tmp_path, use_cpu=False)
    assert args.use_cpu and args.n_gpu == 0 and not [line for line in said() if "Training on" in line]
