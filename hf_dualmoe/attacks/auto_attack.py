"""The AutoAttack union and its sanity flags (Croce & Hein 2020, https://arxiv.org/abs/2003.01690).

    result = autoattack(model, images, labels, eps=8 / 255)
    result.robust_accuracy, result.raised_flags, result.to_dict()

Four attacks run one after the other, each on the images that still stand: APGD on the cross-entropy, targeted APGD on
the difference of logits ratio, targeted FAB, and Square. An image is robust if its clean and all attacked versions are
classified correctly.
"""

import os
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .apgd import check_classes
from .auto_attack_run import DTYPES, AutoAttackRun
from .backends import BACKENDS, backend_name, make_attack
from .base import Classifier, check_batch, check_choice, check_counts, check_eps, frozen, numbered, share
from .flags import Flag
from .kept_state import remove_state
from .precision import full_precision

_FULL = {
    "apgd-ce": {"steps": 100},
    "apgd-t": {"steps": 100, "target_classes": 9},
    "fab-t": {"steps": 100, "target_classes": 9},
    "square": {"queries": 5000},
}
VERSIONS = {
    "standard": _FULL,
    "few_classes": {name: budget for name, budget in _FULL.items() if name != "apgd-t"},  # works from 2 classes on
    "fast": {"apgd-ce": {"steps": 20}, "apgd-t": {"steps": 20, "target_classes": 3}, "square": {"queries": 200}},
}


