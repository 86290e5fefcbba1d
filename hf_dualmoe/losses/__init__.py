"""Training objectives, one function each.

In: a model, clean images, labels, attacks. Out: a `LossOutput`: the loss, its named terms, and what the log needs.

Calls: attacks, certification, models.
"""

from .adversarial import LossOutput, at_loss, jtdmoe_loss, rt_er_loss, standard_loss, trades_loss
from .certified import certified_loss

__all__ = ["LossOutput", "at_loss", "certified_loss", "jtdmoe_loss", "rt_er_loss", "standard_loss", "trades_loss"]
