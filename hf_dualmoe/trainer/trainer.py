"""`RobustTrainer`: the Trainer of transformers with an attack inside the loss.

Each step crafts attacked images on the unwrapped, frozen model (unless the method needs none) and then makes one
forward through the wrapped model, so that accumulation, mixed precision, distributed training and resuming work as in
any other Trainer.
"""

import time
import traceback
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import partial
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import EvalPrediction, get_scheduler
from transformers.trainer_utils import EvalLoopOutput

from ..attacks.nfgsm import NFGSM
from ..attacks.pgd import PGD
from ..attacks.steps import frozen
from ..data.datasets import augment, collate, to_unit_range
from ..evaluation.memory import free_memory, largest_that_fits, too_large, try_step
from ..hub.trainer_publishing import PublishingMixin
from ..losses.adversarial import LossOutput, at_loss, jtdmoe_loss, rt_er_loss, standard_loss, trades_loss
from ..losses.certified import certified_loss, check_certifiable
from ..models.inputs_dualmoe import trusted_values
from ..models.outputs import logits_of
from ..models.parts import has_experts
from ..models.routing_dualmoe import averaged_loads, gate_weights
from .arguments import WITHOUT_ATTACK, RobustTrainingArguments
from .compiling import compile_networks
from .nonfinite import copy_buffers, restore_buffers
from .resumable import EmaCallback, ResumableTrainer, sum_and_count
from .step_graph import StepGraph, StepGraphCallback
from .step_parts import CheckedCollator, keep_finite, mean_over_processes, share_buffers


def robust_accuracy_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """SA and RA in %, and their mean, from the logits on clean and (where there are any) attacked images."""
    logits = prediction.predictions if isinstance(prediction.predictions, tuple) else (prediction.predictions,)
    correct = [values.argmax(axis=1) == prediction.label_ids for values in logits]
    metrics = {"sa": 100 * float(correct[0].mean())}
    if len(correct) == 2:
        metrics["ra"] = 100 * float((correct[0] & correct[1]).mean())
        metrics["sa_ra_mean"] = (metrics["sa"] + metrics["ra"]) / 2
    return metrics


class NumberedDataset(Dataset):
    """Items of a dataset with their numbers as "ids": the seeds of the evaluation's attacks.

    Args:
        dataset: Gives mappings; with `__getitems__` also lists of them, or a whole batch as one mapping.
    """

    def __init__(self, dataset: Dataset | Sequence[Mapping[str, Any]]):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], "ids": index}

    def __getitems__(self, indices: Sequence[int]) -> Mapping[str, Any] | list[dict[str, Any]]:
        if not hasattr(self.dataset, "__getitems__"):
            return [self[index] for index in indices]
        batch = self.dataset.__getitems__(indices)
        if isinstance(batch, Mapping):
            return {**batch, "ids": torch.as_tensor(indices)}
        return [{**item, "ids": index} for item, index in zip(batch, indices, strict=True)]


