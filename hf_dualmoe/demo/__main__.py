"""`python -m hf_dualmoe.demo`: start the page, or write it as a Space."""

import argparse
import sys

from transformers.utils import logging

from .scene import load_demo_model

GRADIO_MISSING = "the page needs Gradio: pip install 'hf_dualmoe[demo]'"


def create_parser() -> argparse.ArgumentParser:
    """The options; the program's name is that of the command that was used."""
    # else `hf-dualmoe demo` has set it
    name = "python -m hf_dualmoe.demo" if sys.argv[0].endswith("__main__.py") else None
    parser = argparse.ArgumentParser(
        prog=name, description="Open a page in the browser: pick an image, attack it, turn the dial."
    )
    add = parser.add_argument
    add("--model", required=True, help="Saved folder or Hub id of an image classifier.")
    add("--revision", default="main", help="Branch, tag or commit of a model on the Hub.")
    add("--trust_remote_code", action="store_true", help="Run model code that comes with the model.")
    add("--image_mean", type=float, nargs="+", help="Mean of the normalisation of a model without image processor.")
    add("--image_std", type=float, nargs="+", help="Standard deviation of that normalisation.")
    add("--examples", metavar="FOLDER", help="Folder of images to offer; default: digits for a digits model.")
    add("--export", metavar="FOLDER", help="Write a Space of the Hub to this folder instead of starting the page.")
    add("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 = reachable from other computers.")
    add("--port", type=int, help="Port to listen on; default: the first free one from 7860.")
    add("--open", action="store_true", help="Open the page in the browser.")
    return parser


def main() -> None:
    """Parse `sys.argv`, load the model, then serve the page until interrupted, or export it.

    Raises:
        SystemExit: With status 2 and one line of reason where Gradio, the model or a folder is missing or wrong.
    """
    parser = create_parser()
    args = parser.parse_args()
    try:
        from .page import create_page, launch_page
    except ModuleNotFoundError as error:
        if error.name != "gradio":  # a module that is missing inside Gradio is another problem
            raise
        parser.error(GRADIO_MISSING)
    logging.disable_progress_bar()
    options = {
        "revision": args.revision,
        "trust_remote_code": args.trust_remote_code,
        "examples": args.examples,
    }
    try:
        if args.export and (args.image_mean or args.image_std):
            raise ValueError("export needs a model with an image processor; image_mean is for the page here.")
        demo = load_demo_model(args.model, image_mean=args.image_mean, image_std=args.image_std, **options)
        if args.export:
            from .space import export_space

            files = export_space(demo, args.model, args.export, **options)
            sys.stdout.write(f"Wrote a Space to {args.export}: {', '.join(path.name for path in files)}\n")
            return
        launch_page(create_page(demo), server_name=args.host, server_port=args.port, inbrowser=args.open)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
