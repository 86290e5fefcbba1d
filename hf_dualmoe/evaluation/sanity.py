"""Sanity checks that run with every evaluation: does a robust accuracy mean what it says?

    checks = run_sanity_checks(model, dataset, eps=8 / 255)
    suspicious(checks)  # reasons to doubt the numbers; empty for an honest model

An attack that fails may have met a robust model, or one that hides its gradients (Athalye et al. 2018,
https://arxiv.org/abs/1802.00420; Carlini et al. 2019, https://arxiv.org/abs/1902.06705). These checks tell the two
apart where they can; passing all of them proves nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..attacks.apgd import APGD, MIN_CLASSES, PassCounter
from ..attacks.base import check_batch, check_counts, check_eps, device_of, frozen, percent
from ..attacks.flags import Flag, NoGradientError, gradient_counts, probe_model, square_flag, weights_digest
from ..attacks.pgd import PGD
from ..attacks.precision import full_precision
from ..attacks.square import Square
from ..data.datasets import ImageTensorDataset, to_unit_range
from ..models.outputs import logits_of
from .metrics import wilson_interval

PROBE_IMAGES = 64  # looked at before anything is attacked
SINGLES = 16  # images that are shown one by one
LARGE_RADIUS = 0.5  # L-inf: every image can become plain grey; for L2 the length of that move, 0.5 * sqrt(C * H * W)
LARGE_RADIUS_RA = 5.0  # %; beyond this, or chance where that is less, images survive what should erase them
TOLERANCE = 1.0  # points by which a robust accuracy may rise, or one image where that is more: attacks are random
MAX_GAP = 7.0  # points between PGD and stronger attacks
BATCH_TOLERANCE = 1e-3  # in units of the range of the logits; convolutions round differently at another batch size


@dataclass(frozen=True)
class Check:
    """One sanity check.

    Args:
        passed: Whether it found nothing to doubt.
        message: The numbers behind it in words.
        values: The numbers; accuracies in %.
    """

    passed: bool
    message: str
    values: dict = field(default_factory=dict)


def suspicious(checks: Mapping[str, Check]) -> list[str]:
    """Reasons to doubt a robust accuracy, one "name: message" for each check that failed."""
    return [f"{name}: {check.message}" for name, check in checks.items() if not check.passed]


def run_sanity_checks(
    model: nn.Module,
    dataset: ImageTensorDataset,
    *,
    eps: float,
    norm: str = "linf",
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 256,
    num_images: int = 200,
    square_queries: int = 200,
    progress: bool = True,
) -> dict[str, Check]:
    """Run all checks on a sample of a dataset, in eval mode.

    Args:
        model: Classifier from images in [0, 1] to logits or an output with `logits`; comes back as it was.
        dataset: Images and labels.
        eps: Radius in [0, 1] pixel units, > 0.
        norm: "linf" or "l2".
        steps: PGD steps.
        seed: Of the choice of images and of the attacks.
        batch_size: Images per forward.
        num_images: Images to use, drawn with the class shares of the whole; all where there are fewer.
        square_queries: Queries per image of the gradient-free attack.
        progress: Whether to show a progress bar.

    Returns:
        Name -> check: "batch_size", "eps_monotone", "steps_monotone", "large_eps", "stronger_attack" (APGD on the
        cross-entropy and the difference of logits ratio, against PGD), and AutoAttack's "random_output",
        "probability_output", "zero_gradients", "square_stronger" and "changing_model". Where no gradient flows at all,
        checks that need one fail unrun.

    Raises:
        ValueError: A setting, image or label is out of range, or the model returns NaN.
    """
    check_eps(eps, norm)
    if not eps > 0:
        raise ValueError(f"eps={eps!r} must be > 0.")
    counts = {"steps": steps, "num_images": num_images, "batch_size": batch_size, "square_queries": square_queries}
    check_counts(counts)
    sample = dataset.take(num_images, seed=seed) if num_images < len(dataset) else dataset
    with torch.inference_mode(False), torch.no_grad(), full_precision(), frozen(model, seed=seed):
        run = _Run(model, sample, eps, norm, steps, seed, batch_size)
        before = weights_digest(model)
        checks = run.probe()
        gradients = run.gradient_checks(square_queries)
        for name, check in tqdm(gradients.items(), desc="sanity checks", disable=not progress, leave=False):
            try:
                checks[name] = check()
            except NoGradientError as error:
                checks[name] = Check(False, f"not run: {error}")
        checks["changing_model"] = run.unchanged(checks["changing_model"], before)
    return checks


# --- judgements: numbers -> check ------------------------------------------------------------------------------------


def monotone_check(accuracies: Sequence[float], grid: Sequence[float], name: str, num_images: int) -> Check:
    """RA (in %) must not rise along a growing `grid` of `name` by more than the tolerance, from any earlier point."""
    tolerance = max(TOLERANCE, 100 / num_images)  # one image may flip by chance
    lowest, rise = accuracies[0], 0.0
    for accuracy in accuracies[1:]:
        rise, lowest = max(rise, accuracy - lowest), min(lowest, accuracy)  # against the lowest so far, not the last
    shown = ", ".join(f"{a:.2f} % at {g:.4g}" for a, g in zip(accuracies, grid, strict=True))
    values = {name: list(grid), "ra": list(accuracies), "largest_rise": rise, "tolerance": tolerance}
    passed = rise <= tolerance + 1e-6  # percentages are rounded
    return Check(
        passed, f"RA {'falls' if passed else 'rises'} with {name}: {shown} (tolerance {tolerance:.2f})", values
    )


def gap_check(ra: float, stronger_ra: float) -> Check:
    """RA (in %) under PGD must be less than 7 points above that under a stronger attack."""
    message = f"RA is {ra:.2f} % under PGD and {stronger_ra:.2f} % under stronger attacks (allowed gap {MAX_GAP:g})"
    return Check(ra - stronger_ra < MAX_GAP, message, {"pgd": ra, "stronger": stronger_ra, "gap": ra - stronger_ra})


def large_radius_check(robust: Tensor, radius: float, num_classes: int) -> Check:
    """Hardly an image, of robust (N,) bool, may stand within a radius that erases it."""
    limit = min(LARGE_RADIUS_RA, 100 / num_classes)
    ra, (low, high) = percent(robust), wilson_interval(int(robust.sum()), len(robust))
    message = f"RA is {ra:.2f} % at eps = {radius:.4g} (95 % interval {low:.2f} to {high:.2f}; allowed {limit:g})"
    return Check(ra <= limit, message, {"ra": ra, "interval": [low, high], "eps": radius, "limit": limit})


def worst_case_check(worst_case: Mapping[str, float]) -> Check:
    """The RA (in %) of the "union" of an adaptive worst case must not exceed that of any member.

    Raises:
        ValueError: There is no "union", or no member beside it.
    """
    members = {name: value for name, value in worst_case.items() if name != "union"}
    if "union" not in worst_case or not members:
        raise ValueError(f"worst_case has keys {sorted(worst_case)}; expected 'union' and at least one member.")
    weakest = min(members, key=members.__getitem__)
    message = (
        f"the union stands at {worst_case['union']:.2f} %, its lowest member ({weakest}) at {members[weakest]:.2f} %"
    )
    return Check(worst_case["union"] <= members[weakest] + 1e-6, message, dict(worst_case))


def _from_flag(flag: Flag, values: Mapping[str, float] | None = None) -> Check:
    return Check(not flag.raised, flag.message, dict(values or {}))


# --- measurements ----------------------------------------------------------------------------------------------------


class _Run:
    """The images of one run, and the accuracies of the model on them; each attack runs once."""

    def __init__(
        self,
        model: nn.Module,
        sample: ImageTensorDataset,
        eps: float,
        norm: str,
        steps: int,
        seed: int,
        batch_size: int,
    ):
        self.model, self.eps, self.norm, self.steps, self.seed = model, eps, norm, steps, seed
        device = device_of(model)
        self.images, self.labels = to_unit_range(sample.images).to(device), sample.labels.to(device)
        check_batch(self.images, self.labels)
        self.chunks = torch.arange(len(self.labels)).split(batch_size)
        self.masks: dict[object, Tensor] = {}
        self.num_classes, self.blocked = 0, ""  # why gradient attacks cannot run

    def probe(self) -> dict[str, Check]:
        """The checks that attack nothing."""
        rows = slice(min(PROBE_IMAGES, len(self.chunks[0])))
        images, labels = self.images[rows], self.labels[rows]
        try:
            logits, flags = probe_model(PassCounter(self.model), images, labels)
            checks = {name: _from_flag(flag) for name, flag in flags.items()}
            counts = gradient_counts(self.model, images, labels)
            checks["zero_gradients"] = _from_flag(flags["zero_gradients"], counts)
        except NoGradientError as error:
            self.blocked, logits = str(error), logits_of(self.model, images)  # the flags of `probe_model` went with it
            checks = {
                "zero_gradients": Check(False, str(error)),
                "changing_model": Check(True, "weights are the same"),
            }
        self.num_classes = logits.shape[1]
        clean = [logits_of(self.model, self.images[rows]).argmax(dim=1) == self.labels[rows] for rows in self.chunks]
        self.clean = torch.cat(clean)
        return {"batch_size": self.batch_check(), **checks}

    def batch_check(self) -> Check:
        """Images one by one must get the logits that they get in a batch."""
        images = self.images[:SINGLES]
        together = logits_of(self.model, images)
        alone = torch.cat([logits_of(self.model, image[None]) for image in images])
        difference = (together - alone).abs().max().item()
        allowed = BATCH_TOLERANCE * max((together.max() - together.min()).item(), 1e-12)
        flips = int((together.argmax(dim=1) != alone.argmax(dim=1)).sum())
        message = f"{flips} of {len(images)} classes and logits by up to {difference:.3g} depend on the batch size"
        values = {"largest_difference": difference, "allowed": allowed, "class_flips": flips}
        return Check(flips == 0 and difference <= allowed, f"{message} (allowed 0 and {allowed:.3g})", values)

    def gradient_checks(self, square_queries: int) -> dict[str, Callable[[], Check]]:
        """The checks that attack, by name, still to be run."""
        return {
            "eps_monotone": self.eps_check,
            "steps_monotone": self.steps_check,
            "large_eps": self.large_check,
            "stronger_attack": self.stronger_check,
            "square_stronger": lambda: self.square_check(square_queries),
        }

    def robust(self, attack: PGD | APGD | Square, among: Tensor | None = None) -> Tensor:
        """(N,) bool: right when clean and under an attack; images outside `among` (N,) are not attacked."""
        if attack not in self.masks:
            mask = self.clean.clone() if among is None else among.clone()
            for ids in self.chunks:
                rows = ids.to(mask.device)[mask[ids]]
                if len(rows):
                    self._strike(attack, mask, rows)
            self.masks[attack] = mask
        return self.masks[attack]

    def _strike(self, attack: PGD | APGD | Square, mask: Tensor, rows: Tensor) -> None:
        """Attack the images at `rows` and strike those that fall from `mask`."""
        attacked = attack(self.model, self.images[rows], self.labels[rows], ids=rows.cpu())
        mask[rows] = logits_of(self.model, attacked).argmax(dim=1) == self.labels[rows]

    def pgd(self, eps: float | None = None, steps: int | None = None) -> Tensor:
        if self.blocked:
            raise NoGradientError(self.blocked)
        eps, steps = self.eps if eps is None else eps, self.steps if steps is None else steps
        return self.robust(PGD(eps=eps, norm=self.norm, steps=steps, seed=self.seed))

    def eps_check(self) -> Check:
        largest = 1.0 if self.norm == "linf" else float("inf")
        grid = [0.0, *(min(factor * self.eps, largest) for factor in (0.5, 1, 2, 4))]
        ra = [percent(self.clean), *(percent(self.pgd(eps)) for eps in grid[1:])]
        return monotone_check(ra, grid, "eps", len(self.labels))

    def steps_check(self) -> Check:
        grid = [*(steps for steps in (1, 5, 20) if steps < self.steps), self.steps]
        return monotone_check([percent(self.pgd(steps=n)) for n in grid], grid, "steps", len(self.labels))

    def large_check(self) -> Check:
        radius = LARGE_RADIUS * (1 if self.norm == "linf" else self.images[0].numel() ** 0.5)
        radius = max(radius, self.eps)  # an attack at a larger eps erases as much
        return large_radius_check(self.pgd(radius), radius, self.num_classes)

    def gradient_union(self) -> Tensor:
        """(N,) bool: right under PGD and both kinds of APGD."""
        standing = self.pgd()
        for objective in ("ce", "dlr"):
            if self.num_classes >= MIN_CLASSES[objective]:
                attack = APGD(eps=self.eps, norm=self.norm, steps=self.steps, objective=objective, seed=self.seed)
                # what has fallen stays down: only the rest costs passes
                standing = self.robust(attack, among=standing)
        return standing

    def stronger_check(self) -> Check:
        return gap_check(percent(self.pgd()), percent(self.gradient_union()))

    def square_check(self, queries: int) -> Check:
        before = self.clean if self.blocked else self.gradient_union()  # Square alone needs no gradient
        after = self.robust(Square(eps=self.eps, norm=self.norm, queries=queries, seed=self.seed), among=before)
        shares = {"gradients": percent(before) / 100, "square": percent(after) / 100}
        return _from_flag(square_flag(shares, len(before)), {name: 100 * value for name, value in shares.items()})

    def unchanged(self, check: Check, before: str) -> Check:
        """The check of the model's weights, after all attacks."""
        if weights_digest(self.model) == before:
            return check
        return Check(False, "parameters or buffers changed during the checks")


__all__ = ["Check", "run_sanity_checks", "suspicious", "worst_case_check"]
