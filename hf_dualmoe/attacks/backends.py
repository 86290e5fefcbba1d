"""The attacks of the AutoAttack union, by name, from this package or from an installed reference implementation."""

from collections.abc import Callable
from importlib import metadata

import torch
from torch import Tensor, nn

from .apgd import APGD
from .fab import FAB
from .square import Square

BACKENDS = ("hf_dualmoe", "torchattacks")


def make_attack(
    name: str, budget: dict[str, int], *, backend: str = "hf_dualmoe", eps: float, norm: str = "linf", seed: int = 0
) -> Callable:
    """One attack of the union: a callable with the contract of `PGD.__call__`.

    Args:
        name: "apgd-ce", "apgd-t", "fab-t" or "square".
        budget: Its entry in a version of `VERSIONS`.
        backend, eps, norm, seed: As in `autoattack`.
    """
    if backend == "torchattacks":
        return _torchattacks_attack(name, budget, eps=eps, norm=norm, seed=seed)
    if name == "fab-t":
        return FAB(**budget, eps=eps, norm=norm)
    if name == "square":
        return Square(**budget, eps=eps, norm=norm, seed=seed)
    objective = {"apgd-ce": "ce", "apgd-t": "dlr_targeted"}[name]
    return APGD(objective=objective, **budget, eps=eps, norm=norm, seed=seed)


def _torchattacks_attack(name: str, budget: dict[str, int], *, eps: float, norm: str, seed: int) -> Callable:
    """An attack of torchattacks behind our call contract."""
    try:
        import torchattacks
    except ImportError as error:
        raise ImportError("backend='torchattacks' needs it installed: pip install torchattacks") from error
    common = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps, "seed": seed}

    def attack(model: nn.Module, images: Tensor, labels: Tensor, *, ids: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            classes = model(images[:1]).shape[1]
        # torchattacks aims at n_classes - 1
        targets = {"n_classes": min(classes, budget.get("target_classes", 9) + 1)}
        made = {
            "apgd-ce": lambda: torchattacks.APGD(model, steps=budget["steps"], loss="ce", **common),
            "apgd-t": lambda: torchattacks.APGDT(model, steps=budget["steps"], **targets, **common),
            "fab-t": lambda: torchattacks.FAB(model, steps=budget["steps"], multi_targeted=True, **targets, **common),
            "square": lambda: torchattacks.Square(model, n_queries=budget["queries"], **common),
        }[name]()
        made.set_device(images.device)
        # attacks here run under no_grad; torchattacks seeds globally
        with torch.enable_grad(), torch.random.fork_rng():
            return made(images, labels).detach()

    return attack


def backend_name(backend: str) -> str:
    """Name and version of the implementation."""
    from .. import __version__  # here, since the package may import this module first

    return f"{backend} {__version__ if backend == 'hf_dualmoe' else metadata.version(backend)}"


__all__ = ["BACKENDS", "backend_name", "make_attack"]
