"""Prove within which radius a saved image classifier keeps its classes: a table, certificates.json and a plot.

python training/certify.py --model outputs/digits-lipschitz/model --radii 0.1 0.25 0.5   # proofs, seconds
accelerate launch training/certify.py --model user/model --dataset_name cifar10 --radii 36/255 72/255 108/255
python training/certify.py --model path/to/any/model --sigmas 0.25 --n 10000             # randomized smoothing as well
"""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from hf_dualmoe.certification.operator_norms import NORMS
from hf_dualmoe.certification.report import ALPHAS, CertificationReport, certify_dataset, plot_certificates
from hf_dualmoe.cli.cost import cost_text, smoothing_work
from hf_dualmoe.cli.eps_check import check_eps_is_in_pixels
from hf_dualmoe.cli.script_arguments import (
    add_run_arguments,
    check_own_files,
    create_accelerator,
    load_images,
    load_model,
    model_parser,
    output_folder,
)
from hf_dualmoe.data.datasets import DataSplits
from hf_dualmoe.evaluation.environment import pixel_radius, print_in_any_encoding

RESULTS, PLOT = "certificates.json", "certified_accuracy.png"


def create_parser() -> ArgumentParser:
    parser = model_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--norm", choices=NORMS, default="l2", help="Norm of the radius.")
    radii = [0.1, 0.25, 0.5]
    add("--radii", type=pixel_radius, nargs="+", default=radii, help="In [0, 1] pixel units, such as 36/255.")
    add(
        "--alphas",
        type=float,
        nargs="+",
        default=list(ALPHAS),
        help="Positions of the dial; above 1/2 for the dual rule.",
    )
    add(
        "--sigmas",
        type=pixel_radius,
        nargs="*",
        default=[],
        help="Noise of randomized smoothing; none = no smoothing.",
    )
    add("--n0", type=int, default=100, help="Noisy copies that choose the class (smoothing).")
    add("--n", type=int, default=1000, help="Noisy copies that are counted (smoothing).")
    add("--confidence", type=float, default=0.999, help="Of each smoothing certificate.")
    texts = {"batch": "Images, or noisy copies, per forward.", "seed": "Seed of the noise and of choices of images."}
    add_run_arguments(parser, "certify", "certificates", **texts)
    return parser


def main() -> None:
    print_in_any_encoding()
    parser = create_parser()
    args = parser.parse_args()
    accelerator = create_accelerator()
    args.output_dir = Path(args.output_dir or output_folder("certify", args.model, args.revision))
    try:
        check_own_files(args.output_dir, {RESULTS: CertificationReport.load})
        model = load_model(args, dtype="auto").to(accelerator.device)  # what is certified is what was saved
        data = load_images(args, model, {args.model: args.revision}, dial=False)
        # the largest is the likeliest mistake
        check_eps_is_in_pixels(model, data.test, max(args.radii), args.norm, "radii")
        if args.sigmas:  # proofs take seconds; smoothing takes n passes per image
            work = smoothing_work(args.max_test_samples or len(data.test), args.sigmas, args.n0, args.n)
            accelerator.print(cost_text(accelerator, model, data.test, work, args.batch_size), flush=True)
        report = certify(args, model, data, accelerator)
    except (ValueError, OSError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n" if accelerator.is_main_process else None)
    if accelerator.is_main_process:
        print(f"\n{report.table()}\n\n" + "\n".join(report.notes()))
        files = [RESULTS]
        if any(entry["curve"] for entry in report.entries):  # where no theorem fits there is nothing to draw
            plot_certificates(report, args.output_dir / PLOT)
            files.append(PLOT)
        print(f"\nSaved to {args.output_dir}: {', '.join(files)}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    sys.exit(1 if report.failures else 0)  # a script that calls this one must notice what is missing


def certify(args: Namespace, model: nn.Module, data: DataSplits, accelerator: Accelerator) -> CertificationReport:
    """The report, written to certificates.json as the numbers come."""
    names = "norm radii alphas sigmas n0 n confidence batch_size seed fresh"
    return certify_dataset(
        model,
        data.test,
        **{name: getattr(args, name) for name in names.split()},
        num_images=args.max_test_samples,
        dataset_name=data.name,
        check_names=not args.ignore_class_names,
        path=args.output_dir / RESULTS,
        resume_dir=args.output_dir / "measurements",
        progress=not args.disable_tqdm,
        accelerator=accelerator,
    )


if __name__ == "__main__":
    main()
