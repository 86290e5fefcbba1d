"""Out of memory: recognise it, find the largest training batch that fits, and say so."""

import gc
from collections.abc import Callable
from contextlib import suppress

import torch

# what CUDA, cuDNN and cuBLAS say, and the allocator of the CPU
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
REFINEMENTS = 2  # bisections between the half that fits and the whole that does not


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, in any of the words of torch and of the libraries below it."""
    named = any(words in str(error) for words in OUT_OF_MEMORY)
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and named)


def largest_that_fits(fits: Callable[[int], bool], size: int) -> int:
    """The largest number of images below `size` that was found to fit, by halving and then bisection; 0 = not even 1.

    Args:
        fits: Tries a step with so many images.
        size: A number that does not fit.
    """
    low, high = size // 2, size
    while low > 0 and not fits(low):
        low, high = low // 2, low
    for _ in range(REFINEMENTS if low > 0 else 0):
        middle = (low + high) // 2
        if middle in (low, high):
            break
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def free_memory() -> None:
    """Give back what nothing holds any more."""
    gc.collect()  # frames of a traceback hold tensors, in reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def try_step(step: Callable[[], object]) -> bool:
    """Whether a step fits into memory; what it made is dropped."""
    with suppress(torch.OutOfMemoryError):
        step()
        return True
    free_memory()
    return False


def too_large(size: int, largest: int | None, accumulation: int) -> str:
    """Message about a batch of `size` images; `largest` fit in a trial, None = there was none."""
    words = f"per_device_train_batch_size={size} does not fit into the memory of this device."
    if largest == 0:
        return f"{words} Not even one image does: take a smaller model, fewer experts, or --gradient_checkpointing."
    smaller = max(1, size // 2) if largest is None else largest
    parts = accumulation * -(-size // smaller)
    tried = "" if largest is None else f" The largest batch that did in a trial is {largest}."
    return f"{words}{tried} Try --per_device_train_batch_size {smaller} --gradient_accumulation_steps {parts}."


__all__ = ["free_memory", "is_out_of_memory", "largest_that_fits", "too_large", "try_step"]