class RobustTrainer(PublishingMixin, ResumableTrainer):
    """Train a classifier by one of the objectives of `hf_dualmoe.losses`.

    Args:
        model: A `DualMoEForImageClassification` for method="jtdmoe", a `MoEForImageClassification` for "rt_er", one
            of 1-Lipschitz backbones for "certified"; otherwise any image classifier that takes [0, 1] images and
            returns logits, or an output that has them.
        args: Objective, attack and the usual training arguments.
        kwargs: As in `transformers.Trainer`. Datasets give {"pixel_values", "labels"}; uint8 pixel values are divided
            by 255 on the device, and training batches are augmented there. A `data_collator` of one's own gets the
            images for evaluation with their number as "ids" and should pass it on: it seeds the attack, so that RA is
            the same for every batch size and number of processes.

    Raises:
        TypeError: `args` are not RobustTrainingArguments.
        ValueError: The model does not fit the method, or an option would fail later: a metric that is not measured,
            settings that the optimizer does not take, fewer images than a batch with dataloader_drop_last.
        ImportError: method="certified" without deel-torchlip.

    `train` also raises FloatingPointError (a loss that is NaN or infinite, see `on_nan_loss`) and CheckpointError (a
    checkpoint cannot be written, or the one to resume from is damaged).
    """

    def __init__(self, model: nn.Module, args: RobustTrainingArguments, **kwargs):
        if not isinstance(args, RobustTrainingArguments):
            raise TypeError(
                f"args must be RobustTrainingArguments, which have the method and its attack; got {args!r:.60}."
            )
        check_model_fits_method(model, args.method)
        if args.method == "certified":
            check_certifiable(model, args.route_weight, args.gate_weight)
        kwargs = {"data_collator": collate, "compute_metrics": robust_accuracy_metrics, **kwargs}
        if args.ddp_find_unused_parameters is None and leaves_experts_unused(model):
            args.ddp_find_unused_parameters = True  # the parent's default is False with gradient checkpointing
        if args.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if args.dataloader_pin_memory:  # else each copy of a batch waits until the device has done all before it
            args.accelerator_config.non_blocking = True
        super().__init__(model=model, args=args, **kwargs)
        check_metric(args, self.compute_metrics, self.eval_dataset)
        check_batches(args, self.train_dataset, self.eval_dataset)
        if self.optimizer is None:
            check_optimizer(args, model)
        self.model_accepts_loss_kwargs = (
            False  # our losses are batch means: let the Trainer divide by the accumulation
        )
        self.objective = self._create_objective()
        self.evaluation_attack = args.evaluation_attack()
        self.data_collator = CheckedCollator(
            self.data_collator, getattr(getattr(model, "config", None), "num_labels", None)
        )
        self._has_checked_a_batch = False
        self._first_steps: list[float] = []  # seconds
        self._compiles = args.torch_compile
        if self._compiles:  # the networks, in place of the whole model, which an attack cannot go through
            self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")
            compile_networks(self.model, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        self.step_graph = StepGraph(self)
        self.add_callback(StepGraphCallback(lambda: self.step_graph))

    def _create_objective(self) -> partial:
        """The loss function of the chosen method, with all its settings but the attacks."""
        args = self.args
        smoothing = {"label_smoothing": args.label_smoothing_factor}
        expert = {"beta": args.beta, "second_term": args.second_term, "second_attack": args.second_attack}
        penalties = {name: getattr(args, name) for name in ("margin_weight", "route_weight", "gate_weight")}
        return {
            "standard": partial(standard_loss, **smoothing),
            "at": partial(at_loss, **smoothing),
            "trades": partial(trades_loss, trades_lambda=args.trades_lambda, **smoothing),
            "rt_er": partial(rt_er_loss, **expert, **smoothing),
            "jtdmoe": partial(jtdmoe_loss, alpha=args.train_alpha, **expert, **smoothing),
            "certified": partial(certified_loss, radius=args.certify_radius, **penalties, **smoothing),
        }[args.method]

    # --- training ----------------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The parent's step, without a look at values that the collator has checked; from a graph where it can be.

        Raises:
            OutOfMemoryError: The batch does not fit; the message says which does.
        """
        began = time.perf_counter()
        model.train()
        inputs = self._to_device(inputs)
        with trusted_values(self._has_checked_a_batch):
            loss = self._fitting_step(model, inputs, num_items_in_batch)
        self._has_checked_a_batch = True
        self._note_compile_time(time.perf_counter() - began)
        return loss

    def _fitting_step(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
        try:
            return self._step(model, inputs, num_items)
        except torch.OutOfMemoryError as error:
            if self.args.auto_find_batch_size:
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
            return super().training_step(model, inputs, num_items)
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        step = self.step_graph.training_step(inputs)
        names = ("loss", *(f"loss_{name}" for name in step.output.terms))
        self.watch.note_all(self.state.global_step + 1, names, step.values)
        if self._logs_after_this_step():
            self._record_clean(self._raw_model(), step.images, inputs["labels"], step.output)
        return step.loss

    def _largest_batch(self, inputs: dict[str, Tensor]) -> int | None:
        """How many of these images fit into one step; None where other processes would have to try, too."""
        if self.args.world_size > 1:
            return None
        raw, parameters = self._raw_model(), [p for p in self.model.parameters() if p.requires_grad]
        buffers = copy_buffers(raw)

        def step(size: int) -> None:
            images = self.to_images(inputs["pixel_values"][:size])
            output = self.run_objective(self.model, images, inputs["labels"][:size], self.step_attacks())
            torch.autograd.grad(output.loss, parameters, allow_unused=True)

        free_memory()
        try:
            return largest_that_fits(lambda size: try_step(partial(step, size)), len(inputs["labels"]))
        finally:
            restore_buffers(raw, buffers)

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
        """Attack the raw model, then one forward of the wrapped model on everything the objective needs."""
        raw = self._raw_model()
        share_buffers(raw)
        images, labels = inputs["pixel_values"], inputs["labels"]
        output = self.run_objective(model, images, labels, self.step_attacks())
        terms = {f"loss_{name}": term for name, term in output.terms.items()}
        self.watch.note(self.state.global_step + 1, {"loss": output.loss, **terms})
        self.add_sums(self.log_sums(output, labels))
        if self._logs_after_this_step():
            self._record_clean(raw, images, labels, output)
        if getattr(self.args, "activation_checkpointing", self.args.gradient_checkpointing):  # renamed in 5.23
            self._forward_buffers = copy_buffers(raw)
        return (output.loss, output) if return_outputs else output.loss

    def run_objective(
        self, model: nn.Module, images: Tensor, labels: Tensor, attacks: dict[str, Callable[..., Tensor]]
    ) -> LossOutput:
        """The objective on augmented images, with the attacks of `step_attacks`."""
        finite = {name: keep_finite(attack) for name, attack in attacks.items()}
        # autocast: for parts of the model that the attack calls alone
        with self.accelerator.autocast(), averaged_loads(mean_over_processes):
            return self.objective(self._raw_model(), images, labels, forward=model, **finite)

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

    def _to_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return super()._prepare_inputs(inputs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move the batch to the device; there turn it into [0, 1] floats and, in training, augment it."""
        inputs = self._to_device(inputs)
        return {**inputs, "pixel_values": self.to_images(inputs["pixel_values"])}

    def to_images(self, pixel_values: Tensor) -> Tensor:
        """[0, 1] floats of a batch that is on the device; in training, augmented."""
        images = to_unit_range(pixel_values)
        if self.model.training:
            shard = (self.args.process_index, self.args.world_size)
            images = augment(images, crop_padding=self.args.crop_padding, flip=self.args.horizontal_flip, shard=shard)
        return images

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The parent's optimizer; with `standard_learning_rate`, F_S gets parameter groups of its own."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created and self.args.standard_learning_rate is not None:
            own = {id(p) for p in self.model.standard.parameters()}
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
        """What each step adds to the log: (sum, count) by name, tensors on the device: no step waits for them."""
        values = {f"loss_{name}": term for name, term in output.terms.items()}
        if output.attacked_logits is not None:
            values["train_ra"] = 100.0 * (output.attacked_logits.argmax(dim=1) == labels)
        return {name: sum_and_count(value) for name, value in values.items()}

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """The parent's, with the sums that a step graph holds, and once with the time that torch_compile took."""
        self.step_graph.flush()
        if "loss" in logs and len(self._first_steps) == 3:
            logs["compile_seconds"] = round(max(0.0, sum(self._first_steps) - 3 * self._first_steps[2]), 1)
            self._first_steps.append(0.0)
        super().log(logs, *args, **kwargs)

    def _gather_sums(self) -> dict[str, list[float]]:
        self.step_graph.flush()
        return super()._gather_sums()

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

    def evaluation_loop(self, *args, **kwargs) -> EvalLoopOutput:
        """The parent's; where it does not fit beside a step graph, that makes room."""
        try:
            return super().evaluation_loop(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)
            if not self.step_graph.release("an evaluation needs its memory"):
                raise
            free_memory()
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Any, Tensor | None]:
        """Clean logits and, unless eval_attack_steps = 0, logits under PGD, in eval mode."""
        inputs = self._prepare_inputs(inputs)
        images, labels = inputs["pixel_values"], inputs["labels"]
        raw = self._raw_model()
        with torch.no_grad(), frozen(raw), self.accelerator.autocast():
            clean = logits_of(raw, images)
            loss = nn.functional.cross_entropy(clean, labels)
            if prediction_loss_only:
                return loss, None, None
            if self.evaluation_attack is None:
                return loss, clean, labels
            attacked = logits_of(raw, self.evaluation_attack(raw, images, labels, ids=inputs.get("ids")))
        return loss, (clean, attacked), labels


