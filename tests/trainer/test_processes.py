"""1, 2 and 4 processes, with and without accumulation, take the same steps; one that dies ends the job.

This file is also the script that the launched processes run: they train every case after one import.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hf_dualmoe import DualMoEConfig, DualMoEForImageClassification, MoEConfig, MoEForImageClassification
from hf_dualmoe.data.datasets import ImageTensorDataset
from hf_dualmoe.trainer.arguments import METHODS, RobustTrainingArguments
from hf_dualmoe.trainer.trainer import RobustTrainer

GLOBAL_BATCH = 16
STEPS = 4
HOW = [(2, 1), (4, 1), (1, 2), (2, 2)]  # processes, batches accumulated
# Two attacks a step draw random numbers in another order where batches are accumulated, and each accumulated batch has
# a perturbation of the weights of its own: compared without that.
OWN = [("rt_er_own", (2, 1)), ("rt_er_own", (4, 1)), ("at_perturbed", (2, 1)), ("at_perturbed", (4, 1))]
TRAINED = tuple(method for method in METHODS if method != "certified")  # which refuses the ViT of these tests
# No BatchNorm: its statistics are those of each process's own images. Hard routing: experts without images.
VIT = {
    "backbone": "vit_tiny_patch16_224",
    "backbone_kwargs": {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2},
    "image_size": 8,
    "num_channels": 1,
    "num_labels": 3,
    "num_experts": 5,
    "router_top_k": 1,
}


# --- what the processes run ------------------------------------------------------------------------------------------


def build(method):
    torch.manual_seed(0)
    config = MoEConfig(**VIT, router_aux_loss_coef=0.0)  # balance is about the images of one process
    if method != "jtdmoe":
        return MoEForImageClassification(config)
    standard = MoEConfig(**{**VIT, "num_experts": 3}, router_aux_loss_coef=0.0)
    return DualMoEForImageClassification(DualMoEConfig(standard=standard, robust=config))


def dataset():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 255, (GLOBAL_BATCH * STEPS, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageTensorDataset(images, torch.arange(len(images)) % 3, ["a", "b", "c"])


class IdleExperts(TrainerCallback):
    """Counts (expert, step) pairs where an expert got no image in this process: its gradient is all zero or absent."""

    def __init__(self, model):
        self.used, self.model = [], getattr(model, "robust", model)
        for index, expert in enumerate(self.model.experts):
            expert.register_forward_hook(lambda module, args, output, i=index: self.seen.add(i))
        self.seen = set()

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen.clear()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.used.append(len(self.seen))


class Death(TrainerCallback):
    """The second process is killed in the third step, and leaves a file that tells when."""

    def __init__(self, folder):
        self.note = folder / "death"

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            self.note.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Poison(TrainerCallback):
    """Makes the outputs of all experts of process 1 NaN in the training pass of step 2."""

    def __init__(self, model):
        self.active = False
        for expert in model.experts:
            expert.register_forward_hook(self.spoil)

    def spoil(self, module, args, output):
        if self.active and module.training:
            return output * float("nan")

    def on_step_begin(self, args, state, control, **kwargs):
        self.active = args.process_index == 1 and state.global_step == 1


def train(folder, name, method, accumulation=1, callbacks=(), poison=False, **changes):
    """Train one case; the main process writes weights and losses, the others check theirs against it."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    settings = {"eps": 0.1, "attack_steps": 2, "second_term": "ce", "max_steps": STEPS, "optim": "sgd"}
    settings |= {"second_attack": "own" if name.endswith("own") else "shared", "learning_rate": 0.05, "use_cpu": True}
    settings |= {"logging_steps": 1, "save_strategy": "no", "crop_padding": 0, "horizontal_flip": False}
    settings |= {"per_device_train_batch_size": GLOBAL_BATCH // world // accumulation, "report_to": "none"}
    settings |= {"gradient_accumulation_steps": accumulation, "disable_tqdm": True}
    args = RobustTrainingArguments(output_dir=str(folder / "run"), method=method, **settings, **changes)
    assert args.world_size == world
    model = build(method)
    idle = IdleExperts(model)
    if poison:
        callbacks = [Poison(model)]
    trainer = RobustTrainer(model, args, train_dataset=dataset(), callbacks=[idle, *callbacks])
    trainer.train()
    state = {n: t.contiguous() for n, t in model.state_dict().items()}
    digest = torch.stack([t.double().sum() for t in state.values()])
    everyone = trainer.accelerator.gather(digest[None])
    assert everyone.shape[0] == world and (everyone == everyone[0]).all(), "processes have different weights"
    fewest = trainer.accelerator.gather(torch.tensor([min(idle.used)])).tolist()
    if trainer.is_world_process_zero():
        save_file(state, str(folder / f"{name}.safetensors"))
        losses = [{k: v for k, v in e.items() if "loss" in k} for e in trainer.state.log_history if "loss" in e]
        figures = {"losses": losses, "fewest_experts": fewest, "skipped": trainer.watch.skipped}
        (folder / f"{name}.json").write_text(json.dumps(figures))
    trainer.accelerator.wait_for_everyone()


def main(folder, what):
    torch.set_num_threads(1)
    if what == "death":
        train(folder, "death", "standard", callbacks=[Death(folder)])
    elif what == "stop":
        train(folder, "stop", "at", poison=True)
    else:
        for method in TRAINED:
            train(folder, method, method, int(what))
        if what == "1":
            train(folder, "rt_er_own", "rt_er")
            train(folder, "at_perturbed", "at", awp_gamma=0.02)
        if int(os.environ.get("WORLD_SIZE", "1")) == 2 and what == "1":
            train(folder, "skip", "at", poison=True, on_nan_loss="skip")


# --- the tests -------------------------------------------------------------------------------------------------------


def launch(folder, processes, what):
    import scripts  # of the tests, which the processes do not find

    folder.mkdir(parents=True, exist_ok=True)
    return scripts.launch(__file__, folder, what, processes=processes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weights and figures by (processes, accumulation)."""
    folder = tmp_path_factory.mktemp("processes")
    results = {}
    for processes, accumulation in ((1, 1), *HOW):
        own = folder / f"{processes}-{accumulation}"
        result = launch(own, processes, accumulation)
        assert result.returncode == 0, result.stderr[-3000:]
        results[processes, accumulation] = own
    return results


def read(folder, name):
    return load_file(folder / f"{name}.safetensors"), json.loads((folder / f"{name}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("method", "how"), [(m, h) for h in HOW for m in TRAINED] + OWN)
def test_same_losses_and_weights_at_the_same_global_batch(trained, method, how):
    weights, figures = read(trained[1, 1], method)
    others, other_figures = read(trained[how], method)
    start = build(method.removesuffix("_own").removesuffix("_perturbed")).state_dict()
    moved = max(float((value - start[name]).abs().max()) for name, value in weights.items())
    assert moved > 2e-3
    for name, value in weights.items():
        assert torch.allclose(value, others[name], atol=5e-5), (name, float((value - others[name]).abs().max()))
    assert len(figures["losses"]) == STEPS
    for one, other in zip(figures["losses"], other_figures["losses"], strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if "aux" not in name:
                assert value == pytest.approx(other[name], abs=2e-4), name


@pytest.mark.slow
def test_some_processes_had_experts_without_images(trained):
    """Otherwise the test above would say nothing about them."""
    fewest = [read(trained[4, 1], method)[1]["fewest_experts"] for method in ("at", "rt_er", "jtdmoe")]
    assert all(min(counts) < VIT["num_experts"] for counts in fewest)


@pytest.mark.slow
def test_all_processes_skip_what_one_of_them_met(trained):
    """`train` itself checks that both have the same weights."""
    weights, figures = read(trained[2, 1], "skip")
    assert figures["skipped"] == 1
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.slow
def test_all_processes_stop_for_one_of_them(tmp_path):
    result = launch(tmp_path, 2, "stop")
    assert result.returncode != 0
    assert result.stderr.count("FloatingPointError: Step 2: not finite (NaN or infinite): loss, loss_robust_ce") == 2


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job_with_a_message(tmp_path):
    result = launch(tmp_path, 2, "death")
    assert time.time() - (tmp_path / "death").stat().st_mtime < 60
    assert result.returncode != 0
    assert "SIGKILL" in result.stderr and "local_rank: 1" in result.stderr


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
