"""One run of the AutoAttack union: attack by attack, batch by batch, on the images that still stand."""

import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .apgd import APGD, PassCounter
from .base import Classifier, check_logits, device_of, share
from .flags import Flag, digest, probe_model, rounding, square_flag, weights_digest
from .folding import folded
from .kept_state import KeptState, Progress
from .steps import project

DTYPES = ("fp32", "bf16")
PROBE_IMAGES = 64  # of the first batch, for the sanity checks
STANDS = -1  # in `broken_by`

Strike = Callable[..., Tensor]  # called as an `Attack`


def final_attack(num_classes: int, eps: float, norm: str, seed: int) -> tuple[str, APGD]:
    """The attack in fp32 on what a search in half precision left standing, and its name.

    Targeted APGD, the strongest member of the union, on the three likeliest wrong classes: 300 gradient passes, where
    the whole union takes some 1,900 and 6,000 queries. Below four classes, for which it is not made, APGD on the
    difference of logits ratio or, for two, on the cross-entropy.
    """
    objective, short = {2: ("ce", "ce"), 3: ("dlr", "dlr")}.get(num_classes, ("dlr_targeted", "t"))
    targets = {"restarts": 3} if num_classes < 4 else {"target_classes": 3}
    # other starts than those of the search
    return f"apgd-{short} fp32", APGD(eps=eps, norm=norm, objective=objective, seed=seed + 1, steps=100, **targets)


