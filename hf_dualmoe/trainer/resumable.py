"""`ResumableTrainer`: whole checkpoints, exact resuming, finite numbers.

A run that is killed anywhere resumes from its last checkpoint and ends with the same weights and moving average, on a
CPU to the bit. (A log line that spans the kill tells of the steps since.)
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, rotate_checkpoints
from transformers.utils import logging

from .arguments import RobustTrainingArguments
from .checkpoints import (
    MANIFEST_NAME,
    PROGRESS_NAME,
    STATE_NAME,
    UNFINISHED,
    check_checkpoint,
    clear_unfinished,
    explain_failed_write,
    finish_checkpoint,
    last_good_checkpoint,
    read_progress,
)
from .nonfinite import NonFiniteWatch
from .step_parts import share_buffers

EMA_WEIGHTS_NAME = "ema.safetensors"
MAX_EMA_LOSS = 1.0  # points by which the moving average may be behind the trained weights and still be kept

logger = logging.get_logger(__name__)


class ResumableTrainer(Trainer):
    """A Trainer whose runs can be interrupted anywhere, with a moving average of the weights (`ema_decay`).

    Args:
        model: As in `transformers.Trainer`.
        args: Of these, `ema_decay`, `on_nan_loss` and `max_skipped_steps` are read here.
        kwargs: The other arguments of `transformers.Trainer`, as they are.

    Raises:
        ValueError: `on_nan_loss="skip"` with DeepSpeed, or `ema_decay` with weights that are spread over processes.

    Attributes:
        keeps_average: Whether the moving average is what `train` left in the model.
        train_seconds: How long training has taken so far, over all starts of the run.
    """

    def __init__(self, model: nn.Module, args: RobustTrainingArguments, **kwargs: Any):
        super().__init__(model=model, args=args, **kwargs)
        if args.on_nan_loss == "skip" and self.is_deepspeed_enabled:
            raise ValueError("on_nan_loss='skip' does not work with DeepSpeed, which keeps the gradients to itself.")
        if args.ema_decay > 0 and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            raise ValueError(
                f"ema_decay={args.ema_decay!r} does not work with weights that are spread over processes (FSDP, "
                "DeepSpeed ZeRO-3): give --ema_decay 0, or start with a configuration that keeps them whole, such as "
                "multi_gpu.yaml."
            )
        self._sums: dict[str, Tensor] = {}  # (sum, count) of what the next log tells
        self._is_saving = False
        self._started: float | None = None  # while it trains
        self._earlier_seconds = 0.0
        self._goes_on_from: Path | None = None  # checkpoint of this start
        self.keeps_average = False
        scales_gradients = getattr(self.accelerator, "scaler", None) is not None
        self.watch = NonFiniteWatch(args.on_nan_loss, args.max_skipped_steps, args.output_dir, not scales_gradients)
        self.add_callback(self.watch)
        self.add_callback(FinishedRunCallback())
        self.add_callback(BestCheckpointCallback(lambda: self._goes_on_from))
        self.ema: ModelEmaV3 | None = None
        if args.ema_decay > 0:
            self.ema = ModelEmaV3(self.model, decay=args.ema_decay, use_warmup=True)
            self.add_callback(EmaCallback(self))

    # --- going on --------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """The parent's, from a checkpoint that is whole; True takes the newest such one of `output_dir`.

        Raises:
            CheckpointError: The checkpoint, or each there is, is damaged.
            FileNotFoundError: With `ema_decay`, the checkpoint was written without.
            FloatingPointError: See `on_nan_loss`.
        """
        if resume_from_checkpoint is True and (last := last_good_checkpoint(self.args.output_dir)):
            resume_from_checkpoint = str(last)
        is_named = resume_from_checkpoint is not None and not isinstance(resume_from_checkpoint, bool)
        self._goes_on_from = Path(resume_from_checkpoint) if is_named else None
        progress = self._take_over(resume_from_checkpoint) if is_named else {}
        # no jumps of the wall clock
        self._started, self._earlier_seconds = time.monotonic(), progress.get("seconds", 0.0)
        self._sums.clear()
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self._earlier_seconds, self._started = self.train_seconds, None

    def _take_over(self, folder: str) -> dict[str, Any]:
        """Check a checkpoint, and read what we keep in it beside the parent's state."""
        if os.path.isfile(os.path.join(folder, MANIFEST_NAME)):
            check_checkpoint(folder)
        if self.ema is not None:
            self._load_average(folder)
        progress = read_progress(folder)
        if progress:
            self.watch.load_state_dict(progress["watch"])
        return progress

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The parent's; none for a run that had finished, which would take a step before it looks for the end."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    # --- logs --------------------------------------------------------------------------------------------------------

    def _add(self, name: str, values: Tensor) -> None:
        self.add_sums({name: sum_and_count(values)})

    def add_sums(self, sums: dict[str, Tensor]) -> None:
        """Add (sum, count) of what the next log tells, by name."""
        for name, added in sums.items():
            self._sums[name] = self._sums[name] + added if name in self._sums else added

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last training log, over all processes.

        Raises:
            FloatingPointError: A loss since the last check was NaN or infinite.
        """
        if self.args.on_nan_loss == "stop":
            self.watch.check()
        if "loss" in logs and self._sums:
            sums = self._gather_sums()
            self._sums.clear()
            logs.update({name: round(s / n, 4) for name, (s, n) in sums.items() if n})
            if self.args.on_nan_loss == "skip":
                logs["skipped_steps"] = self.watch.skipped
        super().log(logs, start_time)

    def _gather_sums(self) -> dict[str, list[float]]:
        """(sum, count) of each logged quantity over all processes."""
        names = sorted(self._sums)  # in one order on all processes
        # one exchange for all
        sums = self.accelerator.reduce(torch.stack([self._sums[name] for name in names]), "sum")
        return dict(zip(names, sums.tolist(), strict=True))

    # --- moving average ----------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate the averaged weights where there are any; in training, not before all weights are finite."""
        if self.is_in_train:
            self.watch.check(self.model)
        with self._averaged_weights():
            share_buffers(self.model)  # each process has BatchNorm statistics of its own from its last step
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Let the model hold the moving average for the block, then the trained weights again."""
        if self.ema is None or not self.is_in_train:
            yield
            return
        trained = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema.module.state_dict())
        try:
            yield
        finally:
            self.model.load_state_dict(trained)

    def _choose_weights(self) -> None:
        """Leave the moving average in the model, unless it is clearly behind the trained weights."""
        if self.ema is None:
            return
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_average(self.state.best_model_checkpoint)
        ema, self.ema = self.ema, None  # evaluate the model as it is
        trained = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        before = self._accuracy()
        self.model.load_state_dict(ema.module.state_dict())
        after = None if before is None else self._accuracy()
        self.ema, self.keeps_average = ema, before is None or after >= before - MAX_EMA_LOSS
        if not self.keeps_average:
            self.model.load_state_dict(trained)
            logger.warning(
                f"The moving average of the weights (ema_decay={self.args.ema_decay:g}) is right for {after:.2f} % of "
                f"the evaluation images, the trained weights for {before:.2f} % (mean of SA and RA where both are "
                "measured): the trained weights are kept."
            )

    def _accuracy(self) -> float | None:
        """Mean of SA and RA, or SA alone, in % on the evaluation images; None without such images or metrics."""
        if self.eval_dataset is None or isinstance(self.eval_dataset, dict):
            return None
        metrics = self.predict(self.eval_dataset, metric_key_prefix="eval").metrics
        return metrics.get("eval_sa_ra_mean", metrics.get("eval_sa"))

    # --- checkpoints: whole or absent, with the moving average -----------------------------------------------------

    # Overridden: the parent asks it where to write, and is sent elsewhere while a checkpoint is not whole.
    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._is_saving else folder

    # Overridden: the parent writes file by file into checkpoint-N, where a killed run would leave half of one.
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let the parent write into an unfinished folder, add our files, give it its name, delete the oldest."""
        self.watch.check(self.model)
        run_dir, step = Path(self._get_output_dir(trial)), self.state.global_step
        with explain_failed_write(f"checkpoint-{step}", run_dir):
            if self.args.should_save:
                clear_unfinished(run_dir)
            self.accelerator.wait_for_everyone()
            self._is_saving = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._is_saving = False
            best = run_dir / f"checkpoint-{self.state.best_global_step}"
            if self.state.best_global_step == step or best.is_dir():
                self.state.best_model_checkpoint = str(best)
            self.accelerator.wait_for_everyone()  # each process writes its own random numbers' state
            if self.args.should_save:
                self._finish_checkpoint(run_dir, step)
            self.accelerator.wait_for_everyone()

    def _finish_checkpoint(self, run_dir: Path, step: int) -> None:
        folder = run_dir / UNFINISHED / f"checkpoint-{step}"
        self.state.save_to_json(str(folder / STATE_NAME))  # again: with the name of the best checkpoint
        progress = {"watch": self.watch.state_dict(), "seconds": round(self.train_seconds, 3)}
        (folder / PROGRESS_NAME).write_text(json.dumps(progress), encoding="utf-8")
        if self.ema is not None:
            save_model(self.ema.module, str(folder / EMA_WEIGHTS_NAME))
        finish_checkpoint(run_dir, step)
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        rotate_checkpoints(str(run_dir), limit, best, use_mtime=True)

    @property
    def train_seconds(self) -> float:
        running = 0.0 if self._started is None else time.monotonic() - self._started
        return self._earlier_seconds + running

    def _load_average(self, folder: str) -> None:
        path = os.path.join(folder, EMA_WEIGHTS_NAME)
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{path} is missing: this checkpoint was written without ema_decay (now {self.args.ema_decay})."
            )
        load_model(self.ema.module, path)


