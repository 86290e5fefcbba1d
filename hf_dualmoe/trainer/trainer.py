"""`RobustTrainer`: the Trainer of transformers with an attack inside the loss.

Each step crafts attacked images on the unwrapped, frozen model (unless the method needs none) and then makes one
forward through the wrapped model, so that accumulation, mixed precision, distributed training and resuming work as in
any other Trainer.
"""

import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin, send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import BaseImageProcessor, EvalPrediction, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from ..attacks.base import frozen
from ..attacks.nfgsm import NFGSM
from ..attacks.pgd import PGD
from ..data.cutmix import cutmix
from ..data.datasets import augment, collate, to_unit_range
from ..evaluation.memory import free_memory, largest_that_fits, too_large, try_step
from ..hub.trainer_publishing import PublishingMixin
from ..losses.adversarial import LossOutput
from ..losses.certified import check_certifiable
from ..models.inputs_dualmoe import trusted_values
from ..models.outputs import logits_of
from ..models.parts import has_experts
from ..models.routing_dualmoe import averaged_loads, gate_weights
from .arguments import WITHOUT_ATTACK, RobustTrainingArguments
from .checks import (
    check_batches,
    check_metric,
    check_model_fits_method,
    check_optimizer,
    check_weight_perturbation,
    leaves_experts_unused,
)
from .compiling import compile_networks
from .nonfinite import copy_buffers, restore_buffers
from .objectives import create_objective
from .resumable import ResumableTrainer, sum_and_count
from .step_graph import StepGraph, StepGraphCallback
from .step_parts import CheckedCollator, keep_finite, mean_over_processes, recomputes_activations, share_buffers
from .validation import numbered, robust_accuracy_metrics
from .weight_perturbation import perturbed_loss


