"""The theorems behind the certificates, as functions of margins and of the constants that bound how fast they fall.

Paper: *Optimizing Robustness and Accuracy in Mixture of Experts: A Dual-Model Approach*, https://arxiv.org/abs/2502.06832
"""

import torch
from torch import Tensor


def check_alpha_certifies(alpha: float) -> None:
    """Raise a ValueError unless alpha is in (1/2, 1]: below, a confident F_S outvotes any F_R."""
    if not 0.5 < alpha <= 1:  # also false for NaN
        raise ValueError(f"alpha={alpha!r} must be in (1/2, 1]: below, F_S can outvote whatever is proved about F_R.")


def margin_radius(margins: Tensor, slope: Tensor) -> Tensor:
    """Radius from margins that fall by at most `slope` per unit: min_j m_j(x) / D (paper, Eq. 8, with D as below).

    Theorem. If every m_j(x') >= m_j(x) - D ||x' - x||, then all m_j(x') > 0 for ||x' - x|| < min_j m_j(x) / D. For a
    mixture with a soft gate D is `soft_gate_slope`; for a network the largest constant of its margins.

    Args:
        margins: (B, C) f_y - f_j at the images; +inf at j = y.
        slope: (B,) or (B, C) D > 0, in the norm of the radius.

    Returns:
        (B,) radii; not positive where the class is already lost.
    """
    slope = slope if slope.ndim == 2 else slope[:, None]
    if not (slope > 0).all():
        raise ValueError("slope must be > 0 everywhere.")
    return torch.where(torch.isposinf(margins), torch.inf, margins / slope).amin(dim=1)  # inf / inf is no number


def weighted(weight: float, values: Tensor) -> Tensor:
    """weight * values; 0 for weight 0, also where a value is inf, as the margin of a class over itself is."""
    return weight * values if weight else torch.zeros_like(values)


def dual_radius(
    robust_margins: Tensor,
    robust_slope: Tensor,
    alpha: float,
    standard_margins: Tensor | None = None,
    standard_slope: Tensor | None = None,
) -> Tensor:
    """Radius of the dual model F_D = (1 - alpha) F_S + alpha F_R, mixed as probabilities (paper, Eq. 9).

    Theorem. For alpha > 1/2, F_D(x') has class y wherever m^R_j(x') > (1 - alpha) / alpha for all j, whatever F_S
    says; so the radius is min_j (m^R_j(x) - (1 - alpha) / alpha) / D_R. Proof. m^D_j = (1 - alpha) m^S_j + alpha
    m^R_j, and m^S_j >= -1 as a difference of probabilities. With a bound for F_S also, m^D_j falls by at most
    (1 - alpha) D_S + alpha D_R per unit, so min_j m^D_j(x) / ((1 - alpha) D_S + alpha D_R) holds for any alpha; the
    better of the two is returned.

    Args:
        robust_margins: (B, C) probability margins p_y - p_j of F_R in [-1, 1]; +inf at j = y.
        robust_slope: (B,) D_R.
        alpha: Weight of F_R; in (1/2, 1] unless F_S has a bound.
        standard_margins, standard_slope: The same of F_S, where it has a bound.

    Returns:
        (B,) radii; not positive where nothing is certified.

    Raises:
        ValueError: alpha <= 1/2 without a bound of F_S, or out of [0, 1].
    """
    if standard_slope is None:
        check_alpha_certifies(alpha)
        return margin_radius(robust_margins - (1 - alpha) / alpha, robust_slope)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r} must be in [0, 1].")
    mixed = weighted(1 - alpha, standard_margins) + weighted(alpha, robust_margins)
    joint = margin_radius(mixed, weighted(1 - alpha, standard_slope) + weighted(alpha, robust_slope))
    return joint if alpha <= 0.5 else torch.maximum(joint, dual_radius(robust_margins, robust_slope, alpha))


def hard_gate_radius(routes: Tensor, expert_radii: Tensor) -> Tensor:
    """Radius of a mixture that uses the router's first choice alone: min_k max(rho_k, R_k).

    Theorem. Let rho_k be the distance below which expert k is never chosen and R_k the radius at which expert k itself
    keeps class y (<= 0 where it has another class at x). The class is y at x' if every expert that can be chosen there
    keeps it; so sup{r : every k with rho_k <= r has R_k >= r} = min_k max(rho_k, R_k) is certified. Proof. Below it,
    each k has r < rho_k (never chosen) or r < R_k (keeps y).

    Args:
        routes: (B, E) rho_k, 0 for the first choice; from `route_radii`.
        expert_radii: (B, E) R_k.

    Returns:
        (B,) radii.
    """
    return torch.maximum(routes, expert_radii).amin(dim=1)


__all__ = ["check_alpha_certifies", "dual_radius", "hard_gate_radius", "margin_radius"]
