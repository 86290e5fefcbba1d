"""How far an image must move before a router can choose another expert: exact for routers that are affine in it."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lipschitz import NotApplicableError, finite
from .operator_norms import OUTWARD, adaptive_pool_matrix, check_norm, pair_norms

AFFINE_ROUTERS = ("linear", "pooled")
UNIT_ROUNDOFF = 2.0**-24  # of float32


def effective_router_weight(moe: nn.Module, weight: Tensor | None = None) -> Tensor:
    """The weight W (E, C, H, W) of an affine router as a map of the image itself: scores g(x) = <W, x> + b.

    Average pooling and the normalisation (x - mean) / std are folded in: W = P^T w / std. Differentiable in the
    router's weight.

    Args:
        moe: Mixture of experts.
        weight: (E, n) to use in the place of the router's own weight w, for instance in another precision.

    Raises:
        NotApplicableError: The router is not affine in the image ("conv", "features").
    """
    config = moe.config
    if config.router not in AFFINE_ROUTERS:
        raise NotApplicableError(
            f"router={config.router!r} is not affine in the image; route radii need 'linear' or 'pooled'."
        )
    weight = moe.router[-1].weight if weight is None else weight
    size = config.image_size
    if config.router == "linear":
        weight = weight.view(len(weight), config.num_channels, size, size)
    else:
        grid = config.router_pool_size
        pool = adaptive_pool_matrix(size, grid).to(weight)  # (grid, size)
        weight = torch.einsum(
            "ecab,ah,bw->echw", weight.view(len(weight), config.num_channels, grid, grid), pool, pool
        )
    return weight / moe.normalize.std.to(weight)


class AffineRouter:
    """A router g(x) = <W, x> + b in float64, with a bound of what its float32 evaluation can be off by.

    Args:
        moe: Mixture with a "linear" or "pooled" router, in float32 or float64.
        norm: "l2", "linf" or "l1".

    Raises:
        NotApplicableError: The router is not affine, or has a weight that is NaN or infinite.
    """

    def __init__(self, moe: nn.Module, norm: str):
        check_norm(norm)
        exact = copy.deepcopy(moe.router).double()
        self.mean, self.std = moe.normalize.mean.double(), moe.normalize.std.double()
        self.router = exact
        pool = exact[0] if isinstance(exact[0], nn.AdaptiveAvgPool2d) else None
        weight = finite(exact[-1].weight.detach(), "the router's weight")
        bias = finite(exact[-1].bias.detach(), "the router's bias")
        with torch.no_grad():
            effective = effective_router_weight(moe, weight).flatten(1)
            largest = torch.maximum(self.mean.abs(), (1 - self.mean).abs()) / self.std
            size = moe.config.image_size
            pixels = largest.expand(-1, size, size)[None]
            pooled = pixels if pool is None else F.adaptive_avg_pool2d(pixels, pool.output_size)
            magnitude = pooled.flatten(1) @ weight.abs().t() + bias.abs()  # (1, E)
        self.constants = pair_norms(effective, norm)  # (E, E)
        # A sum of n products, in any order, is off by at most n u / (1 - n u) times the sum of their sizes.
        terms = effective.shape[1] + weight.shape[1] + 8
        self.error = magnitude[0] * terms * UNIT_ROUNDOFF / (1 - terms * UNIT_ROUNDOFF)  # (E,)

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """Router scores (B, E), float64, of images (B, C, H, W)."""
        return self.router((images.double() - self.mean) / self.std)

    def radii(self, images: Tensor, rounding: bool = True) -> Tensor:
        """Distances (B, E) below which each expert is never chosen; see `route_radii`."""
        scores = self.scores(images)
        first = scores.argmax(dim=1)
        gaps = scores.gather(1, first[:, None]) - scores  # (B, E) >= 0
        constants = self.constants[first]
        if rounding:
            gaps = gaps - self.error - self.error[first][:, None]
            constants = constants * OUTWARD
        radii = torch.where(constants > 0, gaps / constants, torch.where(gaps > 0, torch.inf, 0.0))
        return radii.clamp_min(0).scatter(1, first[:, None], 0.0)


def route_radii(moe: nn.Module, images: Tensor, norm: str = "l2", *, rounding: bool = True) -> Tensor:
    """Exact distances at which each expert can overtake the router's first choice i.

    Theorem. For scores g = <W, x> + b, expert k overtakes i within distance r exactly if r >= rho_k =
    (g_i - g_k) / ||W_i - W_k||_dual. Proof. g_i - g_k falls along d by <W_i - W_k, d> <= ||W_i - W_k||_dual ||d||,
    with equality for the best d. So the route is constant for r < min_k rho_k, and expert k is never chosen below
    rho_k (it may need more: it must also overtake all others). (Images outside [0, 1] count as reachable.)

    Args:
        moe: Mixture with a "linear" or "pooled" router.
        images: (B, C, H, W) in [0, 1].
        norm: Norm of the distance: "l2", "linf" or "l1"; the dual norms are L2, L1 and L-inf.
        rounding: Round inward, by a proved bound of the error of float32 scores.

    Returns:
        (B, E) float64; 0 for the first choice, inf for an expert that can never overtake it.

    Raises:
        NotApplicableError: The router is not affine in the image.
        ValueError: The norm is unknown.
    """
    return AffineRouter(moe, norm).radii(images, rounding)


__all__ = ["AffineRouter", "effective_router_weight", "route_radii"]
