"""Calibrated mixing: a map of F_R's logits that lets F_S decide where F_R would be wrong.

    result = calibrate_robust_logits(model, held_out, attack=PGD(eps=8 / 255, steps=20, seed=0))
    model.config.robust_logit_map = result["robust_logit_map"]
    model.set_alpha(result["alpha"])

Paper: *MixedNUTS: Training-Free Accuracy-Robustness Balance via Nonlinearly Mixed Classifiers*,
https://arxiv.org/abs/2402.02263.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..attacks.base import check_alphas, device_of, frozen, percent
from ..attacks.pgd import PGD
from ..attacks.precision import full_precision
from ..data.datasets import ImageTensorDataset, to_unit_range
from ..models.mixing_dualmoe import apply_logit_map, mix_logits
from ..models.outputs import logits_of
from ..models.parts import part_of

# F_R can only hold its own against any F_S where alpha > 1/2; confident maps need alphas close to that
CALIBRATION_ALPHAS = (0.51, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98, 0.995, 1.0)
SCALES = (0.1, 0.3, 1.0, 2.0, 4.0, 8.0, 16.0)
CLAMPS = (None, -1.0, -0.5, 0.0, 0.5)
POWERS = (1.0, 2.0, 3.0, 4.0)
ROUNDING = 1e-4  # in points: a floor of 70 is met by the 69.9999988 that float32 makes of it

LogitMap = dict[str, float] | None


@dataclass(frozen=True)
class _Candidate:
    """A setting of the mixture, and its SA and RA in % as estimated from cached logits."""

    robust_logit_map: LogitMap
    alpha: float
    sa: float = 0.0
    ra: float = 0.0


def calibrate_robust_logits(
    model: nn.Module,
    dataset: ImageTensorDataset,
    *,
    attack: PGD,
    scales: Sequence[float] = SCALES,
    clamps: Sequence[float | None] = CLAMPS,
    powers: Sequence[float] = POWERS,
    alphas: Sequence[float] = CALIBRATION_ALPHAS,
    ra_share: float = 0.985,
    batch_size: int = 256,
    progress: bool = True,
) -> dict[str, Any]:
    """Search the logit map of F_R and the alpha that give the highest SA at almost F_R's own RA.

    After MixedNUTS: a robust model is surer of what it gets right, even under
    attack, than of what it gets wrong, and a map that widens this gap lets F_S decide where F_R would be wrong. F_R
    alone is attacked once; then all settings are compared on cached logits. There, SA is exact and an image counts as
    robust if F_R keeps a margin of (1 - alpha) / alpha between the probabilities of the right and any other class,
    since then no output of F_S can tip the mixture. Last, the winner and the best setting with the present map are
    measured: both under a real attack on each of the two and under that on F_R, the worst for each image counting.

    Args:
        model: Dual model with mixing="probs"; comes back as it was. To apply a result, set
            `model.config.robust_logit_map` and call `model.set_alpha`.
        dataset: Held-out images, measured again on others before they are published: the best of many settings
            flatters itself.
        attack: Attack on the mixtures; on F_R alone it runs with objective="margin" and keep_best=True.
        scales, clamps, powers: Grid of the map (see `apply_logit_map`); the clamp None = neither normalised nor
            rectified. The present map is always among the candidates.
        alphas: Grid of alpha, each in [0, 1]; those up to 1/2 guarantee no robustness. 1 is always among them.
        ra_share: RA to keep, as a share of F_R's under attack, in (0, 1].
        batch_size: Images per forward.
        progress: Whether to show progress bars.

    Returns:
        JSON-ready: "robust_logit_map" and "alpha" to use; "accepted", whether these are the winner's: its measured RA
        reaches "ra_floor" (in %) and its SA is higher than before, else they are those of "before". "robust" (F_R
        alone): sa and ra; "before" and "after" (best setting with the present map, and winner): robust_logit_map,
        alpha, sa, ra as measured, and "estimated_ra"; "gain_sa" and "gain_ra" (after - before, in points).

    Raises:
        ValueError: The model mixes logits or has no dial, or a grid or share is empty or out of range.
    """
    maps = _grid(model, scales, clamps, powers)
    check_alphas(alphas)
    if not 0 < ra_share <= 1:
        raise ValueError(f"ra_share={ra_share!r} must be in (0, 1].")
    run = _Calibration(model, dataset, attack, batch_size, progress)
    run.attack_robust()
    robust = run.robust_accuracies()
    floor = ra_share * robust["ra"]
    alphas = sorted({*map(float, alphas), 1.0})  # 1: F_R alone always reaches the floor
    before = run.search(maps[:1], alphas, floor)  # the first is the present one
    winner = run.search(maps, alphas, floor)
    measured = run.measure([before, winner])
    gains = {f"gain_{name}": measured[1][name] - measured[0][name] for name in ("sa", "ra")}
    accepted = measured[1]["ra"] >= floor - ROUNDING and gains["gain_sa"] > 0
    use = measured[1] if accepted else measured[0]
    chosen = {name: use[name] for name in ("robust_logit_map", "alpha")}
    parts = {"ra_floor": floor, "robust": robust, "before": measured[0], "after": measured[1]}
    return {**chosen, "accepted": accepted, **gains, **parts, "num_images": len(dataset), "attack": asdict(attack)}


def _grid(model: nn.Module, scales: Sequence, clamps: Sequence, powers: Sequence) -> list[LogitMap]:
    """All maps to try, the present one first."""
    mixing = getattr(model.config, "mixing", None)
    if mixing != "probs":
        raise ValueError(f"model.config.mixing={mixing!r}; calibration needs a dual model with mixing='probs'.")
    for name, values in (("scales", scales), ("powers", powers)):
        if len(values) == 0 or not all(value > 0 for value in values):
            raise ValueError(f"{name}={values!r} must hold at least one value, each > 0.")
    if len(clamps) == 0:
        raise ValueError(f"clamps={clamps!r} must hold at least one value or None.")
    maps = [
        {"scale": float(scale), "power": float(power)} | ({} if clamp is None else {"clamp": float(clamp)})
        for scale, clamp, power in product(scales, clamps, powers)
    ]
    return [model.config.robust_logit_map, *maps]


class _Mixture(nn.Module):
    """The dual model with another logit map of F_R and another alpha: images -> logits (B, C)."""

    def __init__(self, model: nn.Module, candidate: _Candidate):
        super().__init__()
        self.standard, self.robust = part_of(model, "standard"), part_of(model, "robust")
        self.standard_map, self.candidate = model.config.standard_logit_map, candidate

    def forward(self, images: Tensor) -> Tensor:
        return self.mix(logits_of(self.standard, images), logits_of(self.robust, images))

    def mix(self, standard_logits: Tensor, robust_logits: Tensor) -> Tensor:
        robust_logits = apply_logit_map(robust_logits, self.candidate.robust_logit_map)
        return mix_logits(apply_logit_map(standard_logits, self.standard_map), robust_logits, self.candidate.alpha)


class _Calibration:
    """The images of one calibration, with the logits (N, C) of their clean and attacked versions."""

    def __init__(self, model: nn.Module, dataset: ImageTensorDataset, attack: PGD, batch_size: int, progress: bool):
        self.model, self.dataset, self.attack = model, dataset, attack
        self.batch_size, self.progress = batch_size, progress
        self.device = device_of(model)
        self.labels = dataset.labels
        self.attacked: list[Tensor] = []  # images as F_R alone was attacked, by batch, on the CPU

    def _batches(self, title: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (ids, images, labels)."""
        starts = range(0, len(self.dataset), self.batch_size)
        for start in tqdm(starts, desc=title, disable=not self.progress, leave=False):
            ids = torch.arange(start, min(start + self.batch_size, len(self.dataset)))
            batch = self.dataset.__getitems__(ids)
            yield ids, to_unit_range(batch["pixel_values"].to(self.device)), batch["labels"].to(self.device)

    @torch.no_grad()
    def attack_robust(self) -> None:
        """Attack F_R alone and remember what the search needs."""
        standard, robust = part_of(self.model, "standard"), part_of(self.model, "robust")
        attack = replace(self.attack, objective="margin", keep_best=True)  # margins are what the estimate reads
        rows = {"standard": [], "robust": [], "attacked": []}
        with full_precision(), frozen(self.model):
            for ids, images, labels in self._batches("attack on the robust model"):
                attacked = attack(robust, images, labels, ids=ids)
                self.attacked.append(attacked.cpu())  # all images, which a device may be too small for
                for name, part, seen in (
                    ("standard", standard, images),
                    ("robust", robust, images),
                    ("attacked", robust, attacked),
                ):
                    rows[name].append(logits_of(part, seen).cpu())
        self.logits = {name: torch.cat(values) for name, values in rows.items()}

    def robust_accuracies(self) -> dict[str, float]:
        """SA and RA of F_R alone, in %."""
        clean, attacked = (self.logits[name].argmax(dim=1) == self.labels for name in ("robust", "attacked"))
        return {"sa": percent(clean), "ra": percent(clean & attacked)}

    def search(self, maps: Sequence[LogitMap], alphas: Sequence[float], floor: float) -> _Candidate:
        """The setting of highest SA whose estimated RA reaches `floor` (in %), else the one of highest RA."""
        found = [self._estimate(logit_map, alpha) for logit_map in maps for alpha in alphas]
        reaching = [candidate for candidate in found if candidate.ra >= floor - ROUNDING]
        if reaching:
            return max(reaching, key=lambda candidate: (candidate.sa, candidate.ra))
        return max(found, key=lambda candidate: (candidate.ra, candidate.sa))

    def _estimate(self, logit_map: LogitMap, alpha: float) -> _Candidate:
        mixture = _Mixture(self.model, _Candidate(logit_map, alpha))
        clean = mixture.mix(self.logits["standard"], self.logits["robust"]).argmax(dim=1) == self.labels
        probs = apply_logit_map(self.logits["attacked"], logit_map).softmax(dim=1)
        right = probs.gather(1, self.labels[:, None]).squeeze(1)
        margin = right - probs.scatter(1, self.labels[:, None], -torch.inf).amax(dim=1)
        needed = (1 - alpha) / alpha if alpha > 0 else torch.inf  # the dual rule: F_S can tip any smaller margin
        return _Candidate(logit_map, alpha, percent(clean), percent(clean & (margin > needed)))

    @torch.no_grad()
    def measure(self, candidates: Sequence[_Candidate]) -> list[dict[str, Any]]:
        """SA and worst-case RA of each candidate, over the attack on F_R and those on all candidates."""
        mixtures = [_Mixture(self.model, candidate) for candidate in candidates]
        clean, robust = (torch.zeros(len(mixtures), len(self.dataset), dtype=torch.bool) for _ in range(2))
        with full_precision(), frozen(self.model):
            for number, (ids, images, labels) in enumerate(self._batches("attack on the mixtures")):
                attacked = [self.attacked[number].to(self.device)]
                attacked += [self.attack(mixture, images, labels, ids=ids) for mixture in mixtures]
                for row, mixture in enumerate(mixtures):
                    clean[row, ids] = (mixture(images).argmax(dim=1) == labels).cpu()
                    held = torch.stack([mixture(version).argmax(dim=1) == labels for version in attacked])
                    robust[row, ids] = clean[row, ids] & held.all(dim=0).cpu()
        return [
            {
                "robust_logit_map": candidate.robust_logit_map,
                "alpha": candidate.alpha,
                "sa": percent(clean[row]),
                "ra": percent(robust[row]),
                "estimated_ra": candidate.ra,
            }
            for row, candidate in enumerate(candidates)
        ]


__all__ = ["calibrate_robust_logits"]
