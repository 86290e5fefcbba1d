"""Square: random search without gradients (Andriushchenko et al. 2020, https://arxiv.org/abs/1912.00049).

    attack = Square(eps=8 / 255, queries=5000)
    attacked = attack(model, images, labels)

It needs nothing but logits, so it sees through masked gradients; hard routing and mixing both mask them.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .attack_primitives import (
    Attack,
    Classifier,
    check_effort,
    check_eps,
    check_logits,
    check_seed,
    l2_norm,
    logits_of,
    margin_objective,
    per_image,
    project,
    round_inwards,
)

RUN_SEED = 7919  # distance between the seeds of two restarts on the same image
CHUNK = 256  # queries whose random numbers are drawn at once
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of p, in queries out of 10,000 (Sec. 5)
SHORTEST = 1000  # queries for which the schedule is made where there are fewer: small squares have no time to add up


class _Streams:
    """Uniform numbers in [0, 1), for each image from a generator of its own, so that batches do not matter."""

    def __init__(self, ids: Tensor, seed: int, device: torch.device):
        self.generators = [torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63) for i in ids.tolist()]
        self.device = device
        self.table = torch.empty(len(ids), 0, 0)
        self.used = 0

    def draw(self, *shape: int) -> Tensor:
        """(n, *shape) fresh numbers; float64, so that floor(u * k) never reaches k."""
        rows = [torch.rand(shape, generator=g, dtype=torch.float64) for g in self.generators]
        return torch.stack(rows).to(self.device)

    def next(self, width: int) -> Tensor:
        """(n, width) numbers for the next query."""
        if self.used == self.table.shape[1]:
            self.table, self.used = self.draw(CHUNK, width), 0
        self.used += 1
        return self.table[:, self.used - 1]

    def keep(self, mask: Tensor) -> None:
        """Drop the images where `mask` (n,) is false."""
        self.generators = [g for g, kept in zip(self.generators, mask.tolist(), strict=True) if kept]
        self.table = self.table[mask]


def signs(uniform: Tensor, like: Tensor) -> Tensor:
    """-1 or 1 with equal chance, from numbers in [0, 1); dtype of `like`."""
    return (uniform < 0.5).to(like) * 2 - 1


def window_size(query: int, queries: int, p_init: float, shape: torch.Size, norm: str) -> int:
    """Side of the changed square in pixels at a query (from 1): area p * H * W; odd and at least 3 for L2.

    p starts at `p_init` and halves at fixed points, rescaled from the paper's 10,000 to `queries`. The first square is
    always of the largest size: a shift of nearly the whole image breaks many, and small budgets would skip it.
    """
    height, width = shape[-2:]
    position = (query - 1) / max(queries, SHORTEST) * 10_000
    p = p_init / 2 ** sum(position > halving for halving in HALVINGS)
    side = max(1, round((p * height * width) ** 0.5))
    if norm == "l2":
        side = max(3, side) // 2 * 2 + 1
    return min(side, height, width)


@functools.lru_cache
def eta(side: int) -> Tensor:
    """Unit-norm (side, side) pattern for L2, Sec. 4.3: two opposite bumps, one above the other."""

    def bump(height: int, width: int) -> Tensor:  # Eq. 2: sums over 1 / (n + 1 - k)^2 for k = 0 .. M
        n = height // 2
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        rings = n - torch.maximum((row - n).abs(), (column - width // 2).abs())
        terms = (1 / torch.arange(n + 1, 0, -1, dtype=torch.float64) ** 2).cumsum(0)
        return terms[rings.clamp_min(0)]

    upper = side // 2
    lower = -bump(side, side - upper).T
    pattern = torch.cat([bump(side, upper).T, lower]) if upper else lower
    return pattern / pattern.norm()


def window(uniform: Tensor, side: int, shape: torch.Size) -> Tensor:
    """(n, side * side) flat pixel indices of a square placed by `uniform` (n, 2), row by row."""
    height, width = shape[-2:]
    room = torch.tensor([height - side + 1, width - side + 1], device=uniform.device)
    corner = (uniform * room).long()
    steps = torch.arange(side, device=uniform.device)
    rows, columns = corner[:, :1] + steps, corner[:, 1:] + steps  # (n, side)
    return (rows[:, :, None] * width + columns[:, None, :]).flatten(1)


def start_linf(images: Tensor, eps: float, streams: _Streams) -> Tensor:
    """Vertical stripes, one pixel wide, of -eps or eps for each channel."""
    _, channels, _, width = images.shape
    return project(images + eps * signs(streams.draw(channels, 1, width), images), images, eps, "linf")


def start_l2(images: Tensor, eps: float, streams: _Streams) -> Tensor:
    """A grid of eta patterns, five along the shorter side, each with a random sign per channel; norm eps."""
    _, channels, height, width = images.shape
    tile = max(1, min(height, width) // 5)
    rows, columns = height // tile, width // tile
    sign = signs(streams.draw(channels, rows, columns), images)
    tiles = sign.repeat_interleave(tile, dim=2).repeat_interleave(tile, dim=3) * eta(tile).to(images).repeat(
        rows, columns
    )
    top, left = (height - rows * tile) // 2, (width - columns * tile) // 2
    delta = torch.zeros_like(images)
    delta[:, :, top : top + rows * tile, left : left + columns * tile] = tiles
    return project(images + eps * delta / l2_norm(delta), images, eps, "l2")


def propose_linf(images: Tensor, current: Tensor, eps: float, side: int, uniform: Tensor) -> Tensor:
    """Set one square, in each channel, to -eps or eps (Alg. 2)."""
    n, channels = images.shape[:2]
    where = window(uniform[:, :2], side, images.shape)[:, None].expand(n, channels, -1)
    sign = signs(uniform[:, 2 : 2 + channels], images)[:, :, None]
    pixels = images.flatten(2).gather(2, where)
    wide = torch.promote_types(images.dtype, torch.float32)
    changed = round_inwards((pixels.to(wide) + eps * sign.to(wide)).clamp(0, 1), pixels)
    return current.flatten(2).scatter(2, where, changed).view_as(current)


def propose_l2(images: Tensor, current: Tensor, eps: float, side: int, uniform: Tensor) -> Tensor:
    """Move the norm spent on one square, and the norm not yet spent, into another square (Alg. 3)."""
    n, channels = images.shape[:2]
    first, second = (window(u, side, images.shape) for u in (uniform[:, :2], uniform[:, 2:4]))
    pattern = eta(side).to(images)
    transposed = (uniform[:, 4] < 0.5)[:, None]
    pattern = torch.where(transposed, pattern.T.flatten(), pattern.flatten())[:, None]  # (n, 1, side * side)
    delta = (current - images).flatten(2)  # (n, C, H * W)
    into = first[:, None].expand(n, channels, -1)
    kept = delta.gather(2, into)
    new = signs(uniform[:, 5 : 5 + channels], images)[:, :, None] * pattern
    new = new + kept / kept.norm(dim=2, keepdim=True).clamp_min(1e-12)
    touched = torch.zeros_like(delta[:, 0], dtype=torch.bool).scatter(1, torch.cat([first, second], dim=1), True)[
        :, None
    ]
    unspent = (eps**2 - delta.square().sum(dim=(1, 2))).clamp_min(0)[:, None, None] / channels
    budget = ((delta.square() * touched).sum(dim=2, keepdim=True) + unspent).sqrt()
    new = budget * new / new.norm(dim=2, keepdim=True).clamp_min(1e-12)
    delta = delta.masked_fill(touched, 0).scatter(2, into, new)
    return project(images + delta.view_as(images), images, eps, "l2")


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Square attack in the L-inf or L2 ball: lowers the margin by random squares, keeping each change that helps.

    Random numbers come from the seed and the image's id alone, so that a result depends neither on the batch size nor
    on the other images in the batch. An image leaves the work as soon as it is misclassified. One that stands comes
    back as the last search left it, one that is misclassified when clean as it is. Images need a height and a width.

    Args:
        eps: Radius in [0, 1] pixel units.
        norm: "linf" or "l2".
        queries: Forward passes per image and restart.
        p_init: Share of the image that the first squares cover, in (0, 1].
        seed: Of the random search.
        restarts: Independent searches.

    Raises:
        ValueError: A setting is out of range; the message names it.
    """

    eps: float = 8 / 255
    norm: str = "linf"
    queries: int = 5000
    p_init: float = 0.8
    seed: int = 0
    restarts: int = 1

    def __post_init__(self):
        check_eps(self.eps, self.norm)
        check_effort(queries=self.queries, restarts=self.restarts)
        check_seed(self.seed)
        if not isinstance(self.p_init, (int, float)) or not 0 < self.p_init <= 1:
            raise ValueError(f"p_init={self.p_init!r} must be in (0, 1].")

    def _attack(self, model: Classifier, images: Tensor, labels: Tensor, ids: Tensor | None) -> Tensor:
        if images.ndim != 4:
            raise ValueError(f"images has shape {tuple(images.shape)}; Square needs (batch, channels, height, width).")
        logits = logits_of(model, images)
        check_logits(logits, labels)
        attacked, standing = images.clone(), logits.argmax(dim=1) == labels
        ids = torch.arange(len(images)) if ids is None else ids.cpu()
        for restart in range(self.restarts if self.eps > 0 else 0):
            rows = standing.nonzero().squeeze(1)
            if len(rows) == 0:
                break
            streams = _Streams(ids[rows.cpu()], self.seed + RUN_SEED * restart, images.device)
            self._search(model, images[rows], labels[rows], rows, streams, attacked, standing)
        return attacked

    def _search(self, model, images, labels, rows, streams, attacked, standing) -> None:
        """One random search; writes what it finds into `attacked` and `standing` at `rows`."""
        start, propose = (start_linf, propose_linf) if self.norm == "linf" else (start_l2, propose_l2)
        width = (2 if self.norm == "linf" else 5) + images.shape[1]
        current, best = images, torch.full(labels.shape, -torch.inf, device=images.device)
        for query in range(self.queries):
            if query == 0:
                proposal = start(images, self.eps, streams)
            else:
                side = window_size(query, self.queries, self.p_init, images.shape, self.norm)
                proposal = propose(images, current, self.eps, side, streams.next(width))
            logits = logits_of(model, proposal)
            margin, wrong = margin_objective(logits, labels), logits.argmax(dim=1) != labels
            better = wrong | (margin > best)
            current = torch.where(per_image(better, current), proposal, current)
            best = torch.where(better, margin, best)
            if wrong.any():
                attacked[rows[wrong]], standing[rows[wrong]] = current[wrong], False
                images, labels, rows, current, best = (x[~wrong] for x in (images, labels, rows, current, best))
                streams.keep(~wrong)
                if len(rows) == 0:
                    return
        attacked[rows] = current


__all__ = ["Square"]
