"""What full_scale.py trains and judges: stages, their settings and shares of the time, and the images."""

import re
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hf_dualmoe.data import DataSplits, ImageTensorDataset, load_splits

EPS = 8 / 255
HELD_OUT = 50  # one image of train in so many is held out, by its content: the same ones whichever shards are there
HEADS = {"num_experts": 4, "router_top_k": 4, "shared_stages": 4, "router": "pooled", "router_aux_loss_coef": 0.3}
RT_ER = {"beta": 0.1, "second_term": "ce", "second_attack": "shared"}


@dataclass(frozen=True)
class Stage:
    """One training.

    Args:
        share: Of the minutes.
        max_epochs: More are not trained even where there is time: what is over goes to the evaluation.
        rate: Of the peak learning rate of a training from scratch.
        settings: Of `RobustTrainingArguments`, beside `COMMON`.
        start: Stage whose model it starts from; None = from scratch.
        model: Of `ModelArguments`; {} = one network.
    """

    share: float
    max_epochs: int
    rate: float
    settings: dict[str, Any]
    start: str | None = None
    model: dict[str, Any] = field(default_factory=dict)


# PGD-7: public logs of FastAT-Bench (DESIGN, "Numbers to know") have PGD-10 with label smoothing and a moving average
# at AutoAttack 50.5 after 100 epochs, and N-FGSM at 47.8. In the four and a half minutes of `single` there is room for
# about 50 epochs of PGD-7 or 40 of PGD-10 if a step comes near the bare CUDA graph. That 50 epochs are enough for 48,
# and what the learning rate should be at this batch size, is untested here.
# The late stages' learning rate (a quarter) and epochs are those of a trial at width 0.25; at full width untested.
STAGES = {
    "single": Stage(0.38, 60, 1.0, {"method": "at", "eps": "8/255", "metric_for_best_model": "ra"}),
    "standard": Stage(0.05, 6, 0.25, {"method": "at", "eps": "4/255"}, start="single"),
    "rt_er": Stage(0.07, 8, 0.25, {"method": "rt_er", "eps": "8/255", **RT_ER}, start="single", model=HEADS),
    "jtdmoe": Stage(
        0.10,
        8,
        0.25,
        {"method": "jtdmoe", "eps": "8/255", "standard_eps": "4/255", "train_alpha": 0.25, **RT_ER},
        start="single",
        model=HEADS,
    ),
}
COMMON = {  # one cycle: up over three tenths, then linearly to zero, after Wong et al. 2020
    "step_graph": "auto",
    "training_attack": "pgd",
    "attack_steps": 7,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.3,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "weight_decay": 5e-4,
    "label_smoothing_factor": 0.1,
    "channels_last": True,
    "eval_attack_steps": 10,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "sa_ra_mean",
    "report_to": "none",
    "disable_tqdm": True,
}
PAIRS = {"pair": "probs", "pair_weights": "weights"}  # of F_S and single, from which it started: what their dial mixes
WEIGHTS = ("single", "standard", "jtdmoe")  # stages whose weights are brought home
NUMBER_OF = {"autoattack": "ra_autoattack", "worst_case": "ra_adaptive_union"}  # of a part, among the metrics
EVALUATIONS = (  # model, what of it; in order of interest
    ("single", "autoattack"),
    ("pair_weights", "worst_case"),
    ("pair", "worst_case"),
    ("jtdmoe", "worst_case"),
    ("rt_er", "worst_case"),
    ("single", "worst_case"),
    ("pair_weights", "autoattack"),
    ("pair", "autoattack"),
    ("jtdmoe", "autoattack"),
    ("rt_er", "autoattack"),
)


@dataclass(frozen=True)
class Scale:
    """How large all of it is.

    Args:
        width: As in `ModelArguments`; None = full.
        batch: Images per step.
        peak_rate: Peak learning rate of `single`: 0.2 at batch 128, times the root of the batch's ratio (untested).
        ema_decay: An average over about two epochs, as 0.999 is at batch 128.
        reviews: Evaluations and checkpoints in a stage.
        most_steps: Steps of a stage at most; None = as the time allows.
        test_images, dial_images: Images that models are judged by, and held-out ones that dials are chosen by.
        union_steps: Steps of each member of the adaptive union.
        autoattack: Version of AutoAttack.
        alphas: Positions of the dial.
    """

    width: str | None = None
    batch: int = 512
    peak_rate: float = 0.4
    ema_decay: float = 0.996
    reviews: int = 6
    most_steps: int | None = None
    test_images: int = 1000
    dial_images: int = 500
    union_steps: int = 20
    autoattack: str = "standard"
    alphas: tuple[float, ...] = (0.5, 0.7, 0.85, 1.0)


REHEARSAL = Scale(
    width="4,4,4,8",
    batch=32,
    ema_decay=0.5,
    reviews=2,
    most_steps=4,
    test_images=10,
    dial_images=5,
    union_steps=1,
    autoattack="fast",
    alphas=(0.5, 1.0),
)


# --- data ------------------------------------------------------------------------------------------------------------


def load_data(name: str) -> DataSplits:
    """The images, with a held-out set that is the same whichever shards of train are there."""
    splits = load_splits(name)
    pools = [splits.train, splits.validation]
    images, labels = (torch.cat([getattr(pool, key) for pool in pools]) for key in ("images", "labels"))
    whole = ImageTensorDataset(images, labels, splits.class_names)
    held = torch.tensor([zlib.crc32(image.numpy().tobytes()) % HELD_OUT == 0 for image in images])
    train, validation = (whole.subset(mask.nonzero().flatten()) for mask in (~held, held))
    return replace(splits, train=train, validation=validation, duplicates={})


def shards_there(name: str) -> tuple[int, int]:
    """How many shards of train the folder has, and how many belong to it; (1, 1) where that cannot be told."""
    names = [path.name for path in Path(name).rglob("train-*-of-*.parquet")] if Path(name).is_dir() else []
    totals = {int(match[1]) for shard in names if (match := re.fullmatch(r"train-\d+-of-(\d+).*", shard))}
    return (len(names), totals.pop()) if len(totals) == 1 else (1, 1)
