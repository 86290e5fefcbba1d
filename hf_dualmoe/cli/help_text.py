"""The `--help` of the training script: the arguments that people change, in groups and in reading order."""

import argparse
import copy

OF_A_TRAINED_MODEL = (
    "model_name_or_path",
    "model_revision",
    "trust_remote_code",
    "image_mean",
    "image_std",
    "ignore_class_names",
)
GROUPS = {  # everything else that transformers' Trainer takes is in `--help_all`
    "recipe": (
        "recipe",
        "fresh",
        "help",
        "help_all",
    ),
    "data": (
        "dataset_name",
        "dataset_config_name",
        "image_column",
        "label_column",
        "train_split",
        "validation_split",
        "test_split",
        "validation_fraction",
        "max_train_samples",
        "max_validation_samples",
        "max_test_samples",
        "on_bad_image",
    ),
    "a trained model to harden": OF_A_TRAINED_MODEL,
    "model": (
        "backbone",
        "backbone_kwargs",
        "stem",
        "width",
        "image_size",
        "backbone_image_size",
        "num_channels",
        "num_experts",
        "router_top_k",
        "router",
        "shared_stages",
        "router_aux_loss_coef",
        "pretrained",
        "init_experts_from",
        "mixing",
        "alpha",
        "choose_alpha",
        "min_sa",
        "min_ra",
    ),
    "objective": (
        "method",
        "beta",
        "second_term",
        "second_attack",
        "trades_lambda",
        "clean_weight",
        "train_alpha",
        "standard_eps",
        "standard_learning_rate",
        "certify_radius",
        "margin_weight",
        "route_weight",
        "gate_weight",
    ),
    "attack, in training and in the evaluations during training": (
        "eps",
        "norm",
        "training_attack",
        "attack_steps",
        "attack_step_size",
        "eps_warmup_ratio",
        "eval_attack_steps",
    ),
    "augmentation": (
        "crop_padding",
        "horizontal_flip",
        "cutmix_prob",
    ),
    "optimisation": (
        "num_train_epochs",
        "max_steps",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
        "optim",
        "optim_args",
        "label_smoothing_factor",
        "awp_gamma",
        "ema_decay",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "max_grad_norm",
        "on_nan_loss",
        "max_skipped_steps",
        "seed",
    ),
    "output": (
        "report",
        "estimate_time",
        "output_dir",
        "eval_strategy",
        "save_strategy",
        "save_total_limit",
        "logging_steps",
        "metric_for_best_model",
        "report_to",
        "disable_tqdm",
        "push_to_hub",
        "hub_model_id",
    ),
    "hardware": (
        "use_cpu",
        "bf16",
        "channels_last",
        "torch_compile",
        "dataloader_num_workers",
    ),
}
EVERYTHING_ELSE = "everything else of transformers.TrainingArguments"


def grouped_help(parser: argparse.ArgumentParser, everything: bool) -> str:
    """The help of a parser.

    Args:
        parser: Parser that has all arguments named above.
        everything: Whether to add those that are not named.
    """
    by_name: dict[str, argparse.Action] = {}
    for action in parser._actions:  # the first of --flag / --no_flag; one spelling of each name
        shown = copy.copy(action)  # the parser's own must go on parsing both spellings
        # HfArgumentParser adds --two-words beside --two_words
        shown.option_strings = [o for o in action.option_strings if "-" not in o.lstrip("-")]
        shown.metavar = None if action.choices or action.nargs == 0 else "VALUE"
        if action.default is None or action.default is False:  # "(default: None)" says nothing
            shown.default = argparse.SUPPRESS
        by_name.setdefault(action.dest, shown)
    groups = dict(GROUPS)
    if everything:
        named = {name for names in GROUPS.values() for name in names}
        groups[EVERYTHING_ELSE] = tuple(sorted(set(by_name) - named))
    formatter = parser._get_formatter()  # argparse has no public way to regroup its help
    formatter.add_usage("%(prog)s [--recipe RECIPE] [--argument VALUE ...]", [], [], prefix="usage: ")
    formatter.add_text(parser.description)
    for title, names in groups.items():
        formatter.start_section(title)
        formatter.add_arguments([by_name[name] for name in names if name in by_name])
        formatter.end_section()
    return formatter.format_help()


__all__ = ["grouped_help"]