def sum_and_count(values: Tensor) -> Tensor:
    """(2,): the sum of the values that are finite (all of them, but in steps that are skipped), and their number."""
    # MPS has no float64
    values = values.detach().double().flatten() if values.device.type != "mps" else values.detach().float().flatten()
    finite = values.isfinite()
    return torch.stack([torch.where(finite, values, 0.0).sum(), finite.sum().to(values.dtype)])


class FinishedRunCallback(TrainerCallback):
    """A finished run that is started again neither evaluates nor saves once more."""

    def __init__(self) -> None:
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember where this start begins."""
        self.first_step = state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave out what the parent does after an epoch, where the epoch had no step."""
        if state.global_step == self.first_step:
            control.should_evaluate = control.should_save = False


class BestCheckpointCallback(TrainerCallback):
    """The best checkpoint is the one beside the checkpoint that a start goes on from, whatever path it had before.

    The parent keeps the path of the first start: of a folder that was moved, or is named from elsewhere, it finds
    nothing there, and the run would end with the last weights instead of the best.

    Args:
        goes_on_from: Gives the checkpoint of this start, or None.
    """

    def __init__(self, goes_on_from: Callable[[], Path | None]):
        self.goes_on_from = goes_on_from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Name the best checkpoint by where it is now."""
        folder = self.goes_on_from()
        if folder is not None and state.best_global_step is not None:
            best = folder.parent / f"checkpoint-{state.best_global_step}"
            if best.is_dir():
                state.best_model_checkpoint = str(best)


class EmaCallback(TrainerCallback):
    """Update the moving average after each optimizer step; at the end of training the model takes it over.

    The decay warms up to `ema_decay` by timm's rule, 1 - step^(-2/3): a short run is averaged over its last part, and
    nothing of the random start is left. The step is that of the Trainer, which a checkpoint keeps. BatchNorm
    statistics are averaged at the same decay, so that they are of the same time as the averaged weights.
    """

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Move the average towards the trained weights."""
        self.trainer.ema.update(model, step=state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the averaged weights (of the best checkpoint, where that was loaded) in the model."""
        self.trainer._choose_weights()


__all__ = ["BestCheckpointCallback", "EmaCallback", "ResumableTrainer"]
