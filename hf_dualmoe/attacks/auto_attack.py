"""The AutoAttack union and its sanity flags (Croce & Hein 2020, https://arxiv.org/abs/2003.01690).

    result = autoattack(model, images, labels, eps=8 / 255)
    result.robust_accuracy, result.raised_flags, result.to_dict()

Four attacks run one after the other, each on the images that still stand: APGD on the cross-entropy, targeted APGD on
the difference of logits ratio, targeted FAB, and Square. An image is robust if its clean and all attacked versions are
classified correctly.
"""

import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from .apgd import PassCounter, check_classes
from .backends import BACKENDS, backend_name, make_attack
from .flags import Flag, digest, probe_model, rounding, square_flag, weights_digest
from .precision import full_precision
from .steps import (
    Classifier,
    check_batch,
    check_eps,
    check_logits,
    frozen,
    project,
)

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

PROBE_IMAGES = 64  # of the first batch, for the sanity checks


@dataclass
class AutoAttackResult:
    """Result of `autoattack` on N images.

    Args:
        adversarial: (N, C, H, W) images: a misclassified version where one was found, else the clean image.
        robust: (N,) bool: classified correctly when clean and under every attack.
        clean_correct: (N,) bool: classified correctly when clean.
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
        seconds: Wall time over all sessions of a resumed run.
    """

    adversarial: Tensor
    robust: Tensor
    clean_correct: Tensor
    accuracy: dict[str, float]
    passes: dict[str, float]
    flags: dict[str, Flag]
    version: str
    budgets: dict[str, dict[str, int]]
    backend: str
    eps: float
    norm: str
    seed: int
    seconds: float

    @property
    def name(self) -> str:
        """What was run, in words that do not claim more than it was."""
        union = ", ".join(self.budgets)
        if self.version == "standard":
            return f"AutoAttack standard ({union})"
        return f"AutoAttack-style union, version {self.version!r}, not AutoAttack standard ({union})"

    @property
    def clean_accuracy(self) -> float:
        """Share of images classified correctly when clean, in [0, 1]."""
        return self.clean_correct.double().mean().item()

    @property
    def robust_accuracy(self) -> float:
        """Share of images that stand after all attacks, in [0, 1]."""
        return self.robust.double().mean().item()

    @property
    def raised_flags(self) -> dict[str, str]:
        """Names and messages of the sanity checks that were raised; robust accuracy is in doubt if there are any."""
        return {name: flag.message for name, flag in self.flags.items() if flag.raised}

    def to_dict(self) -> dict:
        """Everything but the tensors, fit for JSON."""
        tensors = ("adversarial", "robust", "clean_correct")
        kept = {name: value for name, value in vars(self).items() if name not in tensors and name != "flags"}
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
    for name, value, allowed in (("version", version, VERSIONS), ("backend", backend, BACKENDS)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be at least 1.")
    if isinstance(model, nn.Module) and any(module.training for module in model.modules()):
        warnings.warn("The model is in train mode; it is evaluated in eval mode.", stacklevel=2)
    common = {"backend": backend, "eps": eps, "norm": norm, "seed": seed}
    stages = {name: make_attack(name, budget, **common) for name, budget in VERSIONS[version].items()}
    settings = {**common, "version": version, "budgets": VERSIONS[version], "backend": backend_name(backend)}
    ids = torch.arange(len(images)) if ids is None else ids.cpu()
    if ids.shape != labels.shape:
        raise ValueError(f"ids has shape {tuple(ids.shape)}; expected one number per image, ({len(images)},).")
    with torch.inference_mode(False), full_precision(), frozen(model):
        run = _Run(model, images, labels, ids, settings, state_file)
        run.prepare(batch_size)
        if "apgd-t" in stages:
            check_classes(run.probe_logits, 4, f"version={version!r} (version='few_classes' does not)")
        run.attack(stages, batch_size, progress)
        return run.result(settings)


# --- the run ---------------------------------------------------------------------------------------------------------


@dataclass
class _State:
    """What a resumed run needs beside the tensors; kept as JSON."""

    key: dict
    weights: str = ""
    stage: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)
    flags: dict[str, dict] = field(default_factory=dict)
    forward_rows: int = 0
    gradient_rows: int = 0
    seconds: float = 0.0
    broken: int = 0  # images in the file of broken images; what lies behind them was never finished


