"""Full float32 precision while attacks, evaluations and certificates compute."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute in float32 what is in float32: no TF32 on GPUs, no bfloat16 in its place on CPUs, no autocast.

    cuDNN's convolutions use TF32 unless told otherwise, with errors of 1e-3: too much for a certificate, and for a
    number that another machine should find again. The caller's settings come back on exit, also after an exception.
    """
    parts = _float32_parts()
    legacy = {name: value for name, (read, _) in _LEGACY.items() if (value := _readable(read)) is not None}
    before = [_own_precision(part) for part in parts]
    try:
        with ExitStack() as off:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    off.enter_context(torch.autocast(device, enabled=False))
            # every part by name: "highest" leaves some of them at TF32
            _set_precision(dict.fromkeys(_LEGACY, "highest"), parts, ["ieee"] * len(parts))
            yield
    finally:
        _set_precision(legacy, parts, before)


# torch has an old and a new interface, and raises where one is read that does not agree with the other
_LEGACY: dict[str, tuple[Callable[[], str], Callable[[str], None]]] = {
    "matmul": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "cudnn": (
        lambda: "high" if torch.backends.cudnn.allow_tf32 else "highest",
        lambda value: setattr(torch.backends.cudnn, "allow_tf32", value != "highest"),
    ),
}


def _float32_parts() -> list[Any]:
    """The parts of torch that may compute float32 in less."""
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    return [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]


def _own_precision(part: Any) -> str:
    """A part's own setting; "none" where it follows the setting of all, which may change later."""
    value, part.fp32_precision = part.fp32_precision, "none"  # "none" makes the part show the setting of all
    return "none" if part.fp32_precision == value else value


def _readable(read: Callable[[], str]) -> str | None:
    try:
        return read()
    except RuntimeError:  # the caller has used the new interface
        return None


def _set_precision(legacy: dict[str, str], parts: list[Any], values: list[str]) -> None:
    for name, value in legacy.items():
        _LEGACY[name][1](value)  # first: it writes some of the parts as well
    for part, value in zip(parts, values, strict=True):
        part.fp32_precision = value


def check_no_autocast() -> None:
    """Raise a ValueError where autocast rounds a float32 network to half precision: no certificate allows for that."""
    for device in ("cpu", "cuda", "xpu", "mps"):
        if torch.is_autocast_enabled(device):
            raise ValueError(f"autocast is on for {device}; certificates are about float32. Call outside of it.")


__all__ = ["check_no_autocast", "full_precision"]
