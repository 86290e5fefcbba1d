"""The AutoAttack union and its sanity flags (Croce & Hein 2020, https://arxiv.org/abs/2003.01690).

    result = autoattack(model, images, labels, eps=8 / 255)
    result.robust_accuracy, result.raised_flags, result.to_dict()

Four attacks run one after the other, each on the images that still stand: APGD on the cross-entropy, targeted APGD on
the difference of logits ratio, targeted FAB, and Square. An image is robust if its clean and all attacked versions are
classified correctly.
"""

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from .apgd import APGD, PassCounter, check_classes
from .attack_primitives import (
    Classifier,
    ce_objective,
    check_batch,
    check_eps,
    check_logits,
    frozen,
    project,
)
from .fab import FAB
from .square import Square

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
BACKENDS = ("hf_dualmoe", "torchattacks")

PROBE_IMAGES = 64  # of the first batch, for the sanity checks
RANDOM_TOLERANCE = 1e-4  # in units of the range of the logits; above what hardware does to equal inputs
ZERO_GRADIENT_SHARE = 0.1  # of the correctly classified probe images
SQUARE_SHARE = 0.01  # of all images, and at least two of them


@dataclass(frozen=True)
class Flag:
    """One sanity check: whether it was raised, and the numbers behind it in words."""

    raised: bool
    message: str


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
        state_file: Where to keep what is done (safetensors), after each batch. A later call with the same settings,
            images and model goes on from there; the batch size may differ.
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
    settings = {**common, "version": version, "budgets": VERSIONS[version], "backend": _backend_name(backend)}
    ids = torch.arange(len(images)) if ids is None else ids.cpu()
    if ids.shape != labels.shape:
        raise ValueError(f"ids has shape {tuple(ids.shape)}; expected one number per image, ({len(images)},).")
    with torch.inference_mode(False), frozen(model):
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


class _Run:
    """One evaluation: which images stand, which are pending in the present stage, and its file."""

    def __init__(self, model: Classifier, images: Tensor, labels: Tensor, ids: Tensor, settings: dict, state_file):
        self.model, self.images, self.labels, self.ids = model, images, labels, ids
        self.file = None if state_file is None else Path(state_file)
        self.counter = PassCounter(model)
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.device = images.device if parameter is None else parameter.device
        data = "" if self.file is None else _digest({"images": images, "labels": labels, "ids": ids})
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
            if self.state.weights != _weights_digest(self.model) or not self._same_outputs():
                raise ValueError(f"state_file={str(self.file)!r} belongs to another model, or the output is random.")
            return
        probe = min(PROBE_IMAGES, batch_size, len(self.images))
        # clones leave inference mode, if it was on
        images, labels = (x[:probe].clone().to(self.device) for x in (self.images, self.labels))
        self.state.weights = _weights_digest(self.model)
        self.probe_logits, flags = probe_model(self.counter, images, labels)
        self.state.flags = {name: asdict(flag) for name, flag in flags.items()}

    def _same_outputs(self) -> bool:
        """Whether the first images still get the logits (B, C) that they got before the attacks."""
        with torch.no_grad():
            logits = self.counter(self.images[: len(self.probe_logits)].to(self.device)).cpu()
        same_shape = logits.shape == self.probe_logits.shape
        return same_shape and bool((logits - self.probe_logits).abs().max() <= _rounding(self.probe_logits))

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

    def result(self, settings: dict) -> AutoAttackResult:
        """The result, with the checks that look back on the whole run."""
        flags = {name: Flag(**flag) for name, flag in self.state.flags.items()}
        flags["square_stronger"] = _square_flag(self.state.accuracy, len(self.robust))
        if _weights_digest(self.model) != self.state.weights:
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

    def _save(self) -> None:
        """Write the state beside its file and move it there, so that a kill never leaves half a file."""
        if self.file is None:
            return
        broken = self.clean_correct & ~self.robust
        tensors = {name: getattr(self, name) for name in ("robust", "clean_correct", "pending", "probe_logits")}
        tensors["broken_images"] = self.adversarial[broken.to(self.adversarial.device)]
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
        broken = (self.clean_correct & ~self.robust).to(self.adversarial.device)
        self.adversarial[broken] = tensors["broken_images"].to(self.adversarial)


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _weights_digest(model: Classifier) -> str:
    """Digest of all parameters and buffers; empty for a callable that is no module."""
    if not isinstance(model, nn.Module):
        return ""
    return _digest({**dict(model.named_parameters()), **dict(model.named_buffers())})


# --- sanity checks ---------------------------------------------------------------------------------------------------


