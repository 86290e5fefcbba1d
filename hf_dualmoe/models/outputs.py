"""What a classifier returns: logits, or something that has them."""

from collections.abc import Callable, Mapping

from torch import Tensor


def find_logits(output: object) -> Tensor:
    """The logits in an output of transformers, a dictionary with "logits", or a tuple that starts with them.

    Raises:
        ValueError: There are none; the message says what was returned.
    """
    logits = output
    if isinstance(output, (tuple, list)):
        logits = output[0] if output else None
    elif isinstance(output, Mapping):  # outputs of transformers too
        logits = output.get("logits")
    elif not isinstance(output, Tensor):
        logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"model returned a {type(output).__name__}; expected logits (B, C), an output or dictionary with "
            "'logits', or a tuple that starts with them."
        )
    return logits


def logits_of(model: Callable, images: Tensor) -> Tensor:
    """Logits (B, C) in float32, whatever kind of classifier `model` is.

    It gets a copy: some models normalise in place, and would change what an attack goes on from or returns.

    Raises:
        ValueError: It returns neither logits nor an output, a dictionary or a tuple that has them.
    """
    return find_logits(model(images.clone())).float()


__all__ = ["find_logits", "logits_of"]
