"""The page itself: Gradio components and what each of them triggers. All content comes from `scene` and `words`."""

import html
import os
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr  # noqa: E402 - reads the two settings when it is imported

from .pictures import pictures_html, to_picture  # noqa: E402
from .scene import (  # noqa: E402
    MAX_STEPS,
    AttackSettings,
    DemoModel,
    Scene,
    attack_scene,
    default_eps,
    new_scene,
    open_image,
    prepare,
)
from .words import answers_html, attack_note, explain  # noqa: E402

NORMS = {"L∞ · each pixel": "linf", "L2 · whole image": "l2"}
LARGEST_LEVELS = {"linf": 96, "l2": 510}  # of the eps slider, in grey levels
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
.dm-cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 12px; }
.dm-card { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 10px 14px 14px;
  background: var(--background-fill-primary); }
.dm-card h4 { margin: 0 !important; font-size: 1.05rem; font-weight: 650; }
.dm-card p { margin: 0 0 4px !important; font-size: .85rem; opacity: .75; }
.dm-when { margin: 10px 0 4px; font-size: .8rem; font-weight: 600; opacity: .75; }
.dm-bar { position: relative; display: flex; justify-content: space-between; gap: 8px; margin: 3px 0;
  padding: 3px 8px; border-radius: 5px; overflow: hidden; background: var(--background-fill-secondary); }
