"""What `RobustTrainer` refuses before it trains: arguments that do not fit the model, the data or each other."""

from collections.abc import Callable, Mapping, Sized
from typing import Any

import torch
from torch import nn
from transformers import Trainer, get_scheduler

from ..models.parts import has_experts
from .arguments import RobustTrainingArguments
from .step_parts import recomputes_activations
from .validation import robust_accuracy_metrics


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
        create, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        optimizer = create([nn.Parameter(torch.zeros(1))], **settings)
        specific = {"scheduler_specific_kwargs": args.lr_scheduler_kwargs}
        # any length will do
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


def check_weight_perturbation(trainer: Trainer) -> None:
    """Refuse `awp_gamma` where other weights cannot take the place of the model's for one forward pass.

    Raises:
        ValueError: The message says what it does not work with.
    """
    args = trainer.args
    misfits = {
        "DeepSpeed, which keeps the gradients to itself": trainer.is_deepspeed_enabled,
        "weights that are spread over processes (FSDP)": trainer.is_fsdp_enabled,
        "gradient checkpointing: activations would be recomputed with the unperturbed weights": recomputes_activations(
            args, trainer.model
        ),
    }
    for what, is_so in misfits.items():
        if args.awp_gamma > 0 and is_so:
            raise ValueError(f"awp_gamma={args.awp_gamma!r} does not work with {what}.")


__all__ = ["check_batches", "check_model_fits_method"]
