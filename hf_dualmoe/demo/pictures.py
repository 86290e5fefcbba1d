"""The three images of the page: clean, the change made visible, attacked. Small images are enlarged without blur."""

import base64
import io

from PIL import Image
from torch import Tensor

from .scene import Scene

SHOWN_SIZE = 336  # pixels; smaller images are enlarged by a whole number to about this


def to_picture(pixels: Tensor) -> Image.Image:
    """An image (1, C, H, W) in [0, 1] as a Pillow image; every pixel becomes a square where it is small."""
    values = (pixels[0] * 255).round().clamp(0, 255).byte()
    array = values[0] if len(values) == 1 else values.permute(1, 2, 0)  # (H, W) or (H, W, C)
    image = Image.fromarray(array.contiguous().cpu().numpy()).convert("RGB")
    factor = max(1, SHOWN_SIZE // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def change_gain(clean: Tensor, attacked: Tensor) -> float:
    """The factor that makes the largest change as dark or bright as a picture can be; 1 where nothing changed."""
    largest = float((attacked - clean).abs().max())
    return 0.5 / largest if largest > 0 else 1.0


def change_picture(clean: Tensor, attacked: Tensor) -> Image.Image:
    """The change times `change_gain`, around grey: brighter pixels were made brighter, darker ones darker."""
    return to_picture((0.5 + change_gain(clean, attacked) * (attacked - clean)).clamp(0, 1))


def pictures_html(scene: Scene | None) -> str:
    """The three pictures side by side, with captions; before an attack the clean one alone."""
    if scene is None:
        return ""
    pictures = [("clean", "Clean", to_picture(scene.clean))]
    if scene.attacked is not None:
        gain = change_gain(scene.clean, scene.attacked)
        title = f"Change × {gain:.3g} (grey = none)"
        pictures.append(("change", title, change_picture(scene.clean, scene.attacked)))
        pictures.append(("attacked", "Attacked", to_picture(scene.attacked)))
    figures = (
        f'<figure id="{name}"><figcaption>{title}</figcaption><img alt="{title}" src="{data_uri(picture)}"></figure>'
        for name, title, picture in pictures
    )
    return f'<div class="dm-pictures">{"".join(figures)}</div>'


def data_uri(picture: Image.Image) -> str:
    """A picture as text that an <img> shows, without loss."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
