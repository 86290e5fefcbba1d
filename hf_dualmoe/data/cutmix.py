"""CutMix: a piece of another image in each image, and a share of its label in the label."""

import torch
from torch import Tensor


def cutmix(
    images: Tensor, labels: Tensor, *, num_labels: int, prob: float = 1.0, shard: tuple[int, int] = (0, 1)
) -> tuple[Tensor, Tensor]:
    """Paste a rectangle of its neighbour in the batch into each image (Yun et al. 2019, https://arxiv.org/abs/1905.04899).

    The rectangle has the shape of the image, its centre anywhere, and what sticks out is cut off. The paper draws its
    share of the image between 0 and 1; here it is at most 1/2, so that an image keeps its class as the likeliest one.
    Mixed with a neighbour in turn, that is the same but for where the pieces lie. Nothing waits for the device.

    Args:
        images: (B, C, H, W). Their order must be random: the neighbour of an image is the one before it.
        labels: (B,) int64.
        num_labels: Number of classes.
        prob: Probability that an image gets a piece, in [0, 1].
        shard: (rank, processes): draw for the whole batch of all processes and take this one's part.

    Returns:
        New images, and targets (B, num_labels) float32: the shares of the image that show each class.

    Raises:
        ValueError: `prob` is out of range.
    """
    if not 0 <= prob <= 1:
        raise ValueError(f"prob={prob!r} must be in [0, 1].")
    count, _, height, width = images.shape
    rank, processes = shard
    drawn = torch.rand(4, processes * count, 1, device=images.device)[:, rank * count : (rank + 1) * count]
    share, vertical, horizontal, chance = drawn  # (B, 1) each
    side = (share / 2).sqrt() * (chance < prob)  # of the rectangle, in units of the image's
    rows, columns = _between(height, vertical, side), _between(width, horizontal, side)
    pasted = rows[:, None, :, None] & columns[:, None, None, :]  # (B, 1, H, W)
    area = pasted.flatten(1).float().mean(dim=1, keepdim=True)  # (B, 1), after the cut
    targets = (labels[:, None] == torch.arange(num_labels, device=images.device)).float()  # one_hot would wait
    return torch.where(pasted, images.roll(1, dims=0), images), torch.lerp(targets, targets.roll(1, dims=0), area)


def _between(size: int, centre: Tensor, side: Tensor) -> Tensor:
    """Which of `size` pixels lie around a centre (B, 1), a whole number of them, at most `side` (B, 1): (B, size)."""
    length = (side * size).floor()
    first = (centre * size - length / 2).round()
    pixels = torch.arange(size, device=centre.device)
    return (pixels >= first) & (pixels < first + length)


__all__ = ["cutmix"]