.dm-fill { position: absolute; left: 0; top: 0; bottom: 0; opacity: .35; }
.dm-kept .dm-fill { background: #16a34a; } .dm-changed .dm-fill { background: #dc2626; }
.dm-other .dm-fill { background: #6b7280; }
.dm-name { position: relative; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.dm-share { position: relative; white-space: nowrap; font-variant-numeric: tabular-nums; }
.dm-route { margin-top: 5px; font-size: .8rem; line-height: 1.4; }
.dm-flip { padding: 0 6px; border-radius: 8px; color: #fff; background: #dc2626; }
.dm-pictures { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 12px; }
.dm-pictures figure { margin: 0; } .dm-pictures figcaption { margin-bottom: 4px; font-size: .9rem; font-weight: 600; }
.dm-pictures img { width: 100%; border: 1px solid var(--border-color-primary); border-radius: 6px; }
.dm-pictures img, #examples img { image-rendering: pixelated; }
#examples, #examples .gallery-container, #examples .grid-wrap { min-height: 0 !important; height: auto !important; }
#examples .grid-wrap { max-height: 300px; padding-top: 36px; }
#answers, #pictures, #answers .html-container, #pictures .html-container { padding: 0 !important; }
#examples .grid-container { grid-template-columns: repeat(5, minmax(0, 1fr)) !important; gap: 6px; }
#examples .caption-label { font-size: .7rem; padding: 0 4px; }
#note { font-size: .85rem; background: var(--block-background-fill); }
#explanation { min-height: 9rem; }
"""
INTRO = """# How hard is it to fool this classifier?
`{name}` looks at an image; an attack then changes the image by a few grey levels so that the answer changes.{dial}
That an attack fails proves nothing: a stronger one may find more."""
DIAL = (
    " The **dual model** F_D = (1 − alpha) · F_S + alpha · F_R mixes a standard and a robust model; "
    "**alpha** is the dial between accuracy and robustness."
)


MERGED_DIAL = (
    " The **dual model** F_D is one network whose weights lie between those of a standard and a robust one: "
    "(1 − alpha) · F_S + alpha · F_R, weight by weight; **alpha** is the dial between accuracy and robustness."
)


def create_page(demo: DemoModel) -> gr.Blocks:
    """The page for one model, ready for `launch_page`."""
    theme_title = f"hf_dualmoe · {demo.name}"
    with gr.Blocks(analytics_enabled=False, title=theme_title, fill_width=True) as page:
        dial = MERGED_DIAL if demo.merged else DIAL if demo.dual else ""
        gr.Markdown(INTRO.format(name=demo.name, dial=dial))
        first = new_scene(demo, demo.examples[0].pixels) if demo.examples else None
        scene = gr.State(first)  # each visitor's own
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                controls = create_controls(demo)
            with gr.Column(scale=2, min_width=560):
                views = create_views(demo, first)
        connect(demo, scene, controls, views)
    return page


def create_controls(demo: DemoModel) -> dict[str, Any]:
    """Left column: the image to look at and the attack to make."""
    controls = {}
    if demo.examples:
        controls["gallery"] = gr.Gallery(
            [(to_picture(example.pixels), example.caption) for example in demo.examples],
            label="Examples",
            columns=5,
            height="auto",
            object_fit="contain",
            allow_preview=False,
            interactive=False,
            buttons=[],
            elem_id="examples",
            format="png",
        )
    # gr.Image would open the file before us, with errors that nobody understands
    controls["upload"] = gr.File(label="Or your own image", file_types=["image"], height=130, elem_id="upload")
    with gr.Group():
        name = next(name for name, norm in NORMS.items() if norm == demo.norm)
        controls["norm"] = gr.Radio(list(NORMS), value=name, label="What eps limits", elem_id="norm")
        controls["eps"] = create_eps_slider(demo, demo.norm)
        controls["note"] = gr.Markdown(note_of(name, 255 * demo.eps), elem_id="note", padding=True)
        controls["steps"] = gr.Slider(1, MAX_STEPS, value=20, step=1, label="Attack steps (PGD)", elem_id="steps")
        targets = list(reversed(demo.parts))  # F_D first
        controls["target"] = gr.Radio(
            targets, value=targets[0], label="Model that is attacked", elem_id="target", visible=demo.dual
        )
    controls["attack"] = gr.Button("Attack", variant="primary", size="lg", elem_id="attack")
    return controls


def create_eps_slider(demo: DemoModel, norm: str) -> gr.Slider:
    """The radius, in grey levels of 255."""
    levels = 255 * default_eps(demo, norm)
    largest = max(LARGEST_LEVELS[norm], levels)  # the radius that was measured must be on the slider
    return gr.Slider(0, largest, value=levels, step=0.25, label="eps, in grey levels of 255", elem_id="eps")


def create_views(demo: DemoModel, scene: Scene | None) -> dict[str, Any]:
    """Right column: the dial, what it means, the answers and the images; at first of `scene`."""
    explanation, answers, pictures = show(demo, scene, demo.alpha)[1:]
    return {
        "alpha": gr.Slider(
            0,
            1,
            value=demo.alpha if demo.dual else 0,  # hidden without a dial, but a slider needs a number
            step=0.01,
            label="Dial alpha: 0 = standard model alone, 1 = robust model alone",
            visible=demo.dual,
            elem_id="alpha",
        ),
        "explanation": gr.Markdown(explanation, elem_id="explanation", container=True),
        "answers": gr.HTML(answers, elem_id="answers", padding=False),
        "pictures": gr.HTML(pictures, elem_id="pictures", padding=False),
    }


def connect(demo: DemoModel, scene: gr.State, controls: dict[str, Any], views: dict[str, Any]) -> None:
    """Say what happens when something is chosen, moved or pressed."""
    handlers, alpha = Handlers(demo), views["alpha"]
    texts = [views["explanation"], views["answers"]]
    shown = [scene, *texts, views["pictures"]]
    quiet = {"show_progress": "hidden", "api_visibility": "private"}  # no spinner while dragging, no public endpoint
    if "gallery" in controls:
        controls["gallery"].select(handlers.show_example, alpha, [*shown, controls["upload"]], **quiet)
    controls["upload"].upload(handlers.show_upload, [controls["upload"], alpha], shown, **quiet)
    inputs = [scene, *(controls[name] for name in ("norm", "eps", "steps", "target")), alpha]
    controls["attack"].click(handlers.attack, inputs, shown, show_progress="minimal", api_visibility="private")
    # a slider that is dragged fires faster than answers come: its last position must win
    alpha.change(handlers.turn, [scene, alpha], texts, trigger_mode="always_last", **quiet)
    controls["norm"].change(handlers.change_norm, controls["norm"], [controls["eps"], controls["note"]], **quiet)
    controls["eps"].change(note_of, [controls["norm"], controls["eps"]], controls["note"], **quiet)


class Handlers:
    """What the page's events call; the arguments are the values of components."""

    def __init__(self, demo: DemoModel):
        self.demo = demo

    def show_example(self, alpha: float, event: gr.SelectData) -> list[Any]:
        """An example was chosen: it takes the place of an uploaded image."""
        return [*show(self.demo, new_scene(self.demo, self.demo.examples[event.index].pixels), alpha), None]

    def show_upload(self, path: str, alpha: float) -> list[Any]:
        """An image was dropped."""
        try:
            return show(self.demo, new_scene(self.demo, prepare(self.demo, open_image(path))), alpha)
        except ValueError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    def attack(
        self, scene: Scene | None, norm: str, levels: float, steps: int, target: str, alpha: float
    ) -> list[Any]:
        """The button was pressed."""
        if scene is None:
            raise gr.Error("Choose an example or drop an image first.", print_exception=False)
        settings = AttackSettings(levels / 255, NORMS[norm], int(steps), target, alpha if self.demo.dual else None)
        try:
            return show(self.demo, attack_scene(self.demo, scene, settings), alpha)
        except ValueError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    def turn(self, scene: Scene | None, alpha: float) -> list[Any]:
        """The dial was moved: the texts alone change, from what the models said already."""
        return show(self.demo, scene, alpha)[1:3]

    def change_norm(self, norm: str) -> tuple[gr.Slider, str]:
        """Another norm was chosen: its radii have another range."""
        levels = 255 * default_eps(self.demo, NORMS[norm])
        return create_eps_slider(self.demo, NORMS[norm]), note_of(norm, levels)


def show(demo: DemoModel, scene: Scene | None, alpha: float | None) -> list[Any]:
    """Values of scene, explanation, answers and pictures."""
    position = alpha if demo.dual else None
    return [scene, explain(demo, scene, position), answers_html(demo, scene, position), pictures_html(scene)]


def note_of(norm: str, levels: float) -> str:
    """The text below the eps slider."""
    return attack_note(AttackSettings(levels / 255, NORMS[norm], 1, ""))


def launch_page(page: gr.Blocks, **options: Any) -> tuple[Any, str, str]:
    """Start the page's server with this package's looks, without requests to anywhere else.

    Args:
        page: From `create_page`.
        options: Of `gr.Blocks.launch`, such as server_name, server_port, prevent_thread_lock.
    """
    theme = gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"])
    return page.launch(theme=theme, css=CSS, footer_links=[], share=False, **options)


__all__ = ["create_page", "launch_page"]
