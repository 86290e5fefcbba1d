"""The demo page as a Space of the Hub: a folder to upload."""

import re
import shutil
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import yaml

from ..data.image_folders import scan
from .scene import DemoModel

PACKAGE = Path(__file__).parents[1]
# of a training, not of the model; training_args.bin can hold an access token
LEFT_BEHIND = ("training_args.bin", "optimizer.*", "scheduler.*", "rng_state*", "checkpoint-*", "__pycache__", ".*")
APP = '''"""Demo page of {name}; needs nothing but this folder and requirements.txt."""

from hf_dualmoe.demo.page import create_page, launch_page
from hf_dualmoe.demo.scene import load_demo_model

demo = load_demo_model({model!r}, revision={revision!r}, trust_remote_code={trust!r}, examples={examples!r})
launch_page(create_page(demo))
'''
README = """# {title}

Pick an image, attack it, and see which models are fooled{dial}. What an attack does not find is not proven to be safe.

This folder was written by `python -m hf_dualmoe.demo --model {name} --export FOLDER`. Upload it with
`hf upload USER/NAME . --repo-type space` from within.
"""


def export_space(
    demo: DemoModel,
    source: str,
    folder: str | Path,
    *,
    revision: str = "main",
    trust_remote_code: bool = False,
    examples: str | None = None,
) -> list[Path]:
    """Write a Space of the Hub (sdk: gradio) that shows this page for one model.

    The package's own files go along, and so does a model that is a local folder; one of the Hub is named. Writing to
    the same folder again replaces the files.

    Args:
        demo: The model, loaded.
        source: The folder or Hub id that it was loaded from.
        folder: Where to write: new, empty, or written by this function before.
        revision, trust_remote_code, examples: As `load_demo_model` was called.

    Returns:
        The files at the top of the folder.

    Raises:
        ValueError: The folder holds other files.
    """
    folder = Path(folder)
    # copy_folder deletes what it replaces: never in a folder of somebody else
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir()) and not is_space(folder)):
        raise ValueError(f"export={str(folder)!r} holds other files; choose a new or an empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    local = Path(source).is_dir()
    # requirements.txt leaves this package out
    copy_folder(PACKAGE, folder / "hf_dualmoe", "*.py", "*.typed", "*.md")
    if local:
        copy_folder(Path(source), folder / "model", "*")
    if examples:
        copy_images(Path(examples), folder / "examples")
    app = APP.format(
        name=demo.name,
        model="model" if local else source,
        revision=revision,
        trust=trust_remote_code,
        examples="examples" if examples else None,
    )
    (folder / "app.py").write_text(app, encoding="utf-8")
    (folder / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(space_readme(demo, None if local else source), encoding="utf-8")
    return sorted(path for path in folder.iterdir())


def is_space(folder: Path) -> bool:
    """Whether `export_space` wrote this folder."""
    app = folder / "app.py"
    return app.is_file() and "hf_dualmoe.demo.page" in app.read_text(encoding="utf-8")


def copy_folder(source: Path, target: Path, *patterns: str) -> None:
    """Replace `target` by the files of `source` that match a pattern and have no part in `LEFT_BEHIND`."""
    if target.exists():
        shutil.rmtree(target)
    for pattern in patterns:
        for path in sorted(source.rglob(pattern)):
            inside = path.relative_to(source)
            left = any(fnmatch(part, name) for part in inside.parts for name in LEFT_BEHIND)
            if path.is_file() and not left:
                (target / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / inside)


def copy_images(source: Path, target: Path) -> None:
    """Replace `target` by the images that are in and below `source`, behind links too."""
    if target.exists():
        shutil.rmtree(target)
    for path in scan(source).root.all_images():
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def requirements() -> list[str]:
    """Requirements of this package, without its extras; the Space brings Gradio itself."""
    return [line for line in metadata.requires("hf_dualmoe") if "extra ==" not in line]


def space_readme(demo: DemoModel, model_id: str | None) -> str:
    """README.md of the Space: the YAML that the Hub reads, then a few words."""
    title = f"How robust is {demo.name}?"
    header = {
        "title": title,
        "emoji": "🛡️",
        "colorFrom": "blue",
        "colorTo": "green",
        "sdk": "gradio",
        "sdk_version": re.split(r"[^\d.]", metadata.version("gradio"))[0],  # 6.0.0, not 6.0.0rc1 or 6.0.0+local
        "app_file": "app.py",
        "license": "apache-2.0",
        "pinned": False,
        "short_description": "Attack an image, turn the robustness dial",
    }
    if model_id:
        header["models"] = [model_id]
    text = README.format(title=title, name=demo.name, dial=", then turn the dial" if demo.dual else "")
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n{text}"


__all__ = ["export_space"]
