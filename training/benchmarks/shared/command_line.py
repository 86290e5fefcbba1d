"""What the command lines of the benchmarks share."""

import argparse

import torch


def create_parser(description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser that prints a module's docstring as it stands."""
    return argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def require_positive(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """End the script with a message where one of these arguments is given and is not > 0."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"{name}={value!r} must be > 0.")


def default_device() -> str:
    """The accelerator's type, or "cpu"."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
