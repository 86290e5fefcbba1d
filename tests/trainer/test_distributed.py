"""Two CPU processes do what one does at the same global batch."""

import copy
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hf_dualmoe import MoEConfig, MoEForImageClassification
from hf_dualmoe.data.datasets import ImageTensorDataset
from hf_dualmoe.evaluation.evaluation import RobustnessReport
from hf_dualmoe.evaluation.processes import Processes
from hf_dualmoe.models.outputs import logits_of
from hf_dualmoe.models.routing_dualmoe import averaged_loads, load_balancing_loss
from hf_dualmoe.trainer.arguments import RobustTrainingArguments
from hf_dualmoe.trainer.step_parts import mean_over_processes
from hf_dualmoe.trainer.trainer import RobustTrainer

TRAINING = Path(__file__).parents[2] / "training"
# GroupNorm: BatchNorm statistics are those of each process's own images
SETTINGS = {
    "max_train_samples": 64,
    "max_validation_samples": 20,
    "max_test_samples": 10,
    "num_experts": 2,
    "router_top_k": 1,
    "width": "8,8,8,16",
    "training_attack": "pgd",
    "shared_stages": 0,
    "router": "linear",
    "attack_steps": 2,
    "eval_attack_steps": 1,
    "num_train_epochs": 1,
    "optim": "sgd",
    "learning_rate": 0.05,
    "logging_steps": 1,
    "disable_tqdm": "true",
    "backbone_kwargs": '{"norm_layer": "groupnorm1"}',
}


def launch(output_dir, processes, method):
    config = TRAINING / "accelerate_configs" / "two_cpu_processes.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(processes)]
    own = {"per_device_train_batch_size": 16 // processes, "output_dir": output_dir, "method": method}
    options = [text for name, value in {**SETTINGS, **own}.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, *launcher, str(TRAINING / "run.py"), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # processes that share cores must not each use all of them
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def wait_long(rank, folder):
    """What a process of the next test does: the main one takes longer than a barrier would stand."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=2)
    )
    processes = Processes(SimpleNamespace(process_index=rank, num_processes=2))
    for turn in range(2):
        if rank == 0:
            time.sleep(5 * (1 - turn))
            Path(folder, f"main-{turn}").touch()
        processes.await_main()
        assert Path(folder, f"main-{turn}").exists()
        Path(folder, f"{rank}-{turn}").touch()
    torch.distributed.destroy_process_group()


def test_a_long_measurement_of_the_main_process_does_not_time_out(tmp_path):
    torch.multiprocessing.spawn(wait_long, (str(tmp_path),), nprocs=2)
    assert len([*tmp_path.glob("[01]-[01]")]) == 4


def train_hard_routing(rank, folder):
    """What a process of the next test does: four experts, two images, so that some experts see none."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(29_000 + os.getppid() % 20_000)}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randint(0, 255, (26, 1, 10, 10), dtype=torch.uint8)
    data = ImageTensorDataset(images, torch.arange(26) % 3, ["a", "b", "c"])
    sizes = {"width": [8, 8, 8, 16], "num_labels": 3, "image_size": 10, "num_channels": 1, "num_experts": 4}
    model = MoEForImageClassification(MoEConfig(**sizes, router_top_k=1))
    settings = {"method": "at", "eps": 0.3, "attack_steps": 1, "eval_attack_steps": 1, "max_steps": 3, "use_cpu": True}
    settings |= {"per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    args = RobustTrainingArguments(output_dir=folder, gradient_checkpointing=True, **settings)
    trainer = RobustTrainer(model, args, train_dataset=data, eval_dataset=data)
    trainer.train()
    attacked = torch.tensor(trainer.predict(data).predictions[1])
    if rank == 0:
        alone = RobustTrainer(copy.deepcopy(model), args, eval_dataset=data)
        ids = torch.arange(26)
        raw, floats = alone.model.eval(), images / 255
        expected = logits_of(raw, args.evaluation_attack()(raw, floats, data.labels, ids=ids))
        assert torch.allclose(attacked, expected, atol=1e-4)
        Path(folder, f"{trainer.state.global_step}-steps").touch()


@pytest.mark.slow
def test_hard_routing_is_trained_with_recomputed_activations_and_measured_alike(tmp_path):
    """DDP with gradient checkpointing did not look for experts without images; RA depended on the processes."""
    torch.multiprocessing.spawn(train_hard_routing, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "3-steps").exists()


def balance_two_halves(rank, folder):
    """What a process of the next test does: the balance loss of its half of a batch, and the gradient."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    own = ROUTER_LOGITS[rank::2].clone().requires_grad_()
    with averaged_loads(mean_over_processes):
        loss = load_balancing_loss(own)
    torch.save((loss.detach(), torch.autograd.grad(loss, own)[0]), Path(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


ROUTER_LOGITS = torch.tensor([[2.0, 0, 0], [0, 2, 0], [1, 0, 0], [0, 0, 1], [3, 1, 0], [0, 1, 3]])


def test_experts_are_balanced_over_the_batches_of_all_processes(tmp_path):
    torch.multiprocessing.spawn(balance_two_halves, (str(tmp_path),), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    whole = ROUTER_LOGITS.clone().requires_grad_()
    loss = load_balancing_loss(whole)
    expected = torch.autograd.grad(loss, whole)[0]
    assert sum(half for half, _ in halves).item() / 2 == pytest.approx(loss.item(), abs=1e-6)
    for rank, (_, gradient) in enumerate(halves):
        torch.testing.assert_close(gradient / 2, expected[rank::2])  # DDP divides by the number of processes


@pytest.mark.parametrize(
    "method",
    [
        "jtdmoe",
        pytest.param("at", marks=pytest.mark.slow),
        pytest.param("trades", marks=pytest.mark.slow),
        pytest.param("rt_er", marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one(tmp_path, method):
    outputs = [launch(tmp_path / str(n), n, method) for n in (1, 2)]
    assert "Saved to" in outputs[1]
    one, two = (load_file(tmp_path / str(n) / "model" / "model.safetensors") for n in (1, 2))
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-4), (name, float((value - two[name]).abs().max()))
    reports = [RobustnessReport.load(tmp_path / str(n) / "model" / "results.json") for n in (1, 2)]
    assert reports[0].training["steps"] == reports[1].training["steps"] == 4
