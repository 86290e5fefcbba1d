"""`ResumableTrainer`: what `RobustTrainer` needs to survive: whole checkpoints, exact resuming, finite numbers.

A run that was killed anywhere goes on from its last checkpoint and ends as if nothing had happened, on a CPU to the
bit, moving average and log included.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
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
    read_progress,
    rotate,
)
from .nonfinite import NonFiniteWatch, restore_buffers
from .step_parts import share_buffers

EMA_WEIGHTS_NAME = "ema.safetensors"
MAX_EMA_LOSS = 1.0  # points by which the moving average may be behind the trained weights and still be kept

logger = logging.get_logger(__name__)


class ResumableTrainer(Trainer):
    """A Trainer whose runs can be interrupted anywhere, with a moving average of the weights (`ema_decay`).

    Args:
        model, args, kwargs: As in `transformers.Trainer`; of the arguments, `ema_decay`, `on_nan_loss` and
            `max_skipped_steps` are read here.

    Raises:
        ValueError: `on_nan_loss="skip"` with DeepSpeed, or `ema_decay` with weights that are spread over processes.

    Attributes:
        keeps_average: Whether the moving average is what `train` left in the model.
        train_seconds: How long training has taken so far, over all starts of the run.
    """

    def __init__(self, model: nn.Module, args: RobustTrainingArguments, **kwargs):
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
        self._resumed: dict[str, Any] = {}  # progress of the checkpoint that was loaded, until training begins
        self._forward_buffers: list[Tensor] = []
        self._is_saving = False
        self._started: float | None = None  # while it trains
        self._earlier_seconds = 0.0
        self.keeps_average = False
        self.watch = NonFiniteWatch(args.on_nan_loss, args.max_skipped_steps, args.output_dir)
        self.add_callback(self.watch)
        self.add_callback(ResumeCallback(self))
        self.ema: ModelEmaV3 | None = None
        if args.ema_decay > 0:
            self.ema = ModelEmaV3(self.model, decay=args.ema_decay, use_warmup=True)
            self.add_callback(EmaCallback(self))

    # --- steps -------------------------------------------------------------------------------------------------------

    def _run_epoch(self, *args, **kwargs) -> None:
        """The parent's, but not for a finished run: it would take the next step before it looks for the end."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The parent's; recomputed activations move BatchNorm's statistics once, and logs leave skipped losses out."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._forward_buffers:  # the backward pass ran parts of the forward pass, and their updates, again
            restore_buffers(self.accelerator.unwrap_model(model), self._forward_buffers)
            self._forward_buffers = []
        if self.args.on_nan_loss == "skip":
            steps = 1 + self.state.global_step - self._globalstep_last_logged
            loss = torch.where(loss.isfinite(), loss, self._tr_loss / steps)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        """The parent's, noted; float16 training scales its gradients and skips infinite ones itself."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(grad_norm, Tensor) and getattr(self.accelerator, "scaler", None) is None:
            self.watch.note(self.state.global_step + 1, {"grad_norm": grad_norm})
        return grad_norm

    # --- logs --------------------------------------------------------------------------------------------------------

    def _add(self, name: str, values: Tensor) -> None:
        self.add_sums({name: sum_and_count(values)})

    def add_sums(self, sums: dict[str, Tensor]) -> None:
        """Add (sum, count) of what the next log tells, by name."""
        for name, added in sums.items():
            self._sums[name] = self._sums[name] + added if name in self._sums else added

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
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
        super().log(logs, *args, **kwargs)

    def _gather_sums(self) -> dict[str, list[float]]:
        """(sum, count) of each logged quantity over all processes."""
        names = sorted(self._sums)
        if not names:
            return {}
        sums = self.accelerator.reduce(torch.stack([self._sums[name] for name in names]), "sum")
        return dict(zip(names, sums.tolist(), strict=True))

    # --- moving average ----------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args, **kwargs):
        """Evaluate the averaged weights where there are any; in training, not before all weights are finite."""
        if self.is_in_train:
            self.watch.check(self.model)
        with self._averaged_weights():
            share_buffers(self.model)  # each process has BatchNorm statistics of its own from its last step
            return super().evaluation_loop(*args, **kwargs)

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

    # --- checkpoints: whole or absent, with the moving average and what the next log has to tell --------------------

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._is_saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let the parent write into an unfinished folder, add our files, give it its name, delete the oldest."""
        self.watch.check(self.model)
        run_dir, step = Path(self._get_output_dir(trial)), self.state.global_step
        progress = json.dumps(self._progress())
        with explain_failed_write(f"checkpoint-{step}", run_dir):
            if self.args.should_save:
                clear_unfinished(run_dir)
            self.accelerator.wait_for_everyone()
            self._is_saving = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._is_saving = False
            if self.state.best_global_step == step:
                self.state.best_model_checkpoint = str(run_dir / f"checkpoint-{step}")
            self.accelerator.wait_for_everyone()  # each process writes its own random numbers' state
            if self.args.should_save:
                folder = run_dir / UNFINISHED / f"checkpoint-{step}"
                self.state.save_to_json(str(folder / STATE_NAME))  # again: with the name of the best checkpoint
                (folder / PROGRESS_NAME).write_text(progress, encoding="utf-8")
                if self.ema is not None:
                    save_model(self.ema.module, str(folder / EMA_WEIGHTS_NAME))
                finish_checkpoint(run_dir, step)
                rotate(run_dir, step, self.args.save_total_limit, self.state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()

    @property
    def train_seconds(self) -> float:
        running = 0.0 if self._started is None else time.monotonic() - self._started
        return self._earlier_seconds + running

    def _progress(self) -> dict[str, Any]:
        """What the next log has to tell of the steps before this checkpoint, skipped updates, and the time so far."""
        loss = self.accelerator.reduce(self._tr_loss.clone(), "mean").item()
        return {
            "loss": loss,
            "last_logged": self._globalstep_last_logged,
            "sums": self._gather_sums(),
            "watch": self.watch.state_dict(),
            "seconds": round(self.train_seconds, 3),
        }

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The parent's, without the access token in training_args.bin."""
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if os.path.isfile(os.path.join(resume_from_checkpoint, MANIFEST_NAME)):
            check_checkpoint(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._resumed = read_progress(resume_from_checkpoint)
        if self.ema is not None:
            self._load_average(resume_from_checkpoint, self.ema.module)

    def _resume_logs(self) -> None:
        """Go on with the clock and the sums of the checkpoint; the main process has the sums for all."""
        progress, self._resumed = self._resumed, {}
        self._started, self._earlier_seconds = time.monotonic(), progress.get("seconds", 0.0)
        self._sums.clear()
        if not progress:
            return
        self._tr_loss.fill_(progress["loss"])  # the mean over processes
        self._total_loss_scalar = -progress["loss"]  # the closing train_loss is about the steps of this start
        self._globalstep_last_logged = progress["last_logged"]
        self.watch.load_state_dict(progress["watch"])
        share = float(self.is_world_process_zero())
        dtype = torch.float64 if self.args.device.type != "mps" else torch.float32
        for name, values in progress["sums"].items():
            self._sums[name] = share * torch.tensor(values, dtype=dtype, device=self.args.device)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.ema is not None:
            self._load_average(self.state.best_model_checkpoint, self.ema.module)

    def _load_average(self, folder: str, model: nn.Module) -> None:
        path = os.path.join(folder, EMA_WEIGHTS_NAME)
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{path} is missing: this checkpoint was written without ema_decay (now {self.args.ema_decay})."
            )
        load_model(model, path)


def sum_and_count(values: Tensor) -> Tensor:
    """(2,): the sum of the values that are finite (all of them, but in steps that are skipped), and their number."""
    values = values.detach().double().flatten() if values.device.type != "mps" else values.detach().float().flatten()
    finite = values.isfinite()
    return torch.stack([torch.where(finite, values, 0.0).sum(), finite.sum().to(values.dtype)])


class ResumeCallback(TrainerCallback):
    """Once training is set up, take over what the parent does not keep in a checkpoint."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Restore the sums of the next log, and the clock."""
        self.trainer._resume_logs()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Stop the clock."""
        self.trainer._earlier_seconds, self.trainer._started = self.trainer.train_seconds, None


class EmaCallback(TrainerCallback):
    """Update the moving average after each optimizer step; at the end of training the model takes it over.

    The decay warms up to `ema_decay` by timm's rule, 1 - step^(-2/3): a short run is averaged over its last part, and
    nothing of the random start is left. The step is that of the Trainer, which a checkpoint keeps. BatchNorm
    statistics are averaged at the same decay, so that they are of the same time as the averaged weights.
    """

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, model: nn.Module, **kwargs) -> None:
        """Move the average towards the trained weights."""
        self.trainer.ema.update(model, step=state.global_step)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Leave the averaged weights (of the best checkpoint, where that was loaded) in the model."""
        self.trainer._choose_weights()


__all__ = ["EmaCallback", "ResumableTrainer"]
