"""Proved lower bounds of a classifier's margins at a distance from an image, as functions of the radius.

A floor maps radii (B,) to lower bounds (B, C) of the probability margins p_y(x') - p_j(x') over all x' within that
distance of image x, with y the class to keep and +inf at j = y. It never rises with the radius, so the largest radius
at which a condition on it holds is found by bisection.

Everything here is float64; B images, C classes, E experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .lipschitz import LipschitzBound

FLOAT_ERROR = 1e-5  # of a float32 logit, relative to 1 + the largest logit; networks of 50 layers stay ten times below
BISECTIONS = 60

Floor = Callable[[Tensor], Tensor]


def logit_margins(logits: Tensor, classes: Tensor) -> Tensor:
    """z_y - z_j (B, C) from logits (B, C) and classes y (B,), float64; +inf at j = y."""
    logits = logits.double()
    margins = logits.gather(1, classes[:, None]) - logits
    return margins.scatter(1, classes[:, None], torch.inf)


def probability_margins(logit_margins: Tensor) -> Tensor:
    """Least p_y - p_j (B, C) of a softmax whose logit margins are at least z_y - z_j >= m_j (B, C).

    Proof. p_y = 1 / (1 + sum_b exp(-(z_y - z_b))) rises with every margin. Where m_j >= 0, p_y - p_j =
    p_y (1 - exp(-(z_y - z_j))) is a product of two factors that are not negative and rise with the margins; it is
    reached when all margins are at their floors. Where m_j < 0: if z_y - z_j >= 0 the difference is not negative;
    otherwise p_j - p_y = p_j (1 - exp(z_y - z_j)) with p_j <= 1 / (1 + exp(z_y - z_j)), so p_y - p_j >=
    tanh((z_y - z_j) / 2) >= tanh(m_j / 2).
    """
    right = 1 / (1 + torch.exp(-logit_margins).sum(dim=1, keepdim=True))
    # expm1: 1 - exp(-m) would lose the digits of small margins
    floors = torch.where(logit_margins >= 0, -right * torch.expm1(-logit_margins), torch.tanh(logit_margins / 2))
    return floors.masked_fill(torch.isposinf(logit_margins), torch.inf)


class NetworkFloor:
    """Floor of a network f whose logit margins have proved Lipschitz constants K: z_y - z_j >= (its value) - K_yj r.

    The margins are lowered by the rounding error of float32 logits, at the image and at the attacked image.

    Args:
        logits: (B, C) of the images.
        classes: (B,) int64, y.
        bound: Constants of the logits.
    """

    def __init__(self, logits: Tensor, classes: Tensor, bound: LipschitzBound):
        error = FLOAT_ERROR * (1 + logits.double().abs().amax(dim=1, keepdim=True))
        self.margins = logit_margins(logits, classes) - 4 * error  # two logits, twice
        self.slopes = bound.margins.to(logits.device)[classes]  # (B, C)
        self.largest_slope = float(bound.margins.max())

    def at(self, radius: Tensor) -> Tensor:
        """Least logit margins (B, C) within radius (B,)."""
        return self.margins - self.slopes * radius[:, None]

    def __call__(self, radius: Tensor) -> Tensor:
        return probability_margins(self.at(radius))


class HardGateFloor:
    """Floor of a mixture that uses one expert per image, the router's first choice.

    Proof. Within distance r of x only the experts with route radius rho_k <= r can be chosen. Whichever is, its
    margins at x' are at least its floor at r; so the least of these floors holds for the mixture.

    Args:
        route_radii: (B, E) distances below which each expert is never chosen; 0 for the first choice.
        experts: A floor for each expert, all for the same classes.
    """

    def __init__(self, route_radii: Tensor, experts: list[Floor]):
        self.route_radii, self.experts = route_radii, experts

    def __call__(self, radius: Tensor) -> Tensor:
        floors = torch.stack([expert(radius) for expert in self.experts], dim=1)  # (B, E, C)
        out_of_reach = self.route_radii > radius[:, None]
        return floors.masked_fill(out_of_reach[:, :, None], torch.inf).amin(dim=1)


class SoftGateFloor:
    """Floor of a dense mixture sum_i a_i(x) p_i(x) of the experts' probabilities; the better of two theorems.

    (1) Margin theorem: see `soft_gate_slope`; with M_i = 1, since a probability margin is in [-1, 1]; L_i = K_i / 2
    for experts whose logit margins have constants up to K_i; r_i = max_k R_ik / 4 for router score differences with
    constants R_ik. Both follow from d p_a = p_a sum_b p_b d(z_a - z_b): |d a_i| <= a_i (1 - a_i) max_k |d(g_i - g_k)|,
    and with s = p_y + p_j, |d(p_y - p_j)| <= (2 p_y p_j + s (1 - s)) K <= (s - s**2 / 2) K <= K / 2.

    (2) Gate box: the margin at x' is sum_i w_i m_ij(x') / sum_i w_i for w_i = exp(g_i - g_k), any reference k, and
    m_ij(x') is at least expert i's floor h_ij. Each w_i has moved by a factor between exp(-R_ik r) and exp(R_ik r).
    The least ratio sum_i w_i h_ij / sum_i w_i over this box has the largest weights where h_ij lies below the ratio
    and the smallest elsewhere (the sign of its derivative in w_i); so it is one of E + 1 corners, by order of h_ij.

    Args:
        scores: (B, E) router scores of the images, float64.
        score_constants: (E, E) Lipschitz constants of their differences.
        experts: A network floor for each expert, all for the same classes.
    """

    def __init__(self, scores: Tensor, score_constants: Tensor, experts: list[NetworkFloor]):
        self.gates = scores.softmax(dim=1)
        self.scores, self.constants, self.experts = scores, score_constants.to(scores), experts
        zero = scores.new_zeros(len(scores))
        margins = torch.stack([expert(zero) for expert in experts], dim=1)  # (B, E, C)
        own = torch.isposinf(margins)  # set apart: a gate of 0 times inf is no number
        margins = (self.gates[:, :, None] * margins.masked_fill(own, 0.0)).sum(dim=1)
        self.margins = margins.masked_fill(own[:, 0], torch.inf)
        gate_constants = self.constants.amax(dim=1) / 4
        slopes = torch.tensor([expert.largest_slope / 2 for expert in experts]).to(scores)
        self.slope = soft_gate_slope(self.gates, gate_constants, torch.ones_like(slopes), slopes)

    def theorem(self, radius: Tensor) -> Tensor:
        """Bound (1), (B, C)."""
        return self.margins - (self.slope * radius)[:, None]

    def box(self, radius: Tensor) -> Tensor:
        """Bound (2), (B, C): the best reference k."""
        floors = torch.stack([expert(radius) for expert in self.experts], dim=1)  # (B, E, C)
        own = torch.isposinf(floors[:, :1])
        floors = floors.masked_fill(torch.isposinf(floors), 1.0)
        floors, order = floors.sort(dim=1)
        best = None
        for reference in self.constants:  # (E,)
            shifts = (reference * radius[:, None])[:, :, None].expand_as(order).gather(1, order)
            scores = self.scores[:, :, None].expand_as(order).gather(1, order)
            corner = corner_minimum(floors, scores - shifts, scores + shifts)
            best = corner if best is None else torch.maximum(best, corner)
        return best.masked_fill(own[:, 0], torch.inf)

    def __call__(self, radius: Tensor) -> Tensor:
        return torch.maximum(self.theorem(radius), self.box(radius))


def corner_minimum(floors: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Least sum_i w_i h_i / sum_i w_i over log w_i in [low_i, high_i]; h (B, E, C) ascending along E -> (B, C)."""
    top = high.amax(dim=1, keepdim=True)
    low, high = (low - top).exp(), (high - top).exp()  # a common factor leaves the ratio as it is, and exp in range
    values = []
    for count in range(floors.shape[1] + 1):  # the `count` lowest have the largest weights
        weights = torch.cat([high[:, :count], low[:, count:]], dim=1)
        values.append((weights * floors).sum(dim=1) / weights.sum(dim=1))
    return torch.stack(values).amin(dim=0)


def soft_gate_slope(gates: Tensor, gate_constants: Tensor, margin_sizes: Tensor, margin_constants: Tensor) -> Tensor:
    """D of the margin theorem for soft gates (paper, Eq. 8): how fast the mixture's margins can fall.

    Theorem. Let m_j = sum_i a_i m_ij with |m_ij| <= M_i everywhere, m_ij of Lipschitz constant L_i and a_i of r_i, all
    in one norm. Then |m_j(x') - m_j(x)| <= D ||x' - x|| with D = sum_i (r_i M_i + a_i(x) L_i).

    Proof. m_j(x') - m_j(x) = sum_i (a_i(x') - a_i(x)) m_ij(x') + a_i(x) (m_ij(x') - m_ij(x)); the terms are at most
    r_i M_i ||x' - x|| and a_i(x) L_i ||x' - x||. A hard gate jumps: no r_i exists and nothing follows for it.

    Args:
        gates: (B, E) a_i(x) >= 0.
        gate_constants, margin_sizes, margin_constants: (E,) r_i, M_i and L_i, finite and >= 0.

    Returns:
        (B,) D.

    Raises:
        ValueError: A constant is negative or not finite.
    """
    named = {"gate_constants": gate_constants, "margin_sizes": margin_sizes, "margin_constants": margin_constants}
    for name, values in named.items():
        if not (torch.isfinite(values).all() and (values >= 0).all()):
            raise ValueError(f"{name}={values.tolist()} must be finite and >= 0.")
    return (gate_constants * margin_sizes).sum() + gates @ margin_constants


def largest_radius(holds: Callable[[Tensor], Tensor], limit: float, batch: Tensor) -> Tensor:
    """The largest radius in [0, limit] up to which a condition holds that, once broken, stays broken.

    Args:
        holds: Radii (B,) -> (B,) bool.
        limit: Largest distance of interest.
        batch: (B,) of the wanted dtype and device.

    Returns:
        (B,) radii at which it holds, below the true ones by 2**-60 of the limit at most; -1 where it fails at 0.
    """
    low, high = torch.zeros_like(batch), torch.full_like(batch, limit)
    fails_at_zero, whole = ~holds(low), holds(high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        good = holds(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    low = torch.where(whole, torch.full_like(low, limit), low)
    return torch.where(fails_at_zero, torch.full_like(low, -1.0), low)


__all__ = [
    "HardGateFloor",
    "NetworkFloor",
    "SoftGateFloor",
    "largest_radius",
    "logit_margins",
    "probability_margins",
    "soft_gate_slope",
]
