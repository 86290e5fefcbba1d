"""Attacks: images of the same class, at most eps away, that a classifier gets wrong.

In: any callable from images (B, C, H, W) in [0, 1] to logits, and labels. Out: attacked images in the ball and in
[0, 1]; of the unions, which image withstood which attack.

Calls: models.
"""

from .adaptive_union import WorstCaseResult, worst_case
from .apgd import APGD
from .auto_attack import AutoAttackResult, autoattack
from .base import frozen
from .components import attack_experts, attack_router
from .fab import FAB
from .nfgsm import NFGSM
from .pgd import FGSM, PGD
from .precision import full_precision
from .square import Square

__all__ = [
    "APGD",
    "AutoAttackResult",
    "FAB",
    "FGSM",
    "NFGSM",
    "PGD",
    "Square",
    "WorstCaseResult",
    "attack_experts",
    "attack_router",
    "autoattack",
    "frozen",
    "full_precision",
    "worst_case",
]