def numbered(dataset: Dataset | None) -> Dataset | None:
    """The dataset with numbers; a stream, which has none, as it is."""
    return dataset if dataset is None or isinstance(dataset, IterableDataset) else NumberedDataset(dataset)


def check_metric(args: RobustTrainingArguments, compute_metrics: Callable, eval_dataset: Any) -> None:
    """Raise a ValueError where metric_for_best_model is none of what the evaluations measure.

    Args:
        compute_metrics: What a user's own one measures is not known: no check.
        eval_dataset: With a dictionary of datasets, metrics carry their names.
    """
    metric = str(args.metric_for_best_model or "loss").removeprefix("eval_")
    attacked = ("ra", "sa_ra_mean") if args.eval_attack_steps else ()
    measured = ("loss",) if args.prediction_loss_only else ("loss", "sa", *attacked)
    if isinstance(eval_dataset, Mapping):
        measured = tuple(f"{name}_{what}" for name in eval_dataset for what in measured)
        metric = metric if args.metric_for_best_model else measured[0]
    if compute_metrics is robust_accuracy_metrics and metric not in measured:
        only = "; prediction_loss_only=True measures the loss alone" if args.prediction_loss_only else ""
        raise ValueError(f"metric_for_best_model={metric!r} must be one of {', '.join(measured)}{only}.")


