"""Square: random search without gradients (Andriushchenko et al. 2020, https://arxiv.org/abs/1912.00049).

    attack = Square(eps=8 / 255, queries=5000)
    attacked = attack(model, images, labels)

It needs nothing but logits, so it sees through masked gradients; hard routing and mixing both mask them.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ..models.outputs import logits_of
from .base import Attack, Classifier, check_counts, check_eps, check_logits, check_seed, numbered, widest_float
from .steps import l2_norm, margin_objective, per_image, project, round_inwards

PATIENCE = 8  # refusals in a row after which an image may be shown one more proposal at once
LARGEST = 0.8  # share of the image that the first squares cover: p of Sec. 5
CHUNK = 512  # queries whose random numbers are drawn at once
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of p, in queries out of 10,000 (Sec. 5)
SHORTEST = 1000  # queries for which the schedule is made where there are fewer: small squares have no time to add up


class _Streams:
    """Uniform numbers in [0, 1), for each image from a generator of its own, so that batches do not matter."""

    def __init__(self, ids: Tensor, seed: int, device: torch.device):
        self.generators = [torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63) for i in ids.tolist()]
        self.device = device

    def draw(self, *shape: int) -> Tensor:
        """(n, *shape) fresh numbers; floor(u * k) never reaches k."""
        rows = [torch.rand(shape, generator=g, dtype=torch.float64) for g in self.generators]
        wide = widest_float(self.device)
        below_one = 1 - torch.finfo(wide).eps / 2  # float32 rounds numbers near 1 up
        return torch.stack(rows).to(wide).clamp_max(below_one).to(self.device)

    def keep(self, kept: Tensor) -> None:
        """Drop all images but those at `kept` (m,) int64."""
        self.generators = [self.generators[i] for i in kept.tolist()]


def signs(uniform: Tensor, like: Tensor) -> Tensor:
    """-1 or 1 with equal chance, from numbers in [0, 1); dtype of `like`."""
    return (uniform < 0.5).to(like) * 2 - 1


def window_size(query: int, queries: int, shape: torch.Size, norm: str) -> int:
    """Side of the changed square in pixels at a query (from 1): area p * H * W; odd and at least 3 for L2.

    p starts at `LARGEST` and halves at fixed points, rescaled from the paper's 10,000 to `queries`. The first
    square is always of the largest size: a shift of nearly the whole image breaks many, and small budgets would skip
    it.
    """
    height, width = shape[-2:]
    position = (query - 1) / max(queries, SHORTEST) * 10_000
    p = LARGEST / 2 ** sum(position > halving for halving in HALVINGS)
    side = max(1, round((p * height * width) ** 0.5))
    if norm == "l2":
        side = max(3, side) // 2 * 2 + 1  # eta has a centre
    return min(side, height, width)


def blocks(queries: int, shape: torch.Size, norm: str) -> Iterator[tuple[int, int]]:
    """(side, count) of the queries after the first, in their order: no more than CHUNK of one size at once."""
    sides = (window_size(query, queries, shape, norm) for query in range(1, queries))
    for side, group in groupby(sides):
        left = sum(1 for _ in group)
        while left > 0:
            yield side, min(left, CHUNK)
            left -= CHUNK


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


def proposal_numbers(uniform: Tensor, side: int, shape: torch.Size) -> tuple[Tensor, int]:
    """Number the proposals that `propose_linf` makes of (..., 2 + C): (...,) int64, below the second result."""
    channels, height, width = shape[-3:]
    rows, columns = height - side + 1, width - side + 1
    corner = (uniform[..., :2] * torch.tensor([rows, columns], device=uniform.device)).long()
    sign = ((uniform[..., 2:] < 0.5).long() << torch.arange(channels, device=uniform.device)).sum(dim=-1)
    return ((corner[..., 0] * columns + corner[..., 1]) << channels) + sign, (rows * columns) << channels


class _Search:
    """One search on n images, each of which goes through its own list of proposals at its own pace.

    It finds what asking one proposal after the other finds, with fewer and fuller batches. A proposal that an image
    has refused since it last changed (L-inf) it would refuse again: it is passed over. Small images run out of new
    ones, and most of a long search asks what has been answered; where more proposals are possible than there are
    queries, nothing is remembered. Where images have left, one that refuses again and again is shown several
    proposals at once; after the first that it takes, the others count as not asked.

    A device is waited for twice a step: for what to ask, and for which of it changes its image. Images that are done
    are passed over until the end of the list, and only there leave.
    """

    def __init__(self, rows: Tensor, images: Tensor, labels: Tensor, streams: _Streams, attack: "Square"):
        self.rows, self.images, self.labels, self.streams, self.attack = rows, images, labels, streams, attack
        self.current, self.best = images.clone(), torch.full(labels.shape, -torch.inf, device=images.device)
        self.side, self.size, device = 0, len(rows), rows.device
        self.uniform = self.numbers = self.place = torch.zeros(len(rows), 0, device=device)
        self.refused, self.streak = torch.zeros(len(rows), 0, dtype=torch.bool, device=device), torch.zeros_like(rows)
        self.wrong, self.done = (torch.zeros(len(rows), dtype=torch.bool, device=device) for _ in range(2))

    def load(self, side: int, count: int) -> None:
        """Draw the next `count` proposals of each image, all of one size."""
        linf = self.attack.norm == "linf"
        self.uniform = self.streams.draw(count, (2 if linf else 5) + self.images.shape[1])
        self.place = torch.zeros_like(self.rows)  # of an image in its list
        if linf:
            self.numbers, kinds = proposal_numbers(self.uniform, side, self.images.shape)
        if linf and side != self.side:
            kept = kinds + 1 if kinds <= self.attack.queries else 0  # the last one takes what is not to be noted
            # numbers count squares of one size: what another size refused says nothing
            self.refused = torch.zeros(len(self.rows), kept, dtype=torch.bool, device=self.rows.device)
        self.side = side

    def next(self) -> tuple[Tensor, Tensor]:
        """Choose what to ask next: images (k,), by position and in order, and places in their lists (k,)."""
        new = torch.arange(self.uniform.shape[1], device=self.place.device) >= self.place[:, None]
        if self.refused.shape[1]:
            new &= ~self.refused.gather(1, self.numbers)
        new &= ~self.done[:, None]
        active = new.any(dim=1).sum().clamp_min(1)
        # never more than the batch had at first
        several = (1 + self.streak // PATIENCE).clamp_max(self.size // active)
        new &= new.cumsum(dim=1, dtype=torch.int32) <= several[:, None]
        return new.nonzero(as_tuple=True)

    def step(self, model: Classifier) -> bool:
        """Ask once; False at the end of the lists."""
        at, place = self.next()
        if len(at) == 0:
            return False
        propose = propose_linf if self.attack.norm == "linf" else propose_l2
        drawn = self.uniform[at, place]
        proposal = propose(self.images[at], self.current[at], self.attack.eps, self.side, drawn)
        margin, wrong = self.best[at], torch.zeros_like(at, dtype=torch.bool)
        # the square may be there already
        changed = (proposal != self.current[at]).flatten(1).any(dim=1).nonzero().squeeze(1)
        if len(changed):
            margin[changed], wrong[changed] = self.ask(model, proposal[changed], self.labels[at[changed]])
        self.answer(at, place, proposal, margin, wrong)
        return True

    def answer(self, at: Tensor, place: Tensor, proposal: Tensor, margin: Tensor, wrong: Tensor) -> None:
        """Let each image take the first of its proposals that is better; `at` (k,) and what goes with it, in order."""
        order = torch.arange(len(at), device=at.device)
        better = order.where(wrong | (margin > self.best[at]), len(at))
        first = torch.full_like(self.rows, len(at)).scatter_reduce(0, at, better, "amin")  # that the image takes
        took, chosen = first < len(at), first.clamp_max(len(at) - 1)
        known = order <= first[at]
        self.place.scatter_reduce_(0, at, (place + 1).where(known, 0), "amax")
        self.streak.scatter_add_(0, at, known.long()).masked_fill_(took, 0)
        if self.refused.shape[1]:
            number = self.numbers[at, place].where(known, self.refused.shape[1] - 1)
            self.refused[at, number] = True
            self.refused &= ~took[:, None]  # the image changed: what it refused before may help now
        self.current = torch.where(per_image(took, self.current), proposal[chosen], self.current)
        self.best = torch.where(took, margin[chosen], self.best)
        self.wrong |= took & wrong[chosen]
        self.done |= self.wrong | self.exhausted()

    def ask(self, model: Classifier, proposal: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Margin (k,) of proposals (k, ...), and whether they are misclassified (k,)."""
        logits = logits_of(model, proposal)
        return margin_objective(logits, labels), logits.argmax(dim=1) != labels

    def begin(self, model: Classifier, start: Tensor) -> None:
        """Take the start (n, ...), the first query."""
        margin, self.wrong = self.ask(model, start, self.labels)
        taken = self.wrong | (margin > self.best)  # false for NaN
        self.current = torch.where(per_image(taken, start), start, self.current)
        self.best = torch.where(taken, margin, self.best)
        self.done = self.wrong.clone()

    def exhausted(self) -> Tensor:
        """(n,) whether an image has refused every single pixel, the smallest square; nothing can change it."""
        done = self.refused[:, :-1].all(dim=1)
        return done if self.side == 1 and self.refused.shape[1] else torch.zeros_like(done)

    def leave(self, attacked: Tensor, standing: Tensor) -> None:
        """Write what was found (N, ...) at `rows`, and drop the images that are done."""
        attacked[self.rows], standing[self.rows] = self.current, ~self.wrong
        kept = (~self.done).nonzero().squeeze(1)
        if len(kept) == len(self.rows):
            return
        own = ("rows", "images", "labels", "current", "best", "uniform", "numbers", "place", "refused", "streak")
        for name in (*own, "wrong", "done"):
            setattr(self, name, getattr(self, name)[kept])
        self.streams.keep(kept)


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Square attack in the L-inf or L2 ball: lowers the margin by random squares, keeping each change that helps.

    Random numbers come from the seed and the image's id alone, so that a result depends neither on the batch size nor
    on the other images in the batch. An image leaves the work as soon as it is misclassified. One that stands comes
    back as the search left it, one that is misclassified when clean as it is. Images need a height and a width.

    Args:
        eps: Radius in [0, 1] pixel units.
        norm: "linf" or "l2".
        queries: Proposals per image. One that leaves the image as it is, or that it has refused before
            and would again (L-inf), costs no forward pass.
        seed: Of the random search.

    Raises:
        ValueError: A setting is out of range; the message names it.
    """

    eps: float = 8 / 255
    norm: str = "linf"
    queries: int = 5000
    seed: int = 0

    def __post_init__(self) -> None:
        check_eps(self.eps, self.norm)
        check_counts({"queries": self.queries})
        check_seed(self.seed)

    def _attack(self, model: Classifier, images: Tensor, labels: Tensor, ids: Tensor | None) -> Tensor:
        if images.ndim != 4:
            raise ValueError(f"images has shape {tuple(images.shape)}; Square needs (batch, channels, height, width).")
        logits = logits_of(model, images)
        check_logits(logits, labels)
        attacked, standing = images.clone(), logits.argmax(dim=1) == labels
        rows = standing.nonzero().squeeze(1)
        if len(rows) and self.eps > 0:
            streams = _Streams(numbered(ids, labels)[rows.cpu()], self.seed, images.device)
            search = _Search(rows, images[rows], labels[rows], streams, self)
            self._run(model, search, attacked, standing)
        return attacked

    def _run(self, model: Classifier, search: _Search, attacked: Tensor, standing: Tensor) -> None:
        """One random search; writes what it finds into `attacked` (N, ...) and `standing` (N,) at its rows."""
        start, shape = start_linf if self.norm == "linf" else start_l2, search.images.shape
        search.begin(model, start(search.images, self.eps, search.streams))
        search.leave(attacked, standing)
        for side, count in blocks(self.queries, shape, self.norm):
            if len(search.rows) == 0:
                return
            search.load(side, count)
            while search.step(model):
                pass
            search.leave(attacked, standing)


__all__ = ["Square"]
