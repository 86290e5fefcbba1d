"""Arguments of `RobustTrainer`: the objective, the attack inside it, and what is measured while training."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import logging

from ..attacks.base import check_eps
from ..attacks.nfgsm import NFGSM
from ..attacks.pgd import PGD
from ..evaluation.environment import pixel_radius
from .nonfinite import POLICIES

METHODS = ("standard", "at", "trades", "rt_er", "jtdmoe", "certified")
WITHOUT_ATTACK = ("standard", "certified")  # methods whose steps attack nothing
TRAINING_ATTACKS = ("pgd", "nfgsm")
STEP_GRAPHS = ("auto", "off")
COUNTS = ("attack_steps", "eval_attack_steps", "crop_padding", "max_skipped_steps")
WEIGHTS = ("beta", "trades_lambda", "margin_weight", "route_weight", "gate_weight", "awp_gamma")
CUTMIX_METHODS = ("standard", "at", "trades")  # the others need one class per image
SHARES = ("train_alpha", "clean_weight", "cutmix_prob", "ema_decay", "eps_warmup_ratio")

# What transformers takes here and fails on in the first step, or after an epoch's work, or not at all
AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
NOT_NEGATIVE = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers")
POSITIVE = ("adam_epsilon", "logging_steps", "save_steps")
BELOW_ONE = ("label_smoothing_factor", "adam_beta1", "adam_beta2")
FIXED = {
    "remove_unused_columns": (False, "images are made in the collator"),
    "eval_do_concat_batches": (True, "SA and RA are those of all batches together"),
    "batch_eval_metrics": (False, "SA and RA are those of all batches together"),
    "neftune_noise_alpha": (None, "images have no embeddings to add noise to"),
    "hub_strategy": ("end", "checkpoints hold pickles, which are never sent"),
}


logger = logging.get_logger(__name__)


class PixelValue(float):
    """A length in [0, 1] pixel units that may be written as a fraction: `PixelValue("8/255")`."""

    def __new__(cls, value: Any) -> "PixelValue":
        try:
            return super().__new__(cls, pixel_radius(value) if isinstance(value, str) else value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{value!r} must be a number or a fraction such as 8/255.") from error


@dataclass
class RobustTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the objective and its attack; defaults are the paper's.

    Defaults that differ from the parent: columns are kept (images are made in the collator), labels are called
    "labels", the run logs every 50 steps, losses that are not finite are not hidden from the log, and the Hub gets the
    finished model alone. Pickles and copies of these arguments (training_args.bin) leave `hub_token` out. One process
    uses one GPU, however many there are; on Apple GPUs, which have no double precision, training runs on the CPU. One
    line of the log says so.
    """

    # Objective
    method: str = field(
        default="jtdmoe",
        metadata={
            "help": "Training objective: standard, at (adversarial training), trades, rt_er (paper, robust mixture of "
            "experts), jtdmoe (paper, dual model), certified (margins of 1-Lipschitz backbones, without attacks; see "
            "the recipe digits_certified).",
            "choices": METHODS,
        },
    )
    beta: float = field(default=6.0, metadata={"help": "Weight of the second-expert term of RT-ER, >= 0 (paper: 6)."})
    second_term: str = field(
        default="kl",
        metadata={"help": "Second-expert term of RT-ER: kl (paper) or ce.", "choices": ("kl", "ce")},
    )
    second_attack: str = field(
        default="own",
        metadata={
            "help": "Attack of the second-expert term: own (paper) or shared with the whole model, at half the cost.",
            "choices": ("own", "shared"),
        },
    )
    trades_lambda: float = field(default=6.0, metadata={"help": "Weight of the KL term of TRADES, >= 0."})
    clean_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight c of clean images in method=at, in [0, 1): the loss is (1 - c) CE(attacked) + c CE(clean)."
        },
    )
    train_alpha: float = field(
        default=0.75,
        metadata={
            "help": "Weight of the robust model in the upper level of JTDMoE, in [0, 1); the dial can be turned later."
        },
    )
    standard_eps: PixelValue = field(
        default=PixelValue(0.0),
        metadata={
            "help": "Radius of a one-step attack on the images of the upper level of JTDMoE, in [0, eps]; fractions "
            "like 2/255 work. 0: clean images (paper). Our recipes use half of eps, and keep that "
            "share where --eps is given alone."
        },
    )
    standard_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the standard model in JTDMoE; default: learning_rate."}
    )

    # Certificates: method="certified"
    certify_radius: PixelValue = field(
        default=PixelValue("108/255"),  # a radius at which papers on 1-Lipschitz networks report
        metadata={"help": "L2 radius that method=certified asks for, > 0, in [0, 1] pixel units (fractions work)."},
    )
    margin_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the hinge on logit margins of method=certified, >= 0 (0: cross-entropy alone)."},
    )
    route_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the hinge on route radii of method=certified, >= 0; for router_top_k=1."},
    )
    gate_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the gate's Lipschitz constant in method=certified, >= 0; for all experts mixed."},
    )

    # Attack
    eps: PixelValue = field(
        default=PixelValue("8/255"),
        metadata={"help": "Attack radius in [0, 1] pixel units; fractions like 8/255 work."},
    )
    norm: str = field(default="linf", metadata={"help": "Norm of the attack: linf or l2.", "choices": ("linf", "l2")})
    training_attack: str = field(
        default="pgd",
        metadata={
            "help": "Attack inside the objective: pgd, or nfgsm (one step from a noisy image, L-inf; several times "
            "cheaper).",
            "choices": TRAINING_ATTACKS,
        },
    )
    attack_steps: int = field(default=10, metadata={"help": "PGD steps of the training attack, >= 1."})
    attack_step_size: PixelValue | None = field(
        default=None, metadata={"help": "Step of the training attack, in the unit of eps; default: 2.5 * eps / steps."}
    )
    eps_warmup_ratio: float = field(
        default=0.0,
        metadata={"help": "Share of training over which eps and standard_eps grow from 0, in [0, 1]."},
    )
    eval_attack_steps: int = field(
        default=20, metadata={"help": "PGD steps of the evaluation during training; 0 evaluates clean accuracy only."}
    )

    # Images
    crop_padding: int = field(
        default=4, metadata={"help": "Random crops: pixels of zero padding on each side; 0 = none."}
    )
    horizontal_flip: bool = field(default=True, metadata={"help": "Random horizontal flips."})
    cutmix_prob: float = field(
        default=0.0,
        metadata={"help": "CutMix: share of images that get a piece of another."},
    )

    # Speed
    step_graph: str = field(
        default="auto",
        metadata={
            "help": "Record the training step as one CUDA graph and replay it: auto (where it can be; else one line "
            "of the log says why not) or off.",
            "choices": STEP_GRAPHS,
        },
    )
    channels_last: bool = field(
        default=False, metadata={"help": "Train in the channels_last memory format: faster for convolutions."}
    )

    # Weights
    awp_gamma: float = field(
        default=0.0,
        metadata={
            "help": "AWP (Wu et al. 2020): gradient and logged losses are those at the "
            "worst weights within this share of their norm (paper: 0.005). One more pass."
        },
    )
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "Decay of the moving average of the weights, in [0, 1); 0 = none. Warms up: 1 - step^(-2/3). "
            "Saved unless the trained weights are better by a point."
        },
    )

    # Numbers that are not finite
    on_nan_loss: str = field(
        default="stop",
        metadata={
            "help": "A loss, term or gradient that is NaN or infinite: stop (at the next log or checkpoint, naming "
            "step and terms) or skip that update on all processes (costs a wait for the device in each step).",
            "choices": POLICIES,
        },
    )
    max_skipped_steps: int = field(
        default=10, metadata={"help": "With on_nan_loss=skip: stop after so many skipped updates in a row, >= 0."}
    )

    # Changed defaults of the parent
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Leave NaN and infinite losses out of the log; waits for the device each step. On with "
            "on_nan_loss=skip."
        },
    )
    hub_strategy: str = field(
        default="end", metadata={"help": "When to push to the Hub: end. Checkpoints hold pickles and are never sent."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop dataset columns that the model's forward does not take."}
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "Keys of the batch that hold labels."}
    )
    logging_steps: float = field(
        default=50, metadata={"help": "Log every so many steps; a number below 1 is a share of the training steps."}
    )

    def __post_init__(self) -> None:
        self._read_numbers()
        self._check_objective()
        self._check_attack()
        self._check_measuring()
        self._check_parent()
        if self.on_nan_loss == "skip":  # a loss that is skipped would make the sum that the next log tells NaN
            self.logging_nan_inf_filter = True
        self._choose_device()
        super().__post_init__()
        if (visible := super().n_gpu) > 1:
            logger.warning(
                f"Training on one of {visible} GPUs: a process uses one. For all of them: accelerate launch "
                f"--num_processes {visible}"
            )

    # Overridden: the parent counts all that one process sees, and the Trainer would copy the model to each of them by
    # nn.DataParallel. Its copies have no parameters, so an attack and the routers' loss find nothing there.
    @property
    def n_gpu(self) -> int:
        """GPUs that this process uses: one at most."""
        return min(super().n_gpu, 1)

    def _choose_device(self) -> None:
        """Leave accelerators alone that there are not, or that cannot do what an attack needs."""
        if not torch.accelerator.is_available():
            self.use_cpu = True  # lets bf16 recipes run on a CPU too
        if not self.use_cpu and torch.backends.mps.is_available():
            self.use_cpu = True
            logger.warning("Training on the CPU: attacks need double precision, which this GPU (mps) does not have.")

    def __getstate__(self) -> dict[str, Any]:
        """Content of a pickle: all but the access token."""
        return {**self.__dict__, "hub_token": None}

    def _read_numbers(self) -> None:
        """Turn fractions into numbers, and refuse what is no number."""
        for name in ("eps", "standard_eps", "certify_radius", "attack_step_size"):
            if getattr(self, name) is not None or name != "attack_step_size":
                try:
                    setattr(self, name, PixelValue(getattr(self, name)))
                except ValueError as error:
                    raise ValueError(f"{name}={error}") from error
        for name in (*COUNTS, *WEIGHTS, *SHARES):
            kinds = int if name in COUNTS else (int, float)
            self._check(name, isinstance(getattr(self, name), kinds), "an integer" if name in COUNTS else "a number")

    def _check_objective(self) -> None:
        """Refuse a method that is not known, and weights that are out of range or of another method."""
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is not one of {', '.join(map(repr, METHODS))}.")
        for name in WEIGHTS:
            self._check(name, 0 <= getattr(self, name) < math.inf, ">= 0 and finite")
        self._check("certify_radius", 0 < self.certify_radius < math.inf, "finite and > 0, in [0, 1] pixel units")
        self._check("train_alpha", 0 <= self.train_alpha <= 1, "in [0, 1]")
        learns = self.method != "jtdmoe" or self.train_alpha < 1
        self._check("train_alpha", learns, "below 1: F_S would get no gradient")
        self._check("clean_weight", 0 <= self.clean_weight < 1, "in [0, 1)")
        fits = self.clean_weight == 0 or self.method == "at"
        self._check("clean_weight", fits, f"0 with method={self.method!r}: it is for method='at'")
        self._check("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")
        if (rate := self.standard_learning_rate) is not None:
            self._check("standard_learning_rate", isinstance(rate, (int, float)), "a number, or left out")
            self._check("standard_learning_rate", 0 <= rate < math.inf, ">= 0 and finite")
            self._check("standard_learning_rate", self.method == "jtdmoe", "left out where method is not jtdmoe")

    def _check_attack(self) -> None:
        """Refuse attacks that there are not, and radii and steps that are out of range."""
        check_eps(self.eps, self.norm)
        if self.training_attack not in TRAINING_ATTACKS:
            allowed = ", ".join(map(repr, TRAINING_ATTACKS))
            raise ValueError(f"training_attack={self.training_attack!r} is not one of {allowed}.")
        takes_norm = self.training_attack == "pgd" or self.norm == "linf"
        self._check("norm", takes_norm, "'linf' with training_attack='nfgsm'")
        self._check("standard_eps", 0 <= self.standard_eps <= self.eps, f"in [0, eps={self.eps!r}]")
        self._check("eps_warmup_ratio", 0 <= self.eps_warmup_ratio <= 1, "in [0, 1]")
        self._check("attack_steps", self.attack_steps >= 1, "at least 1")
        step_size = self.attack_step_size
        self._check("attack_step_size", step_size is None or step_size > 0, "> 0, in the unit of eps")

    def _check_measuring(self) -> None:
        """Refuse settings of images, step graph, bad numbers and evaluations that are out of range."""
        self._check("crop_padding", self.crop_padding >= 0, ">= 0")
        self._check("cutmix_prob", 0 <= self.cutmix_prob <= 1, "in [0, 1]")
        fits = self.cutmix_prob == 0 or self.method in CUTMIX_METHODS
        self._check("cutmix_prob", fits, f"0 with method={self.method!r}: it is for {', '.join(CUTMIX_METHODS)}")
        self._check("step_graph", self.step_graph in STEP_GRAPHS, f"one of {', '.join(STEP_GRAPHS)}")
        self._check("on_nan_loss", self.on_nan_loss in POLICIES, f"one of {', '.join(POLICIES)}")
        self._check("max_skipped_steps", self.max_skipped_steps >= 0, ">= 0")
        self._check("eval_attack_steps", self.eval_attack_steps >= 0, ">= 0")
        metric = str(self.metric_for_best_model).removeprefix("eval_")
        if self.eval_attack_steps == 0 and metric in ("ra", "sa_ra_mean"):
            raise ValueError(
                f"eval_attack_steps=0 measures no attacked images, which metric_for_best_model={metric!r} needs; give "
                "steps, or metric_for_best_model='sa'."
            )

    def _check_parent(self) -> None:
        """Refuse values of the parent's arguments on which a run would fail late, or train nothing."""
        for name in AT_LEAST_ONE:
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in NOT_NEGATIVE:
            self._check(name, 0 <= (getattr(self, name) or 0) < math.inf, ">= 0 and finite")
        for name in POSITIVE:
            self._check(name, 0 < getattr(self, name) < math.inf, "> 0 and finite")
        for name in BELOW_ONE:
            self._check(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name, (value, reason) in FIXED.items():
            self._check(name, getattr(self, name) == value, f"{value}: {reason}")
        self._check("max_steps", self.max_steps >= 1 or self.max_steps == -1, "at least 1, or -1 (as epochs say)")
        has_length = self.max_steps >= 1 or 0 < self.num_train_epochs < math.inf
        self._check("num_train_epochs", has_length, "> 0 and finite")
        every = self.eval_accumulation_steps
        self._check("eval_accumulation_steps", every is None or every >= 1, "at least 1, or left out")
        has_workers = self.dataloader_num_workers > 0
        for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
            self._check(name, has_workers or not getattr(self, name), "left out with dataloader_num_workers=0")

    def _check(self, name: str, valid: bool, allowed: str) -> None:
        if not valid:
            raise ValueError(f"{name}={getattr(self, name)!r} must be {allowed}.")

    def create_training_attack(self, eps_scale: float = 1.0) -> PGD | NFGSM:
        """The attack inside the objective: last iterate, random numbers of the global generator.

        Args:
            eps_scale: Factor on eps and step size, for the warm-up.
        """
        objective, shard = "kl" if self.method == "trades" else "ce", (self.process_index, self.world_size)
        if self.training_attack == "nfgsm":
            return NFGSM(eps=self.eps * eps_scale, objective=objective, shard=shard)
        step_size = 2.5 * self.eps / self.attack_steps if self.attack_step_size is None else self.attack_step_size
        return PGD(
            eps=self.eps * eps_scale,
            steps=self.attack_steps,
            step_size=max(step_size * eps_scale, 1e-12),  # PGD refuses 0, which eps=0 makes
            norm=self.norm,
            objective=objective,
            keep_best=False,
            shard=shard,
        )

    def create_standard_attack(self, eps_scale: float = 1.0) -> PGD | NFGSM:
        """The one-step attack of radius `standard_eps` on the dual model in the upper level of JTDMoE.

        Args:
            eps_scale: Factor on the radius, for the warm-up.
        """
        shard, eps = (self.process_index, self.world_size), self.standard_eps * eps_scale
        if self.norm == "linf":
            return NFGSM(eps=eps, shard=shard)
        return PGD(eps=eps, steps=1, step_size=eps, norm=self.norm, keep_best=False, shard=shard)

    def evaluation_attack(self) -> PGD | None:
        """The attack of the evaluations during training: best iterate, its own seed; None where it is switched off."""
        if self.eval_attack_steps == 0:
            return None
        return PGD(eps=self.eps, steps=self.eval_attack_steps, norm=self.norm, seed=self.seed)


__all__ = ["METHODS", "WITHOUT_ATTACK", "PixelValue", "RobustTrainingArguments"]
