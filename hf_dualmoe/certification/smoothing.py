"""Randomized smoothing: L2 certificates for any classifier, with a stated confidence.

    certificates = smoothed_certificates(model, images, sigma=0.25, seed=0, ids=ids)
    certificates = smoothed_certificates(dual, images, sigma=0.25, alpha=0.8)

Cohen, Rosenfeld and Kolter 2019, https://arxiv.org/abs/1902.02918. What is certified is the smoothed classifier, which
votes over noisy copies of an image, not the model itself. All radii and sigma are in [0, 1] pixel units.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from scipy.stats import beta
from torch import Tensor, nn

from ..attacks.base import Classifier, check_counts
from ..attacks.precision import check_no_autocast, full_precision
from ..models.outputs import logits_of
from ..models.parts import at_alpha, is_dual, mixes_weights, part_of
from .certifier import Certificates
from .lipschitz import check_eval_mode
from .theorems import check_alpha_certifies

OUTWARD = 1 + 1e-9  # relative: all here is float64
DRAWS = 100  # noisy copies per generator: part of what makes the noise of an image, whatever the batch size
SELECTION, ESTIMATION = 0, 1  # separate noise: the class must not be chosen on the votes that are counted


@dataclass
class Votes:
    """Votes of a classifier over noisy copies of B images.

    Args:
        selected: (B,) int64 the class with most of the n0 selection votes.
        counts: (B,) int64 how many of the n estimation votes it has.
        num_samples: n.
        sigma: Standard deviation of the noise.
    """

    selected: Tensor
    counts: Tensor
    num_samples: int
    sigma: float


def lower_probability(counts: Tensor, num_samples: int, confidence: float = 0.999) -> Tensor:
    """Clopper-Pearson lower bound of a probability, from `counts` (B,) hits among n independent draws.

    Theorem. With count ~ Binomial(n, p), the bound q with P(Binomial(n, q) >= count) = 1 - confidence (0 for
    count = 0) is at most p with probability `confidence` at least, for every p. It is the quantile 1 - confidence of
    Beta(count, n - count + 1).

    Returns:
        (B,) float64 in [0, 1), rounded down.

    Raises:
        ValueError: A count is not in [0, n], or the confidence is not in (0, 1).
    """
    check_confidence(confidence)
    counts = counts.long().cpu()
    if num_samples < 1 or not ((counts >= 0) & (counts <= num_samples)).all():
        raise ValueError(f"counts={counts.tolist()} must lie in [0, num_samples] = [0, {num_samples}].")
    # Beta(0, n + 1) does not exist; its rows are set to 0 below
    quantile = beta.ppf(
        1 - confidence, counts.clamp_min(1).double().numpy(), (num_samples - counts + 1).double().numpy()
    )
    return torch.as_tensor(quantile, dtype=torch.float64).masked_fill(counts == 0, 0.0) / OUTWARD


def smoothed_radius(probability: Tensor, sigma: float, alpha: float = 1.0) -> Tensor:
    """L2 radius of a smoothed classifier, or of a dual model whose F_R is smoothed; <= 0 certifies nothing.

    Setting. f_R is any classifier (measurable, on all of R^d), and the smoothed F_R gives class c the probability
    q_c(x) = P(f_R(x + e) = c), e ~ N(0, sigma^2 I): numbers in [0, 1] that add up to 1. F_D = (1 - alpha) F_S +
    alpha q for any F_S with probabilities.

    Theorem. If q_y(x) >= p, then F_D has class y at all x' with ||x' - x||_2 < sigma (Phi^-1(p) - Phi^-1(1 / 2alpha)).
    Proof. (1) By the lemma of Neyman and Pearson, among all sets with probability p under N(x, sigma^2 I) the
    half-space facing away from x' has the least under N(x', sigma^2 I): q_y(x') >= Phi(Phi^-1(p) - ||x'-x|| / sigma).
    Within the radius this is more than 1 / 2alpha. (2) All other classes together have 1 - q_y(x'), so every margin
    q_y - q_j at x' is at least 2 q_y(x') - 1 > 1 / alpha - 1 = (1 - alpha) / alpha. (3) That is the dual rule: the
    margins of F_S are at least -1, so those of F_D are above -(1 - alpha) + alpha (1 - alpha) / alpha = 0. At alpha =
    1 this is the radius sigma Phi^-1(p) of Cohen et al.; at alpha <= 1/2 nothing follows, as 1 / 2alpha >= 1.

    Args:
        probability: (B,) lower bounds p in [0, 1] of q_y(x).
        sigma: Standard deviation of the noise, > 0.
        alpha: Weight of F_R in (1/2, 1]; 1 for a classifier alone.

    Returns:
        (B,) float64 radii; -inf where p = 0.

    Raises:
        ValueError: sigma or alpha is out of range, or a probability is.
    """
    check_sigma(sigma)
    check_alpha_certifies(alpha)
    if not ((probability >= 0) & (probability <= 1)).all():
        raise ValueError(f"probability={probability.tolist()} must lie in [0, 1].")
    normal = torch.distributions.Normal(0.0, 1.0)
    needed = NormalDist().inv_cdf(1 / (2 * alpha)) * (OUTWARD if alpha < 1 else 1)  # exactly 0 at alpha = 1
    return sigma * (normal.icdf(probability.double() / OUTWARD) - needed) / OUTWARD


# --- votes -----------------------------------------------------------------------------------------------------------


def noise_block(
    shape: Sequence[int], seed: int, image_id: int, stage: int, block: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal noise (DRAWS, *shape) of one image, from a generator of its own, drawn on the device.

    Each kind of device has a sequence of its own: votes repeat on the same kind, and are as good on another.
    """
    # one-to-one while ids and blocks stay below 1,000,003: no two draws share a generator
    key = (((seed * 1_000_003 + image_id) * 2 + stage) * 1_000_003 + block) % 2**63
    generator = torch.Generator(device).manual_seed(key)
    return torch.randn((DRAWS, *shape), generator=generator, device=device)