@dataclass
class AutoAttackResult:
    """Result of `autoattack` on N images.

    Args:
        adversarial: (N, C, H, W) images: a misclassified version where one was found, else the clean image.
        robust: (N,) bool: classified correctly when clean and under every attack.
        clean_correct: (N,) bool: classified correctly when clean.
        broken_by: (N,) int64: number, in the order of `accuracy`, of the attack that broke an image; 0 where it is
            wrong when clean, -1 where it stands.
        accuracy: Share of all N images that stand after "clean" and after each attack, in [0, 1].
        passes: Mean "forward" and "gradient" passes per image over all N, sanity checks included.
        flags: The five sanity checks: "random_output", "probability_output", "zero_gradients", "square_stronger",
            "changing_model".
        version: Key of `VERSIONS`.
        budgets: Attack -> its budget, as run.
        backend: The implementation that made the numbers, with its version.
        eps: Radius in [0, 1] pixel units.
        norm: "linf" or "l2".
        seed: Seed.
        attack_dtype: Precision of the search, "fp32" or "bf16".
        sources: After a search in half precision, numbers of images. "confirmed": broken by what it found, as the fp32
            model confirmed; "again_in_fp32": fell in half precision alone, and then to the same attack in fp32;
            "survivors_in_fp32": withstood all that, and fell to the last attack, in fp32; "not_confirmed": stand,
            though they fell in half precision. The first three add up to all that were broken. {} for "fp32".
        seconds: Wall time over all sessions of a resumed run.
    """

    adversarial: Tensor
    robust: Tensor
    clean_correct: Tensor
    broken_by: Tensor
    accuracy: dict[str, float]
    passes: dict[str, float]
    flags: dict[str, Flag]
    version: str
    budgets: dict[str, dict[str, int]]
    backend: str
    eps: float
    norm: str
    seed: int
    attack_dtype: str
    sources: dict[str, int]
    seconds: float

    @property
    def name(self) -> str:
        """What was run, claiming no more than that."""
        union, search = ", ".join(self.budgets), ""
        if self.attack_dtype != "fp32":
            last = list(self.accuracy)[-1]
            search = f", searched in {self.attack_dtype}; each success confirmed in fp32, survivors attacked by {last}"
        if self.version == "standard":
            return f"AutoAttack standard ({union}){search}"
        return f"AutoAttack-style union, version {self.version!r}, not AutoAttack standard ({union}){search}"

    @property
    def clean_accuracy(self) -> float:
        """Share of images classified correctly when clean, in [0, 1]."""
        return share(self.clean_correct)

    @property
    def robust_accuracy(self) -> float:
        """Share of images that stand after all attacks, in [0, 1]."""
        return share(self.robust)

    @property
    def raised_flags(self) -> dict[str, str]:
        """Names and messages of the sanity checks that were raised; robust accuracy is in doubt if there are any."""
        return {name: flag.message for name, flag in self.flags.items() if flag.raised}

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors, fit for JSON."""
        kept = {name: value for name, value in vars(self).items() if not isinstance(value, Tensor)}
        summary = {"clean_accuracy": self.clean_accuracy, "robust_accuracy": self.robust_accuracy}
        flags = {name: asdict(flag) for name, flag in self.flags.items()}
        return {"name": self.name, "num_images": len(self.robust), **summary, **kept, "flags": flags}


def autoattack(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    version: str = "standard",
    batch_size: int = 128,
    seed: int = 0,
    ids: Tensor | None = None,
    attack_dtype: str = "fp32",
    state_file: str | os.PathLike | None = None,
    progress: bool = True,
    backend: str = "hf_dualmoe",
) -> AutoAttackResult:
    """Run the AutoAttack union.

    Args:
        model: Callable from images to logits (B, C) or to an output with `logits`. A module is evaluated in eval mode,
            on the device of its parameters, and comes back as it was.
        images: (N, C, H, W) floats in [0, 1].
        labels: (N,) int64, the right classes.
        eps: Radius in [0, 1] pixel units.
        norm: "linf" or "l2".
        version: "standard" (the published union and budgets; at least 4 classes), "few_classes" (without the targeted
            APGD) or "fast" (small budgets and no FAB, for CPUs; not comparable with published numbers).
        batch_size: Images per batch; does not change the result.
        seed: Of the random starts and of Square.
        ids: (N,) int64 numbers of the images in their dataset, so that a subset gets the noise of the whole; None = 0
            .. N-1.
        attack_dtype: "fp32", or "bf16" to search in half precision, which is faster on GPUs with tensor cores and on
            CPUs with AMX. An image counts as broken only where the fp32 model is wrong on what was found. One that
            falls in half precision alone is attacked by the same attack in fp32, and what survives all of them by a
            last one in fp32, see `final_attack`.
        state_file: Where to keep what is done (safetensors), after each batch; broken images go to the end of a file
            of the same name with ".images" behind. A later call with the same settings, images and model goes on from
            there; the batch size may differ. See `remove_state`.
        progress: Show a progress bar with the running robust accuracy.
        backend: "hf_dualmoe", or "torchattacks" for an installed torchattacks, with the same budgets (its own
            `AutoAttack` takes 10 instead of 100 steps) and with noise that depends on the batches.

    Raises:
        ValueError: A setting, image or label is out of range, the classes are too few, the model returns NaN or gives
            no input gradients, or `state_file` belongs to something else.
        ImportError: torchattacks is asked for and not installed.
    """
    check_eps(eps, norm)
    check_batch(images, labels)
    check_choice("version", version, VERSIONS)
    check_choice("backend", backend, BACKENDS)
    check_choice("attack_dtype", attack_dtype, DTYPES)
    check_counts({"batch_size": batch_size})
    if isinstance(model, nn.Module) and any(module.training for module in model.modules()):
        warnings.warn("The model is in train mode; it is evaluated in eval mode.", stacklevel=2)
    budgets = VERSIONS[version]
    attacks = {
        name: make_attack(name, budget, backend=backend, eps=eps, norm=norm, seed=seed)
        for name, budget in budgets.items()
    }
    settings = {"eps": eps, "norm": norm, "seed": seed, "version": version, "budgets": budgets}
    settings |= {"backend": backend_name(backend), "attack_dtype": attack_dtype}
    # inference tensors take no gradients, and TF32 would make numbers depend on the GPU
    with torch.inference_mode(False), full_precision(), frozen(model):
        run = AutoAttackRun(model, images, labels, numbered(ids, labels), settings, state_file)
        run.prepare(batch_size)
        if "apgd-t" in attacks:
            # z_4th of Eq. 7
            check_classes(run.probe_logits, 4, f"version={version!r} (version='few_classes' does not)")
        run.attack(attacks, batch_size, progress)
        return AutoAttackResult(
            adversarial=run.adversarial,
            robust=run.robust,
            clean_correct=run.broken_by != 0,
            broken_by=run.broken_by,
            accuracy=dict(run.progress.accuracy),
            flags=run.flags(),
            sources=run.sources(),
            passes=run.passes(),
            seconds=run.progress.seconds,
            **settings,
        )


__all__ = ["BACKENDS", "DTYPES", "VERSIONS", "AutoAttackResult", "Flag", "autoattack", "make_attack", "remove_state"]
