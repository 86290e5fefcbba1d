"""Shared by `training/evaluate.py` and `training/join.py`: what to measure on a model, its checks, the report."""

import logging
from argparse import ArgumentParser, Namespace
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from ..attacks.auto_attack import DTYPES
from ..data.datasets import DataSplits
from ..evaluation.environment import pixel_radius
from ..evaluation.evaluation import ALPHAS, LEVELS, PARTS, RobustnessReport, check_evaluation, evaluate_robustness
from ..evaluation.outcomes import OUTCOMES_NAME, check_record
from .eps_check import check_eps_is_in_pixels
from .script_arguments import report_beside

USUAL_EPS = 8 / 255  # of L-inf on CIFAR-10
# what an evaluation writes -> what reads it
RESULTS = {"results.json": RobustnessReport.load, OUTCOMES_NAME: check_record}

logger = logging.getLogger(__name__)


def add_evaluation_arguments(parser: ArgumentParser) -> None:
    """Add the attacks and what is measured with them."""
    add = parser.add_argument
    known = "default: as the report beside the model, where it has this norm, else 8/255"
    add("--eps", type=pixel_radius, help=f"Radius in [0, 1] pixel units, such as 8/255; {known}.")
    add("--norm", choices=("linf", "l2"), default="linf", help="Norm of the ball.")
    add("--steps", type=int, default=20, help="PGD steps.")
    add("--level", default="standard", help=f"{', '.join(LEVELS)}, or parts of {','.join(PARTS)} joined by commas.")
    add("--worst_case_steps", type=int, help="Steps per member of the adaptive union; default: --steps.")
    add("--union_restarts", type=int, default=1, help="Random starts per member of the adaptive union.")
    add("--autoattack_version", help="standard, few_classes or fast; default: what the number of classes allows.")
    add("--attack_dtype", choices=DTYPES, default="fp32", help="Precision of AutoAttack's search; fp32 confirms.")
    add("--sanity_images", type=int, help="Images for the sanity checks; default: 64 at level quick, else 200.")
    add("--alphas", type=float, nargs="+", default=list(ALPHAS), help="Positions of the dial, in [0, 1].")
    # %%: argparse formats help
    add("--min_sa", type=float, help="Recommend the alpha of highest RA with at least this SA, in %%.")
    add("--min_ra", type=float, help="Recommend the alpha of highest SA with at least this RA, in %%.")


def settle_eps(args: Namespace, model: str, revision: str = "main") -> None:
    """Set `args.eps` where it was not given, and say so.

    It is that of the report beside the model, which a training leaves at its own eps, else `USUAL_EPS`.
    """
    if args.eps is not None:
        return
    report = report_beside(model, revision)
    threat = report.threat if report is not None else {}
    is_known = threat.get("norm") == args.norm and isinstance(threat.get("eps"), (int, float))
    args.eps = float(threat["eps"]) if is_known else USUAL_EPS
    source = (
        f"as in the report beside {model}" if is_known else "as usual on CIFAR-10: no report beside the model has one"
    )
    logger.warning("eps=%g (%g/255), %s; --eps sets another.", args.eps, 255 * args.eps, source)


def level_of(args: Namespace) -> str | list[str]:
    """The level asked for, or the names of parts."""
    return args.level if args.level in LEVELS else args.level.split(",")


def check_measurements(args: Namespace, model: nn.Module, data: DataSplits) -> list[str]:
    """The parts that the evaluation will measure.

    Raises:
        ValueError: What it would refuse, before anything that takes minutes; or eps looks as if it was meant for
            normalised images.
    """
    counts = ("batch_size", "sanity_images", "worst_case_steps", "union_restarts")
    parts = check_evaluation(
        model,
        (data.test, data.validation),
        eps=args.eps,
        norm=args.norm,
        level=level_of(args),
        alphas=args.alphas,
        floors={"min_sa": args.min_sa, "min_ra": args.min_ra},
        counts={**{name: getattr(args, name) for name in counts}, "num_images": args.max_test_samples},
        autoattack_version=args.autoattack_version,
        attack_dtype=args.attack_dtype,
        check_names=not args.ignore_class_names,
    )
    # last, since it warns: refusals come first
    check_eps_is_in_pixels(model, data.test, args.eps, args.norm)
    return list(parts)


def evaluate(
    args: Namespace,
    model: nn.Module,
    data: DataSplits,
    accelerator: Accelerator,
    *,
    level: str | list[str] | None = None,
    folder: Path | None = None,
) -> RobustnessReport:
    """The report, written to results.json as the numbers come; finished measurements stay in the output folder.

    Args:
        args: What a parser with `add_evaluation_arguments` read; `output_dir` is a path.
        model: Classifier of [0, 1] images, on its device.
        data: Test and held-out images.
        accelerator: Of all processes.
        level: What to measure; None = as asked for.
        folder: Where results.json goes; None = the output folder.
    """
    return evaluate_robustness(
        model,
        data.test,
        eps=args.eps,
        norm=args.norm,
        steps=args.steps,
        alphas=args.alphas,
        batch_size=args.batch_size,
        seed=args.seed,
        min_sa=args.min_sa,
        min_ra=args.min_ra,
        worst_case_steps=args.worst_case_steps,
        union_restarts=args.union_restarts,
        autoattack_version=args.autoattack_version,
        attack_dtype=args.attack_dtype,
        sanity_images=args.sanity_images,
        fresh=args.fresh,
        num_images=args.max_test_samples,
        level=level_of(args) if level is None else level,
        held_out=data.validation,
        dataset_name=data.name,
        check_names=not args.ignore_class_names,
        path=Path(folder or args.output_dir, "results.json"),
        resume_dir=Path(args.output_dir, "measurements"),  # the same for every `level`: nothing is measured twice
        progress=not args.disable_tqdm,
        accelerator=accelerator,
    )


__all__ = ["RESULTS", "add_evaluation_arguments", "check_measurements", "evaluate", "level_of", "settle_eps"]