def remove_state(state_file: str | os.PathLike) -> None:
    """Delete what `autoattack` kept, where it is."""
    for path in (Path(state_file), _images_file(Path(state_file))):
        path.unlink(missing_ok=True)


def _images_file(state_file: Path) -> Path:
    return state_file.with_name(state_file.name + ".images")


class _Run:
    """One evaluation: which images stand, which are pending in the present stage, and its file."""

    def __init__(self, model: Classifier, images: Tensor, labels: Tensor, ids: Tensor, settings: dict, state_file):
        self.model, self.images, self.labels, self.ids = model, images, labels, ids
        self.file = None if state_file is None else Path(state_file)
        self.counter = PassCounter(model)
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.device = images.device if parameter is None else parameter.device
        data = "" if self.file is None else digest({"images": images, "labels": labels, "ids": ids})
        self.state = _State(key={**settings, "data": data})
        self.adversarial = images.detach().clone()
        self.robust = torch.ones(len(images), dtype=torch.bool)
        self.clean_correct, self.pending = self.robust.clone(), self.robust.clone()
        self.probe_logits = torch.empty(0)
        self.started = time.perf_counter()

    def prepare(self, batch_size: int) -> None:
        """Take up the state file if there is one, else check the model's sanity on a few images."""
        if self.file is not None and self.file.exists():
            self._load()
            # weights alone would not tell two settings of one model apart, such as the alpha of a dual model
            if self.state.weights != weights_digest(self.model) or not self._same_outputs():
                raise ValueError(f"state_file={str(self.file)!r} belongs to another model, or the output is random.")
            return
        if self.file is not None:
            _images_file(self.file).write_bytes(b"")
        probe = min(PROBE_IMAGES, batch_size, len(self.images))
        # clones leave inference mode, if it was on
        images, labels = (x[:probe].clone().to(self.device) for x in (self.images, self.labels))
        self.state.weights = weights_digest(self.model)
        self.probe_logits, flags = probe_model(self.counter, images, labels)
        self.state.flags = {name: asdict(flag) for name, flag in flags.items()}

    def _same_outputs(self) -> bool:
        """Whether the first images still get the logits (B, C) that they got before the attacks."""
        with torch.no_grad():
            logits = self.counter(self.images[: len(self.probe_logits)].to(self.device)).cpu()
        same_shape = logits.shape == self.probe_logits.shape
        return same_shape and bool((logits - self.probe_logits).abs().max() <= rounding(self.probe_logits))

    def attack(self, stages: dict[str, Callable], batch_size: int, progress: bool) -> None:
        """Run the stages that are left, batch by batch."""
        names = ["clean", *stages]
        while self.state.stage < len(names):
            name = names[self.state.stage]
            total = int(self.pending.sum())
            with tqdm(total=total, desc=name, unit="img", disable=not progress) as bar:
                while self.pending.any():
                    rows = self.pending.nonzero().squeeze(1)[:batch_size]
                    self._attack_batch(name, stages.get(name), rows)
                    self._save()
                    bar.update(len(rows))
                    bar.set_postfix(robust=f"{self.robust.double().mean():.2%}")
            self.state.accuracy[name] = self.robust.double().mean().item()
            if name == "clean":
                self.clean_correct = self.robust.clone()
            self.state.stage, self.pending = self.state.stage + 1, self.robust.clone()
        self._save()

    def _attack_batch(self, name: str, attack: Callable | None, rows: Tensor) -> None:
        """Attack the images at `rows`; what counts as broken is a fresh look at the attacked images."""
        at = rows.to(self.images.device)
        images, labels = self.images[at].to(self.device), self.labels[at].to(self.device)
        attacked = images
        if attack is not None:
            attacked = attack(self.counter, images, labels, ids=self.ids[rows])
            attacked = project(attacked, images, self.state.key["eps"], self.state.key["norm"])
        with torch.no_grad():
            logits = self.counter(attacked)
        if attack is None:
            check_logits(logits, labels)
        elif not torch.isfinite(logits).all():
            raise ValueError(f"model returned logits that are NaN or infinite on images attacked by {name}.")
        broken = (logits.argmax(dim=1) != labels).cpu()
        self.robust[rows[broken]] = False
        self.pending[rows] = False
        if broken.any():
            self.adversarial[at[broken.to(at.device)]] = attacked[broken.to(self.device)].to(self.adversarial)
            self._append(rows[broken] if attack is not None else rows[:0])

    def result(self, settings: dict) -> AutoAttackResult:
        """The result, with the checks that look back on the whole run."""
        flags = {name: Flag(**flag) for name, flag in self.state.flags.items()}
        flags["square_stronger"] = square_flag(self.state.accuracy, len(self.robust))
        if weights_digest(self.model) != self.state.weights:
            flags["changing_model"] = Flag(True, "parameters or buffers changed during the evaluation")
        elif not flags["random_output"].raised and not self._same_outputs():
            flags["changing_model"] = Flag(True, "predictions of the same images changed during the evaluation")
        state, count = self._count(), len(self.robust)
        passes = {"forward": state.forward_rows / count, "gradient": state.gradient_rows / count}
        return AutoAttackResult(
            *(self.adversarial, self.robust, self.clean_correct, dict(state.accuracy), passes, flags),
            **settings,
            seconds=state.seconds,
        )

    def _count(self) -> _State:
        """Move the passes and the time since the last call into the state."""
        now = time.perf_counter()
        self.state.seconds += now - self.started
        self.state.forward_rows += self.counter.forward_rows
        self.state.gradient_rows += self.counter.gradient_rows
        self.started, self.counter.forward_rows, self.counter.gradient_rows = now, 0, 0
        return self.state

    def _append(self, rows: Tensor) -> None:
        """Write the broken images at `rows` behind those of before, each once: the state alone is written anew."""
        if self.file is None:
            return
        found = self.adversarial[rows.to(self.adversarial.device)].cpu()
        records = np.empty(len(rows), self._record)
        records["row"], records["image"] = rows.numpy(), found.flatten(1).contiguous().view(torch.uint8).numpy()
        with open(_images_file(self.file), "r+b") as file:
            file.seek(self.state.broken * self._record.itemsize)
            file.write(records.tobytes())
        self.state.broken += len(rows)

    @property
    def _record(self) -> np.dtype:
        """One entry in the file of broken images."""
        image = self.adversarial[0]
        return np.dtype([("row", "<i8"), ("image", np.uint8, (image.numel() * image.element_size(),))])

    def _save(self) -> None:
        """Write the state beside its file and move it there, so that a kill never leaves half a file."""
        if self.file is None:
            return
        tensors = {name: getattr(self, name) for name in ("robust", "clean_correct", "pending", "probe_logits")}
        partial = self.file.with_name(self.file.name + ".partial")
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            partial,
            metadata={"autoattack": json.dumps(asdict(self._count()))},
        )
        os.replace(partial, self.file)

    def _load(self) -> None:
        with safe_open(self.file, framework="pt") as file:
            state = _State(**json.loads((file.metadata() or {}).get("autoattack", '{"key": {}}')))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        differing = [name for name, value in self.state.key.items() if state.key.get(name) != value]
        if differing:
            found = ", ".join(
                f"{name}: {state.key.get(name)!r} there, {self.state.key[name]!r} here" for name in differing
            )
            raise ValueError(f"state_file={str(self.file)!r} belongs to another run ({found}); give another file.")
        self.state = state
        self.robust, self.clean_correct, self.pending = (tensors[n] for n in ("robust", "clean_correct", "pending"))
        self.probe_logits = tensors["probe_logits"]
        kept = _images_file(self.file)
        if not kept.is_file() or kept.stat().st_size < state.broken * self._record.itemsize:
            raise ValueError(f"state_file={str(self.file)!r} has lost images that belong in {kept.name}; delete both.")
        records = np.fromfile(kept, self._record, state.broken)
        rows = torch.from_numpy(records["row"].astype(np.int64)).to(self.adversarial.device)
        images = torch.from_numpy(np.ascontiguousarray(records["image"])).view(self.adversarial.dtype)
        self.adversarial[rows] = images.view(len(rows), *self.adversarial.shape[1:]).to(self.adversarial.device)


__all__ = ["BACKENDS", "VERSIONS", "AutoAttackResult", "Flag", "autoattack", "make_attack", "remove_state"]