class RobustTrainer(PublishingMixin, ResumableTrainer):
    """Train a classifier by one of the objectives of `hf_dualmoe.losses`.

    Args:
        model: A `DualMoEForImageClassification` for method="jtdmoe", a `MoEForImageClassification` for "rt_er", one
            of 1-Lipschitz backbones for "certified"; otherwise any image classifier that takes [0, 1] images and
            returns logits, or an output that has them.
        args: Objective, attack and the usual training arguments.
        train_dataset, eval_dataset: Give {"pixel_values", "labels"}; uint8 pixel values are divided by 255 on the
            device, and training batches are augmented there.
        data_collator: One of your own gets the images for evaluation with their number as "ids" and should pass it
            on: it seeds the attack, so that RA is the same for every batch size and number of processes.
        processing_class, compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics: As in `transformers.Trainer`.

    Raises:
        TypeError: `args` are not RobustTrainingArguments.
        ValueError: The model does not fit the method, or an option would fail later: a metric that is not measured,
            settings that the optimizer does not take, fewer images than a batch with dataloader_drop_last.
        ImportError: method="certified" without deel-torchlip.

    `train` also raises FloatingPointError (a loss that is NaN or infinite, see `on_nan_loss`) and CheckpointError (a
    checkpoint cannot be written, or the one to resume from is damaged).
    """

    def __init__(
        self,
        model: nn.Module,
        args: RobustTrainingArguments,
        *,
        train_dataset: Dataset | Sequence | None = None,
        eval_dataset: Dataset | Sequence | dict[str, Dataset] | None = None,
        data_collator: Callable[[Any], dict[str, Any]] = collate,
        processing_class: BaseImageProcessor | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = robust_accuracy_metrics,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        if not isinstance(args, RobustTrainingArguments):
            raise TypeError(
                f"args must be RobustTrainingArguments, which have the method and its attack; got {args!r:.60}."
            )
        check_model_fits_method(model, args.method)
        if args.method == "certified":
            check_certifiable(model, args.route_weight, args.gate_weight)
        if args.ddp_find_unused_parameters is None and leaves_experts_unused(model):
            args.ddp_find_unused_parameters = True  # the parent's default is False with gradient checkpointing
        if args.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if args.dataloader_pin_memory:  # else each copy of a batch waits until the device has done all before it
            args.accelerator_config.non_blocking = True
        self.num_labels = getattr(getattr(model, "config", None), "num_labels", None)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=CheckedCollator(data_collator, self.num_labels),
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=None if callbacks is None else list(callbacks),
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self._check()
        self._prepare()

    def _check(self) -> None:
        """Refuse what could only be seen once the parent had read its arguments."""
        check_metric(self.args, self.compute_metrics, self.eval_dataset)
        check_batches(self.args, self.train_dataset, self.eval_dataset)
        check_weight_perturbation(self)
        if self.args.cutmix_prob > 0 and self.num_labels is None:
            raise ValueError(f"cutmix_prob={self.args.cutmix_prob!r} needs a model whose config has num_labels.")
        if self.optimizer is None:
            check_optimizer(self.args, self.model)

    def _prepare(self) -> None:
        """Make what the steps need."""
        self.model_accepts_loss_kwargs = False  # our losses are batch means: the parent divides by the accumulation
        self.objective = self.create_objective()
        self.evaluation_attack = self.args.evaluation_attack()
        self._has_checked_a_batch = False
        self._forward_buffers: list[Tensor] = []
        self._first_steps: list[float] = []  # seconds
        self._compiles = self.args.torch_compile
        if self._compiles:  # the networks, in place of the whole model, which an attack cannot go through
            # else accelerate compiles the model as well
            self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")
            compile_networks(self.model, self.args.torch_compile_backend, self.args.torch_compile_mode)
        self.step_graph = StepGraph(self)
        self.add_callback(StepGraphCallback(lambda: self.step_graph))

    def create_objective(self) -> Callable[..., LossOutput]:
        """The loss that a step minimises, called as in `hf_dualmoe.losses`; a subclass may change it."""
        return create_objective(self.args)

    # --- training ----------------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The parent's step, without a look at values that the collator has checked; from a graph where it can be.

        Raises:
            OutOfMemoryError: The batch does not fit; the message says which does.
        """
        began = time.perf_counter()
        model.train()  # here, since a step of the graph does not go through the parent's, which does it
        inputs = send_to_device(inputs, self.args.device)
        # the first batch is looked at on the device as well: a collator of your own may not check
        with trusted_values(self._has_checked_a_batch):
            loss = self._fitting_step(model, inputs, num_items_in_batch)
        self._has_checked_a_batch = True
        self._note_compile_time(time.perf_counter() - began)
        return loss

    def _fitting_step(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
        try:
            return self._step(model, inputs, num_items)
        except torch.OutOfMemoryError as error:
            if self.args.auto_find_batch_size:  # accelerate lowers the batch size and starts again
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the activations
            self.model.zero_grad()
            accumulation = self.args.gradient_accumulation_steps
            if accumulation == 1 and self.step_graph.release("its memory is needed"):  # else gradients would be lost
                return self._step(model, inputs, num_items)
            message = too_large(len(inputs["labels"]), self._largest_batch(inputs), accumulation)
            raise torch.OutOfMemoryError(message) from error

    def _step(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
        if not self.step_graph.takes(inputs):
            return self._ordinary_step(model, inputs, num_items)
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers; as the parent does
            self.optimizer.train()
        step = self.step_graph.training_step(inputs)
        names = ("loss", *(f"loss_{name}" for name in step.output.terms))
        self.watch.note_all(self.state.global_step + 1, names, step.values)
        if self._logs_after_this_step():
            self._record_clean(self._raw_model(), step.images, inputs["labels"], step.output)
        return step.loss

    def _ordinary_step(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
        loss = super().training_step(model, inputs, num_items)
        if self._forward_buffers:  # the backward pass ran parts of the forward pass, and their updates, again
            restore_buffers(self.accelerator.unwrap_model(model), self._forward_buffers)
            self._forward_buffers = []
        return loss

    def _largest_batch(self, inputs: dict[str, Tensor]) -> int | None:
        """Find how many of these images fit into one step; None where other processes would have to try, too."""
        if self.args.world_size > 1:
            return None
        raw, parameters = self._raw_model(), [p for p in self.model.parameters() if p.requires_grad]
        buffers = copy_buffers(raw)

        def step(size: int) -> None:
            images, labels = self.to_images(inputs["pixel_values"][:size]), inputs["labels"][:size]
            output = self.run_objective(self.model, *self.mix(images, labels), labels, self.step_attacks())
            torch.autograd.grad(output.loss, parameters, allow_unused=True)

        free_memory()
        try:
            return largest_that_fits(lambda size: try_step(partial(step, size)), len(inputs["labels"]))
        finally:
            restore_buffers(raw, buffers)  # trial steps moved BatchNorm's statistics

    def _note_compile_time(self, seconds: float) -> None:
        """With torch_compile, let the first log tell how much longer the first step took than the third."""
        if self._compiles and len(self._first_steps) < 3:
            self._first_steps.append(seconds)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, LossOutput]:
        """Augment, attack the raw model, then one forward of the wrapped model on all that the objective needs."""
        raw = self._raw_model()
        share_buffers(raw)  # before the attack, which runs on the raw model
        labels = inputs["labels"]
        images, targets = self.mix(self.to_images(inputs["pixel_values"]), labels)
        output = self.run_objective(model, images, targets, labels, self.step_attacks())
        terms = {f"loss_{name}": term for name, term in output.terms.items()}
        self.watch.note(self.state.global_step + 1, {"loss": output.loss, **terms})
        self.add_sums(self.log_sums(output, labels))
        if self._logs_after_this_step():
            self._record_clean(raw, images, labels, output)
        if recomputes_activations(self.args, raw):
            self._forward_buffers = copy_buffers(raw)
        return (output.loss, output) if return_outputs else output.loss

    def run_objective(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        labels: Tensor,
        attacks: dict[str, Callable[..., Tensor]],
    ) -> LossOutput:
        """The objective on augmented images and the targets of `mix`, with the attacks of `step_attacks`."""
        aimed = labels if targets is not labels else None  # attacks know one class per image
        finite = {name: keep_finite(attack, aimed) for name, attack in attacks.items()}
        raw, gamma = self._raw_model(), self.args.awp_gamma
        # autocast: for parts of the model that the attack calls alone
        with self.accelerator.autocast(), averaged_loads(mean_over_processes):
            if gamma > 0:
                return perturbed_loss(self.objective, raw, images, targets, finite, gamma=gamma, forward=model)
            return self.objective(raw, images, targets, forward=model, **finite)

    def step_attacks(self) -> dict[str, PGD | NFGSM]:
        """The attacks inside this step's objective, by argument: they change with the warm-up of eps."""
        args, scale, attacks = self.args, self._eps_scale(), {}
        if args.method not in WITHOUT_ATTACK:
            attacks["attack"] = args.create_training_attack(scale)
        if args.method == "jtdmoe" and args.standard_eps > 0:
            attacks["standard_attack"] = args.create_standard_attack(scale)
        return attacks

    def _raw_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)

    @property
    def eps_changes(self) -> bool:
        """Whether the radius of the attack changes from step to step."""
        return self.args.eps_warmup_ratio * self.state.max_steps >= 1

    def _eps_scale(self) -> float:
        warmup_steps = self.args.eps_warmup_ratio * self.state.max_steps
        return min(1.0, (self.state.global_step + 1) / warmup_steps) if self.eps_changes else 1.0

    def to_images(self, pixel_values: Tensor) -> Tensor:
        """[0, 1] floats of a batch that is on the device; in training, augmented."""
        images = to_unit_range(pixel_values)
        if self.model.training:
            shard = (self.args.process_index, self.args.world_size)
            images = augment(images, crop_padding=self.args.crop_padding, flip=self.args.horizontal_flip, shard=shard)
        return images

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Augmented images as the objective is to see them, and their targets: with CutMix the shares of classes."""
        args = self.args
        if args.cutmix_prob == 0:
            return images, labels
        shard = (args.process_index, args.world_size)
        return cutmix(images, labels, num_labels=self.num_labels, prob=args.cutmix_prob, shard=shard)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The parent's optimizer; with `standard_learning_rate`, F_S gets parameter groups of its own."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created and self.args.standard_learning_rate is not None:
            own = {id(p) for p in self.model.standard.parameters()}
            # split each group in place: it keeps its weight decay, and the optimizer its class
            groups, optimizer.param_groups = list(optimizer.param_groups), []
            for group in groups:
                for is_standard in (True, False):
                    params = [p for p in group["params"] if (id(p) in own) == is_standard]
                    rate = self.args.standard_learning_rate if is_standard else group["lr"]
                    if params:
                        optimizer.add_param_group({**group, "params": params, "lr": rate})
        return optimizer

    # --- logging -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def log_sums(self, output: LossOutput, labels: Tensor) -> dict[str, Tensor]:
        """Contribution of a step to the log: (sum, count) by name, on the device, so that no step waits for them."""
        values = {f"loss_{name}": term for name, term in output.terms.items()}
        if output.attacked_logits is not None:
            # in train mode, so not quite RA
            values["train_ra"] = 100.0 * (output.attacked_logits.argmax(dim=1) == labels)
        return {name: sum_and_count(value) for name, value in values.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The parent's, with the sums that a step graph holds, and once with the time that torch_compile took."""
        self.step_graph.flush()
        if "loss" in logs and len(self._first_steps) == 3:
            logs["compile_seconds"] = round(max(0.0, sum(self._first_steps) - 3 * self._first_steps[2]), 1)
            self._first_steps.append(0.0)  # a fourth entry: told once
        super().log(logs, start_time)

    def _logs_after_this_step(self) -> bool:
        step, every = self.state.global_step + 1, self.state.logging_steps
        return step == 1 or (every > 0 and step % every == 0) or step == self.state.max_steps

    def _record_clean(self, raw: nn.Module, images: Tensor, labels: Tensor, output: LossOutput) -> None:
        """SA, expert load and route-flip rate on this batch; once per log, since it costs a forward pass."""
        with frozen(raw), self.accelerator.autocast():
            self._add("train_sa", 100.0 * (logits_of(raw, images).argmax(dim=1) == labels))
            robust = getattr(raw, "robust", raw)
            if not has_experts(robust):
                return
            scores = robust.route(images)
            for i, load in enumerate(gate_weights(scores, robust.config.router_top_k).unbind(dim=1)):
                self._add(f"expert_load_{i}", 100.0 * load)
            if output.attacked_images is not None:
                flipped = robust.route(output.attacked_images).argmax(dim=1) != scores.argmax(dim=1)
                self._add("route_flip_rate", 100.0 * flipped)

    # --- evaluation --------------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """The parent's, with the number of each image."""
        if not isinstance(eval_dataset, str):
            return super().get_eval_dataloader(numbered(self.eval_dataset if eval_dataset is None else eval_dataset))
        given = self.eval_dataset  # the parent keeps loaders of persistent workers by this name
        self.eval_dataset = {**given, eval_dataset: numbered(given[eval_dataset])}
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.eval_dataset = given

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """The parent's, with the number of each image."""
        return super().get_test_dataloader(numbered(test_dataset))

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The parent's; where it does not fit beside a step graph, that makes room."""
        loop = partial(
            super().evaluation_loop, dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        try:
            return loop()
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)
            if not self.step_graph.release("an evaluation needs its memory"):
                raise
            free_memory()
        return loop()

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Any, Tensor | None]:
        """Clean logits and, unless eval_attack_steps = 0, logits under PGD, in eval mode."""
        inputs = send_to_device(inputs, self.args.device)
        images, labels = to_unit_range(inputs["pixel_values"]), inputs["labels"]
        raw = self._raw_model()
        with torch.no_grad(), frozen(raw), self.accelerator.autocast():  # the attack turns gradients on for itself
            clean = logits_of(raw, images)
            loss = nn.functional.cross_entropy(clean, labels)
            if prediction_loss_only:
                return loss, None, None
            if self.evaluation_attack is None:
                return loss, clean, labels
            attacked = logits_of(raw, self.evaluation_attack(raw, images, labels, ids=inputs.get("ids")))
        return loss, (clean, attacked), labels


__all__ = ["RobustTrainer"]
