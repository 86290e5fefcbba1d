"""Two CPU processes do what one does at the same global batch."""

import copy
import os
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import scripts
import tiny_training
import torch
from safetensors.torch import load_file

from hf_dualmoe.evaluation.processes import Processes
from hf_dualmoe.models.outputs import logits_of
from hf_dualmoe.models.routing_dualmoe import averaged_loads, load_balancing_loss
from hf_dualmoe.trainer.checkpoints import list_checkpoints
from hf_dualmoe.trainer.step_parts import mean_over_processes
from hf_dualmoe.trainer.trainer import RobustTrainer
from training import run as script

# GroupNorm: BatchNorm statistics are those of each process's own images
SETTINGS = (
    "--max_train_samples 64 --max_validation_samples 20 --max_test_samples 10 --num_experts 2 --router_top_k 1 "
    "--backbone resnet10t --width 8,8,8,16 --shared_stages 0 --router linear --training_attack pgd --attack_steps 2 "
    "--eval_attack_steps 1 --num_train_epochs 1 --optim sgd --learning_rate 0.05 --logging_steps 1 "
    "--disable_tqdm true --report none --save_strategy steps --save_steps 4 --load_best_model_at_end false"
).split()
SETTINGS += ["--backbone_kwargs", '{"norm_layer": "groupnorm1"}']


def pretend(rank):
    """Set what a launcher tells a process of two."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(29_000 + os.getppid() % 20_000), "ACCELERATE_USE_CPU": "true"}
    os.environ["OMP_NUM_THREADS"] = "1"  # or accelerate gives each process all cores
    torch.set_num_threads(1)


def work_together(rank, folder):
    """What a process of the next test does: wait for the other, look at its half of a batch, train with the other."""
    store = f"file://{folder}/store"
    short = timedelta(seconds=2)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=short)
    processes = Processes(SimpleNamespace(process_index=rank, num_processes=2))
    for turn in range(2):
        if rank == 0:
            time.sleep(3 * (1 - turn))  # longer than a barrier would stand
            Path(folder, f"main-{turn}").touch()
        processes.await_main()
        assert Path(folder, f"main-{turn}").exists()
    own = ROUTER_LOGITS[rank::2].clone().requires_grad_()
    with averaged_loads(mean_over_processes):
        loss = load_balancing_loss(own)
    torch.save((loss.detach(), torch.autograd.grad(loss, own)[0]), Path(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()
    pretend(rank)
    assert scripts.call(script, *command(folder, 2, "jtdmoe")) == 0


def command(folder, processes, method):
    share = ("--per_device_train_batch_size", 16 // processes)
    return [*SETTINGS, "--method", method, *share, "--output_dir", Path(folder, str(processes))]


def assert_same_training(folder):
    one, two = (load_file(folder / n / "model" / "model.safetensors") for n in "12")
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-4), (name, float((value - two[name]).abs().max()))
    assert [*list_checkpoints(folder / "1")] == [*list_checkpoints(folder / "2")] == [4]


ROUTER_LOGITS = torch.tensor([[2.0, 0, 0], [0, 2, 0], [1, 0, 0], [0, 0, 1], [3, 1, 0], [0, 1, 3]])


def test_two_processes_await_each_other_balance_experts_over_all_batches_and_train_as_one(tmp_path):
    torch.multiprocessing.spawn(work_together, (str(tmp_path),), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    whole = ROUTER_LOGITS.clone().requires_grad_()
    loss = load_balancing_loss(whole)
    expected = torch.autograd.grad(loss, whole)[0]
    assert sum(half for half, _ in halves).item() / 2 == pytest.approx(loss.item(), abs=1e-6)
    for rank, (_, gradient) in enumerate(halves):
        torch.testing.assert_close(gradient / 2, expected[rank::2])  # DDP divides by the number of processes
    assert scripts.call(script, *command(tmp_path, 1, "jtdmoe")) == 0
    assert_same_training(tmp_path)


def train_hard_routing(rank, folder):
    """What a process of the next test does: four experts, two images, so that some experts see none."""
    pretend(rank)
    data = tiny_training.noise(26)
    settings = {"eps": 0.3, "eval_attack_steps": 1, "max_steps": 3, "per_device_train_batch_size": 2}
    args = tiny_training.arguments(folder, gradient_checkpointing=True, **settings)
    model = tiny_training.build("at", num_experts=4, router_top_k=1)
    trainer = RobustTrainer(model, args, train_dataset=data, eval_dataset=data)
    trainer.train()
    attacked = torch.tensor(trainer.predict(data).predictions[1])
    if rank == 0:
        alone = RobustTrainer(copy.deepcopy(model), args, eval_dataset=data)
        ids = torch.arange(26)
        raw, floats = alone.model.eval(), data.images / 255
        expected = logits_of(raw, args.evaluation_attack()(raw, floats, data.labels, ids=ids))
        assert torch.allclose(attacked, expected, atol=1e-4)
        Path(folder, f"{trainer.state.global_step}-steps").touch()


@pytest.mark.slow
def test_hard_routing_is_trained_with_recomputed_activations_and_measured_alike(tmp_path):
    """DDP with gradient checkpointing did not look for experts without images; RA depended on the processes."""
    torch.multiprocessing.spawn(train_hard_routing, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "3-steps").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["at", "trades", "rt_er"])
def test_launched_processes_equal_one(tmp_path, method):
    result = scripts.launch(script.__file__, *command(tmp_path, 2, method))
    assert "Saved to" in scripts.output_of(result)
    assert scripts.call(script, *command(tmp_path, 1, method)) == 0
    assert_same_training(tmp_path)