class AutoAttackRun:
    """State of a run: which images stand, which are pending in this stage, and the files that keep it.

    Args:
        model: Classifier, frozen.
        images: (N, C, H, W) floats in [0, 1].
        labels: (N,) int64.
        ids: (N,) int64 on the CPU.
        settings: What the result depends on beside these, fit for JSON; `eps`, `norm`, `seed`, `attack_dtype` of them
            are used.
        state_file: Where to keep what is done; None = nowhere.

    Attributes:
        broken_by: (N,) int64 number of the stage that broke an image, 0 = wrong when clean; -1 where it stands.
        in_half: (N,) bool: what broke it was found in half precision.
        half_only: (N,) bool: once fell in half precision to an image that the fp32 model gets right.
    """

    def __init__(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        ids: Tensor,
        settings: Mapping[str, Any],
        state_file: str | os.PathLike | None,
    ):
        self.model, self.images, self.labels, self.ids, self.settings = model, images, labels, ids, settings
        self.counter, self.device = PassCounter(model), device_of(model, images.device)
        self.file = None if state_file is None else KeptState(state_file, images[0])
        data = "" if self.file is None else digest({"images": images, "labels": labels, "ids": ids})
        self.progress = Progress(key={**settings, "data": data})
        self.adversarial = images.detach().clone()
        self.broken_by = torch.full((len(images),), STANDS)
        self.in_half, self.half_only = (torch.zeros(len(images), dtype=torch.bool) for _ in range(2))
        self.pending = torch.ones(len(images), dtype=torch.bool)
        self.probe_logits = torch.empty(0)
        self.started = time.perf_counter()

    @property
    def robust(self) -> Tensor:
        """(N,) bool: right when clean and after all stages so far."""
        return self.broken_by == STANDS

    def prepare(self, batch_size: int) -> None:
        """Take up the state file if there is one, else check the model's sanity on a few images."""
        if self.file is not None and self.file.path.exists():
            self._load()
            # weights alone would not tell two settings of one model apart, such as the alpha of a dual model
            if self.progress.weights != weights_digest(self.model) or not self._same_outputs():
                raise ValueError(
                    f"state_file={str(self.file.path)!r} belongs to another model, or the output is random."
                )
            return
        if self.file is not None:
            self.file.begin()
        probe = min(PROBE_IMAGES, batch_size, len(self.images))
        # clones leave inference mode, if it was on
        images, labels = (x[:probe].clone().to(self.device) for x in (self.images, self.labels))
        self.progress.weights = weights_digest(self.model)
        self.probe_logits, flags = probe_model(self.counter, images, labels)
        self.progress.flags = {name: asdict(flag) for name, flag in flags.items()}

    @torch.no_grad()
    def _same_outputs(self) -> bool:
        """Whether the first images still get the logits (B, C) that they got before the attacks."""
        logits = self.counter(self.images[: len(self.probe_logits)].to(self.device)).cpu()
        same_shape = logits.shape == self.probe_logits.shape
        return same_shape and bool((logits - self.probe_logits).abs().max() <= rounding(self.probe_logits))

    def attack(self, attacks: Mapping[str, Strike], batch_size: int, progress: bool) -> None:
        """Look at the clean images, then run the attacks that are left, batch by batch."""
        attacks = dict(attacks)
        half = set(attacks) if self.settings["attack_dtype"] != "fp32" else set()
        if half:
            ball = self.settings["eps"], self.settings["norm"]
            name, final = final_attack(self.probe_logits.shape[1], *ball, self.settings["seed"])
            attacks[name] = final
        names = ["clean", *attacks]
        while self.progress.stage < len(names):
            name = names[self.progress.stage]
            with tqdm(total=int(self.pending.sum()), desc=name, unit="img", disable=not progress) as bar:
                while self.pending.any():
                    rows = self.pending.nonzero().squeeze(1)[:batch_size]
                    self._attack_batch(name, attacks.get(name), rows, name in half)
                    self._save()
                    bar.update(len(rows))
                    bar.set_postfix(robust=f"{share(self.robust):.2%}")
            self.progress.accuracy[name] = share(self.robust)
            self.progress.stage, self.pending = self.progress.stage + 1, self.robust.clone()
        self._save()

    @torch.no_grad()
    def _attack_batch(self, name: str, attack: Strike | None, rows: Tensor, half: bool) -> None:
        """Attack the images at `rows`; what counts as broken is a fresh look, in fp32, at the attacked images."""
        at = rows.to(self.images.device)
        images, labels, ids = self.images[at].to(self.device), self.labels[at].to(self.device), self.ids[rows]
        if attack is None:
            logits = self.counter(images)
            check_logits(logits, labels)
            self._note(rows, logits.argmax(dim=1) != labels, in_half=False)
            return
        found, broken, claimed = self._strike(name, attack, images, labels, ids, half)
        self._note(rows, broken, in_half=half, found=found)
        again = (claimed & ~broken).nonzero().squeeze(1)
        if half and len(again):  # the search left it where the half-precision model went wrong: too early
            left = rows[again.cpu()]
            self.half_only[left] = True
            found, broken, _ = self._strike(name, attack, images[again], labels[again], ids[again.cpu()], half=False)
            self._note(left, broken, in_half=False, found=found)

    def _strike(
        self, name: str, attack: Strike, images: Tensor, labels: Tensor, ids: Tensor, half: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attacked images (B, ...), and two masks (B,): wrong in fp32, wrong in the precision of the search."""
        # folded around search and claim alike, so that both see the same rounding; in fp32 an attack folds by itself
        with half_precision(self.device, half), folded(self.model if half else None, images):
            attacked = attack(self.counter, images, labels, ids=ids)
            # whatever the backend returned
            attacked = project(attacked, images, self.settings["eps"], self.settings["norm"])
            claimed = self.counter(attacked) if half else None
        logits = self.counter(attacked)
        if not torch.isfinite(logits).all():
            raise ValueError(f"model returned logits that are NaN or infinite on images attacked by {name}.")
        wrong = [(seen.argmax(dim=1) != labels) for seen in (logits, logits if claimed is None else claimed)]
        return attacked, wrong[0], wrong[1]

    def _note(self, rows: Tensor, broken: Tensor, in_half: bool, found: Tensor | None = None) -> None:
        """Note which of the images at `rows` (n,) are `broken` (n,), by which attacked images `found` (n, ...)."""
        kept = broken.cpu()
        fallen = rows[kept]
        self.pending[rows] = False
        self.broken_by[fallen] = self.progress.stage
        self.in_half[fallen] = in_half
        if found is None or len(fallen) == 0:
            return
        images = found[broken].to(self.adversarial)
        self.adversarial[fallen.to(images.device)] = images
        if self.file is not None:
            # before `_save`: the state names only what is written
            self.file.append(fallen, images, self.progress.broken)
            self.progress.broken += len(fallen)

    def flags(self) -> dict[str, Flag]:
        """The sanity checks, with those that look back on the whole run."""
        flags = {name: Flag(**flag) for name, flag in self.progress.flags.items()}
        flags["square_stronger"] = square_flag(self.progress.accuracy, len(self.images))
        if weights_digest(self.model) != self.progress.weights:
            flags["changing_model"] = Flag(True, "parameters or buffers changed during the evaluation")
        elif not flags["random_output"].raised and not self._same_outputs():
            flags["changing_model"] = Flag(True, "predictions of the same images changed during the evaluation")
        return flags

    def sources(self) -> dict[str, int]:
        """Numbers of images by the precision that broke them; {} for a search in fp32. See `AutoAttackResult`."""
        if self.settings["attack_dtype"] == "fp32":
            return {}
        attacked, final = self.broken_by > 0, len(self.progress.accuracy) - 1
        return {
            "confirmed": int((attacked & self.in_half).sum()),
            "again_in_fp32": int((attacked & ~self.in_half & (self.broken_by < final)).sum()),
            "survivors_in_fp32": int((self.broken_by == final).sum()),
            "not_confirmed": int((self.robust & self.half_only).sum()),
        }

    def passes(self) -> dict[str, float]:
        """Mean "forward" and "gradient" passes per image so far."""
        counted, total = self._count(), len(self.images)
        return {"forward": counted.forward_rows / total, "gradient": counted.gradient_rows / total}

    def _count(self) -> Progress:
        """Move the passes and the time since the last call into the progress."""
        now = time.perf_counter()
        self.progress.seconds += now - self.started
        self.progress.forward_rows += self.counter.forward_rows
        self.progress.gradient_rows += self.counter.gradient_rows
        self.started, self.counter.forward_rows, self.counter.gradient_rows = now, 0, 0
        return self.progress

    def _save(self) -> None:
        if self.file is not None:
            names = ("broken_by", "in_half", "half_only", "pending", "probe_logits")
            self.file.save(self._count(), {name: getattr(self, name) for name in names})

    def _load(self) -> None:
        self.progress, tensors = self.file.load(self.progress.key)
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
        rows, images = self.file.load_broken(self.progress.broken)
        self.adversarial[rows.to(self.adversarial.device)] = images.to(self.adversarial)


def half_precision(device: torch.device, on: bool) -> AbstractContextManager:
    """Run networks in bfloat16 where `on`: convolutions and products; images and weights stay what they are."""
    return torch.autocast(device.type, torch.bfloat16) if on else nullcontext()


__all__ = ["DTYPES", "STANDS", "AutoAttackRun", "final_attack"]