def probe_model(model: PassCounter, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Flag]]:
    """Look at a model on a few images before they are attacked.

    Args:
        model: Classifier in eval mode without parameter gradients (`frozen`).
        images: (B, C, H, W) floats in [0, 1].
        labels: (B,) int64.

    Returns:
        Logits (B, C) on the CPU, and the flags that need no attack.

    Raises:
        ValueError: Labels and logits do not go together, or no gradient flows from the logits to the images.
    """
    graph = []  # stays empty under no_grad, unless the model turns gradients on by itself

    def note(tensor: Tensor) -> Tensor:
        graph.append(tensor.shape)
        return tensor

    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits, *others = [model(images) for _ in range(4)]
    check_logits(logits, labels)
    difference = max((other - logits).abs().max().item() for other in others)
    probable = bool((logits >= 0).all() and ((logits.sum(dim=1) - 1).abs() < 1e-3).all())
    found = ["it computes gradients while it predicts"] if graph else []
    found += ["a module puts itself in train mode"] if any(m.training for m in model.modules()) else []
    flags = {
        "random_output": Flag(
            difference > _rounding(logits), f"predictions of the same images differ by up to {difference:.3g}"
        ),
        "probability_output": Flag(
            probable,
            f"outputs {'are' if probable else 'are not'} probabilities (expected: logits or log-probabilities)",
        ),
        "zero_gradients": _gradient_flag(model, images, labels, logits),
        "changing_model": Flag(bool(found), " and ".join(found) or "parameters and buffers stayed the same"),
    }
    return logits.cpu(), flags


def _gradient_flag(model: PassCounter, images: Tensor, labels: Tensor, logits: Tensor) -> Flag:
    images = images.detach().requires_grad_(True)
    with torch.enable_grad():
        loss = ce_objective(model(images), labels).sum()
    gradient = torch.autograd.grad(loss, images, allow_unused=True)[0] if loss.requires_grad else None
    if gradient is None:
        raise ValueError(
            "no gradient flows from the model's output to its images; only Square can attack such a model."
        )
    gradient = gradient[logits.argmax(dim=1) == labels].flatten(1)
    useless = int(((gradient == 0) | ~torch.isfinite(gradient)).all(dim=1).sum())
    raised = useless > ZERO_GRADIENT_SHARE * len(gradient)
    return Flag(raised, f"{useless} of {len(gradient)} cross-entropy gradients are zero or not finite")


def _square_flag(accuracy: dict[str, float], count: int) -> Flag:
    """Square may find what gradients missed in no more than 1 % of the images, or in one image."""
    before, after = list(accuracy.values())[-2:]
    found = round((before - after) * count)
    raised = found >= 2 and found > SQUARE_SHARE * count
    return Flag(raised, f"Square broke {found} of {count} images that the gradient attacks had left standing")


def _rounding(logits: Tensor) -> float:
    """The largest difference between two predictions (B, C) of the same images that rounding explains."""
    return RANDOM_TOLERANCE * max((logits.max() - logits.min()).item(), 1e-12)


# --- backends --------------------------------------------------------------------------------------------------------


def make_attack(
    name: str, budget: dict[str, int], *, backend: str = "hf_dualmoe", eps: float, norm: str = "linf", seed: int = 0
) -> Callable:
    """One attack of the union: a callable with the contract of `PGD.__call__`.

    Args:
        name: "apgd-ce", "apgd-t", "fab-t" or "square".
        budget: Its entry in a version of `VERSIONS`.
        backend, eps, norm, seed: As in `autoattack`.
    """
    if backend == "torchattacks":
        return _torchattacks_attack(name, budget, eps=eps, norm=norm, seed=seed)
    if name == "fab-t":
        return FAB(**budget, eps=eps, norm=norm)
    if name == "square":
        return Square(**budget, eps=eps, norm=norm, seed=seed)
    objective = {"apgd-ce": "ce", "apgd-t": "dlr_targeted"}[name]
    return APGD(objective=objective, **budget, eps=eps, norm=norm, seed=seed)


def _torchattacks_attack(name: str, budget: dict[str, int], *, eps: float, norm: str, seed: int) -> Callable:
    """An attack of torchattacks behind our call contract."""
    try:
        import torchattacks
    except ImportError as error:
        raise ImportError("backend='torchattacks' needs it installed: pip install torchattacks") from error
    common = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps, "seed": seed}

    def attack(model: nn.Module, images: Tensor, labels: Tensor, *, ids: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            classes = model(images[:1]).shape[1]
        targets = {"n_classes": min(classes, budget.get("target_classes", 9) + 1)}
        made = {
            "apgd-ce": lambda: torchattacks.APGD(model, steps=budget["steps"], loss="ce", **common),
            "apgd-t": lambda: torchattacks.APGDT(model, steps=budget["steps"], **targets, **common),
            "fab-t": lambda: torchattacks.FAB(model, steps=budget["steps"], multi_targeted=True, **targets, **common),
            "square": lambda: torchattacks.Square(model, n_queries=budget["queries"], **common),
        }[name]()
        made.set_device(images.device)
        with torch.enable_grad(), torch.random.fork_rng():
            return made(images, labels).detach()

    return attack


def _backend_name(backend: str) -> str:
    from . import __version__  # here, since the package may import this module first

    return f"{backend} {__version__ if backend == 'hf_dualmoe' else metadata.version(backend)}"


__all__ = ["VERSIONS", "AutoAttackResult", "Flag", "autoattack", "make_attack"]