@torch.no_grad()
def count_votes(
    classifier: Classifier, image: Tensor, num_samples: int, sigma: float, batch_size: int, key: tuple[int, int, int]
) -> Tensor:
    """Votes (C,) int64 over `num_samples` noisy copies of an image (C, H, W); key = seed, id, stage.

    Noisy copies are clipped to [0, 1]. The classifier that is smoothed includes the clipping, so it is defined on all
    of R^d, as the theorem wants.
    """
    votes: Tensor | None = None
    blocks = math.ceil(num_samples / DRAWS)
    per_batch = max(1, batch_size // DRAWS)
    for start in range(0, blocks, per_batch):
        numbers = range(start, min(start + per_batch, blocks))
        noise = torch.cat([noise_block(image.shape, *key, block, image.device) for block in numbers])
        noise = noise[: num_samples - start * DRAWS].to(image)  # the last block is drawn whole, then cut
        predictions = []
        for part in noise.split(batch_size):
            logits = logits_of(classifier, (image + sigma * part).clamp(0, 1))
            if not torch.isfinite(logits).all():
                raise ValueError("model returned logits that are NaN or infinite on noisy images.")
            predictions.append(logits.argmax(dim=1))
        found = torch.bincount(torch.cat(predictions), minlength=logits.shape[1])
        votes = found if votes is None else votes + found
    return votes.cpu()


def sample_votes(
    classifier: Classifier,
    images: Tensor,
    *,
    sigma: float,
    n0: int = 100,
    n: int = 1000,
    batch_size: int = 1000,
    seed: int = 0,
    ids: Tensor | None = None,
) -> Votes:
    """Let a classifier vote over noisy copies of images, in batches.

    Args:
        classifier: Callable from images (B, C, H, W) in [0, 1] to logits; a module must be in eval mode.
        images: (B, C, H, W) floats in [0, 1].
        sigma: Standard deviation of the noise, > 0, in [0, 1] pixel units.
        n0: Copies on which the class of each image is chosen.
        n: Further copies on which its votes are counted.
        batch_size: Copies per forward; changes nothing else.
        seed: Seed of the noise; each image draws from generators of its own.
        ids: (B,) int64 numbers of the images in their dataset; None = 0 .. B-1.

    Raises:
        ValueError: An argument is out of range, the model is in train mode, or autocast is on.
    """
    check_sigma(sigma)
    check_counts({"n0": n0, "n": n, "batch_size": batch_size})
    check_no_autocast()
    if isinstance(classifier, nn.Module):
        check_eval_mode(classifier)
    numbers = range(len(images)) if ids is None else ids.tolist()
    selected, counts = [], []
    with full_precision():
        for image, number in zip(images, numbers, strict=True):
            chosen = int(count_votes(classifier, image, n0, sigma, batch_size, (seed, number, SELECTION)).argmax())
            votes = count_votes(classifier, image, n, sigma, batch_size, (seed, number, ESTIMATION))
            selected.append(chosen)
            counts.append(int(votes[chosen]))
    return Votes(torch.tensor(selected, dtype=torch.int64), torch.tensor(counts, dtype=torch.int64), n, sigma)


def certify_votes(votes: Votes, *, alpha: float = 1.0, confidence: float = 0.999) -> Certificates:
    """Certificates from votes; the same votes serve any number of alphas, as one event makes them all right.

    Args:
        votes: Votes of f_R.
        alpha: Weight of the smoothed F_R in a dual model, in (1/2, 1]; 1 = the smoothed classifier alone.
        confidence: Probability, for each image, that its certificate is right.

    Returns:
        Certificates in L2. The prediction is that of the smoothed model where certified, else -1.
    """
    radius = smoothed_radius(lower_probability(votes.counts, votes.num_samples, confidence), votes.sigma, alpha)
    rule = "smoothing" if alpha == 1 else "dual over smoothing"
    certificates = Certificates.from_radii(votes.selected, {rule: radius}, "l2", confidence)
    # where the vote abstains, the smoothed model has no class that is known with confidence
    certificates.prediction = certificates.prediction.masked_fill(certificates.radius.isnan(), -1)
    return certificates


def smoothed_certificates(
    model: nn.Module,
    images: Tensor,
    *,
    sigma: float,
    alpha: float | None = None,
    n0: int = 100,
    n: int = 1000,
    confidence: float = 0.999,
    batch_size: int = 1000,
    seed: int = 0,
    ids: Tensor | None = None,
) -> Certificates:
    """L2 certificates of the smoothed model: of a classifier, or of a dual model whose F_R is smoothed.

    For a dual model the certified model is (1 - alpha) F_S(x) + alpha q(x), where q_c(x) is the probability that
    *F_R alone* has class c on x with noise; F_S sees no noise and may be anything. The theorem is at
    `smoothed_radius`.

    Args:
        model: Image classifier in eval mode; of a dual model F_R votes, or with a dial in the weights the merged
            network.
        images: (B, C, H, W) floats in [0, 1].
        sigma: Standard deviation of the noise, > 0, in [0, 1] pixel units.
        alpha: Weight of F_R of a dual model, in (1/2, 1], or with a dial in the weights in [0, 1]; None = the
            config's. Of other models None.
        n0, n, batch_size, seed, ids: As in `sample_votes`.
        confidence: Probability, for each image, that its certificate is right.

    Returns:
        Certificates; an image abstains where the votes prove nothing, as they do with too few samples.

    Raises:
        ValueError: The model is in train mode, or an argument is out of range.
    """
    check_confidence(confidence)
    if alpha is not None and mixes_weights(model):
        model, alpha = at_alpha(model, alpha), None  # one network answers, and it has no dial
    dual = is_dual(model)
    if alpha is not None and not dual:
        raise ValueError(f"alpha={alpha!r} was given, but the model has no dial.")
    alpha = (model.config.alpha if alpha is None else alpha) if dual else 1.0
    check_alpha_certifies(alpha)
    check_eval_mode(model)
    classifier = part_of(model, "robust") if dual else model
    votes = sample_votes(classifier, images, sigma=sigma, n0=n0, n=n, batch_size=batch_size, seed=seed, ids=ids)
    return certify_votes(votes, alpha=alpha, confidence=confidence)


def check_sigma(sigma: float) -> None:
    """Raise a ValueError unless sigma is a finite number > 0."""
    if not 0 < sigma < math.inf:  # also false for NaN
        raise ValueError(f"sigma={sigma!r} must be finite and > 0, in [0, 1] pixel units.")


def check_confidence(confidence: float) -> None:
    """Raise a ValueError unless confidence is in (0, 1)."""
    if not 0 < confidence < 1:  # also false for NaN
        raise ValueError(f"confidence={confidence!r} must be in (0, 1).")


__all__ = [
    "Votes",
    "certify_votes",
    "lower_probability",
    "sample_votes",
    "smoothed_certificates",
    "smoothed_radius",
]
