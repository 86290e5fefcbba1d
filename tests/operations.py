"""What a test of the training step counts, and a CUDA graph for tests on a CPU."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_dualmoe.trainer.nonfinite import copy_buffers, restore_buffers


class Operations(TorchDispatchMode):
    """Counts the operations within it, but for views; `casts` are the shapes whose dtype was changed."""

    def __init__(self):
        super().__init__()
        self.counts, self.casts = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.counts[str(func)] += 1
        if func.overloadpacket is torch.ops.aten._to_copy and args[0].dtype != out.dtype:
            self.casts.append(tuple(args[0].shape))
        return out

    @property
    def total(self) -> int:
        return sum(self.counts.values())


class Tape(TorchDispatchMode):
    """Keeps the operations within it, as a CUDA graph does: with the tensors they had, and numbers as they were."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.steps.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        """Compute everything again, into the same tensors."""
        for func, args, kwargs, out in self.steps:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeRecorder:
    """Stands for `CudaRecorder`: what it records is executed on the CPU, and undone, as a GPU would not execute it."""

    def __init__(self, trainer: Any):
        self.trainer, self.replays = trainer, 0

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        yield

    def has_room(self) -> bool:
        return True

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        buffers, random_state = copy_buffers(self.trainer.model), torch.get_rng_state()
        sums = {name: total.clone() for name, total in self.trainer.step_graph.step.sums.items()}
        tape = Tape()
        with tape:
            result = function()
        restore_buffers(self.trainer.model, buffers)
        torch.set_rng_state(random_state)
        for name, total in sums.items():
            self.trainer.step_graph.step.sums[name].copy_(total)
        for leaf in (result.loss, result.values, *result.gradients):
            if leaf is not None:
                leaf.fill_(torch.nan)  # nothing was computed yet

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return result, replay
