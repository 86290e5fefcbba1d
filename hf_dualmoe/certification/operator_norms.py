"""Norms of linear operators, rounded up: matrices, convolutions with zero padding, adaptive pooling along an axis."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NORMS = ("l2", "linf", "l1")
OUTWARD = 1 + 1e-6  # relative; rounding in float64 stays below 1e-9 for matrices of up to 10,000 rows
DENSE_LIMIT = 1024  # rows and columns up to which the whole matrix of a convolution is written out


def check_norm(norm: str) -> None:
    """Raise a ValueError unless `norm` is one of `NORMS`."""
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is not one of {', '.join(map(repr, NORMS))}.")


def dual_norm(vectors: Tensor, norm: str) -> Tensor:
    """The dual norm of vectors (..., n) -> (...): |<w, d>| <= dual_norm(w) * ||d||, reached by some d (Hoelder)."""
    order = {"l2": 2, "linf": 1, "l1": math.inf}[norm]
    return torch.linalg.vector_norm(vectors, ord=order, dim=-1)


def pair_norms(vectors: Tensor, norm: str) -> Tensor:
    """||w_a - w_b||_dual (C, C) of vectors (C, n)."""
    return torch.stack([dual_norm(vectors - vector, norm) for vector in vectors])


# --- linear maps -----------------------------------------------------------------------------------------------------


def matrix_norm(matrix: Tensor, norm: str) -> float:
    """Operator norm of a matrix (m, n) from the p-norm to the p-norm, rounded up.

    L-inf: the largest row sum of absolute values; L1: the largest column sum; L2: the largest singular value, from a
    complete decomposition in float64. (Power iteration converges from below and would be no bound.)
    """
    matrix = matrix.detach().double().cpu()
    if norm == "l2":
        return float(torch.linalg.matrix_norm(matrix, ord=2)) * OUTWARD
    return float(matrix.abs().sum(dim=1 if norm == "linf" else 0).max()) * OUTWARD


def conv_norm(
    weight: Tensor,
    norm: str,
    size: Sequence[int],
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> float:
    """Upper bound of the operator norm of a convolution with zero padding, from the p-norm to the p-norm.

    Proof. (1) Stride: cut the padded image into its stride**2 phases x_u[n] = x[s n + u]. With w_u[q] = w[s q + u] the
    strided convolution is sum_u w_u * x_u, a convolution of stride 1 on the stacked phases, which have together the
    norm of the image. (2) Zero padding: the output of a zero-padded convolution of stride 1 is a part of the full
    linear convolution, which equals the circular convolution on a torus of at least size + kernel - 1 places per axis:
    nothing wraps around. (3) L2: the discrete Fourier transform is unitary (up to a factor) and turns the circular
    convolution into one matrix per frequency, so its norm is the largest singular value of all these. For any matrix
    also ||A||_2 <= sqrt(||A||_1 ||A||_inf) (Schur); the smaller bound is taken. (4) L-inf: no row sum exceeds the sum
    of |w| of an output channel; L1: no column sum exceeds the sum of |w_u| of an input channel and phase.

    Args:
        weight: (O, I / groups, K, K).
        norm: "l2", "linf" or "l1".
        size: Height and width of the input, in pixels.
        stride, padding, dilation, groups: As in `torch.nn.functional.conv2d`.

    Returns:
        The bound, rounded up; exact in L2 where the operator's matrix is small enough to be written out, with at most
        1,024 rows and columns, or where kernel = stride and padding = 0.
    """
    weight = weight.detach().double().cpu()
    if groups > 1:  # a block-diagonal operator
        parts = (
            conv_norm(w, norm, size, stride=stride, padding=padding, dilation=dilation) for w in weight.chunk(groups)
        )
        return max(parts)
    matrix = conv_matrix(weight, size, stride=stride, padding=padding, dilation=dilation) if norm == "l2" else None
    if matrix is not None:
        return gram_norm(matrix) * OUTWARD
    row_sum = float(weight.abs().sum(dim=(1, 2, 3)).max())
    if norm == "linf":
        return row_sum * OUTWARD
    phases = split_phases(spread(weight, dilation), stride)  # (O, I * s * s, Q, Q)
    column_sum = float(phases.abs().sum(dim=(0, 2, 3)).max())
    if norm == "l1":
        return column_sum * OUTWARD
    axes = zip(size, padding, stride, phases.shape[2:], strict=True)
    places = [math.ceil((n + 2 * p) / s) + kernel - 1 for n, p, s, kernel in axes]
    return min(torus_norm(phases, places), math.sqrt(row_sum * column_sum)) * OUTWARD


def conv_matrix(
    weight: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor | None:
    """The matrix (inputs, outputs) of a convolution; None where it is larger than `DENSE_LIMIT`."""
    inputs = weight.shape[1] * math.prod(size)
    if inputs > DENSE_LIMIT:
        return None
    pixels = torch.eye(inputs, dtype=weight.dtype).view(inputs, weight.shape[1], *size)
    places = F.conv2d(pixels[:1], weight[:1], None, stride, padding, dilation).numel()
    if places * len(weight) > DENSE_LIMIT:
        return None
    return F.conv2d(pixels, weight, None, stride, padding, dilation).flatten(1)


def gram_norm(matrices: Tensor) -> float:
    """The largest singular value of matrices (..., m, n), from the eigenvalues of their smaller Gram matrix."""
    wide = matrices.shape[-2] < matrices.shape[-1]
    gram = matrices @ matrices.mH if wide else matrices.mH @ matrices
    return math.sqrt(max(float(torch.linalg.eigvalsh(gram)[..., -1].max()), 0.0))  # rounding may leave -1e-17


def spread(weight: Tensor, dilation: Sequence[int]) -> Tensor:
    """The kernel (O, I, K, K) with the zeros written out that its dilation stands for."""
    if tuple(dilation) == (1, 1):
        return weight
    (height, width), (down, right) = weight.shape[2:], dilation
    wide = weight.new_zeros(*weight.shape[:2], (height - 1) * down + 1, (width - 1) * right + 1)
    wide[:, :, ::down, ::right] = weight
    return wide


def split_phases(weight: Tensor, stride: Sequence[int]) -> Tensor:
    """The kernel (O, I * s * s, Q, Q) of stride 1 that does on stacked phases what (O, I, K, K) does with stride s."""
    (height, width), (down, right) = weight.shape[2:], stride
    weight = F.pad(weight, (0, -width % right, 0, -height % down))  # phases of one length; zeros change no norm
    outputs, inputs, height, width = weight.shape
    phases = weight.view(outputs, inputs, height // down, down, width // right, right)
    return phases.permute(0, 1, 3, 5, 2, 4).reshape(outputs, -1, height // down, width // right)


def torus_norm(weight: Tensor, places: Sequence[int]) -> float:
    """Largest singular value over all frequencies of a circular convolution (O, I, Q, Q) on a torus of `places`."""
    waves = []
    for count, kernel in zip(places, weight.shape[2:], strict=True):
        angles = -2 * math.pi / count * torch.outer(torch.arange(count), torch.arange(kernel)).double()
        waves.append(torch.polar(torch.ones_like(angles), angles))  # (places, Q)
    largest = 0.0
    kernel = weight.to(torch.complex128)
    for row in waves[0][: places[0] // 2 + 1]:  # a real kernel: the other half is the complex conjugate
        matrices = torch.einsum("oiab,a,vb->voi", kernel, row, waves[1])
        largest = max(largest, gram_norm(matrices))
    return largest


def adaptive_pool_matrix(size: int, places: int) -> Tensor:
    """The matrix (places, size), float64, of adaptive average pooling along one axis."""
    return F.adaptive_avg_pool1d(torch.eye(size, dtype=torch.float64), places).t()


__all__ = ["adaptive_pool_matrix", "conv_norm", "dual_norm", "matrix_norm", "pair_norms"]
