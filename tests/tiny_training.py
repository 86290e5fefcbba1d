"""Trainings of seconds: a tiny model for each method, a few images of noise, arguments for a CPU."""

from pathlib import Path

import torch

from hf_dualmoe import DualMoEConfig, DualMoEForImageClassification, MoEConfig, MoEForImageClassification
from hf_dualmoe.data.datasets import ImageTensorDataset
from hf_dualmoe.trainer.arguments import RobustTrainingArguments

TINY = {"backbone": "resnet10t", "width": [8, 8, 8, 16], "num_labels": 3, "image_size": 10, "num_channels": 1}
TINY |= {"num_experts": 2}
LIPSCHITZ = {"backbone": "lipschitz_mlp", "backbone_kwargs": {"hidden_sizes": [8], "logit_scale": 8.0}, "width": None}


def build(method: str, **fields) -> MoEForImageClassification | DualMoEForImageClassification:
    """What the method trains, always with the same weights; `fields` are those of each mixture's config."""
    torch.manual_seed(0)
    fields = {**TINY, **(LIPSCHITZ if method == "certified" else {}), **fields}
    if method != "jtdmoe":
        return MoEForImageClassification(MoEConfig(**fields))
    return DualMoEForImageClassification(DualMoEConfig(standard=MoEConfig(**fields), robust=MoEConfig(**fields)))


def noise(count: int = 60) -> ImageTensorDataset:
    """Grey images of 10 x 10 pixels and three classes, without anything to learn."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 255, (count, 1, 10, 10), generator=generator, dtype=torch.uint8)
    return ImageTensorDataset(images, torch.arange(count) % 3, ["a", "b", "c"])


def arguments(output_dir: str | Path, **changes) -> RobustTrainingArguments:
    """Adversarial training by one step, on the CPU, without checkpoints; `changes` go first."""
    settings = {"method": "at", "eps": 0.1, "attack_steps": 1, "per_device_train_batch_size": 20, "crop_padding": 0}
    settings |= {
        "per_device_eval_batch_size": 64,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return RobustTrainingArguments(output_dir=str(output_dir), **{**settings, **changes})