def check_optimizer(args: RobustTrainingArguments, model: nn.Module) -> None:
    """Create optimizer and schedule for one number, to see whether their settings are good.

    Raises:
        ValueError: They are not, or a package is missing.
    """
    try:
        create, settings = RobustTrainer.get_optimizer_cls_and_kwargs(args, model)
        optimizer = create([nn.Parameter(torch.zeros(1))], **settings)
        specific = {"scheduler_specific_kwargs": args.lr_scheduler_kwargs}
        get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(1000), 1000, **specific)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        names = ("optim", "optim_args", "lr_scheduler_type", "lr_scheduler_kwargs")
        given = ", ".join(f"{name}={str(value)!r}" for name in names if (value := getattr(args, name)) is not None)
        raise ValueError(f"{given}: no optimizer can be made with these settings: {error}") from error


def leaves_experts_unused(model: nn.Module) -> bool:
    """Whether some experts may see no image of a batch, and so get no gradient."""
    return any(has_experts(m) and m.config.router_top_k < m.config.num_experts for m in model.modules())


def check_model_fits_method(model: nn.Module, method: str) -> None:
    """Refuse a model that the objective cannot train.

    Raises:
        ValueError: The message says which model the method needs.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    if getattr(config, "mixing", None) == "weights":
        raise ValueError(
            f"method={method!r} cannot train with mixing='weights', a dial for trained models: train with "
            "mixing='probs' and call set_mixing('weights') then, or train the network that merge() gives."
        )
    if method == "jtdmoe":
        if model_type != "dual_moe":
            raise ValueError(f"method='jtdmoe' trains a DualMoEForImageClassification, not a {model_type}.")
        config, model_type = config.robust, config.robust.model_type
    if method in ("rt_er", "jtdmoe") and (model_type != "robust_moe" or config.num_experts < 2):
        raise ValueError(
            f"method={method!r} needs a robust mixture with num_experts >= 2; got a {model_type} with "
            f"num_experts={getattr(config, 'num_experts', 1)}."
        )


def check_batches(args: RobustTrainingArguments, train_dataset: Any = None, eval_dataset: Any = None) -> None:
    """Refuse `dataloader_drop_last` where it drops everything: no step would be made, and nothing said.

    Args:
        args: Batch sizes and number of processes.
        train_dataset, eval_dataset: Those without a length are not checked.

    Raises:
        ValueError: A dataset has fewer images than one batch of all processes.
    """
    processes = 1 if args.accelerator_config.split_batches else args.world_size
    sets = (("train", train_dataset, args.train_batch_size), ("eval", eval_dataset, args.eval_batch_size))
    for role, images, batch_size in sets:
        if not args.dataloader_drop_last or not isinstance(images, Sized) or isinstance(images, Mapping):
            continue
        if len(images) < batch_size * processes:
            raise ValueError(
                f"dataloader_drop_last=True drops all {len(images)} images of {role}_dataset: a batch takes "
                f"{batch_size * processes}, per_device_{role}_batch_size times devices; lower it, or leave "
                "dataloader_drop_last out."
            )


__all__ = ["EmaCallback", "RobustTrainer", "check_batches", "check_model_fits_method", "robust_accuracy_metrics"]
