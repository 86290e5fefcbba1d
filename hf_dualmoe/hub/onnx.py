"""Our models in other tools: as a plain module images -> logits, and as an ONNX file.

    attack = torchattacks.PGD(LogitsModel(model), eps=8 / 255)
    export_onnx(model, "model.onnx")

Images are floats (B, C, H, W) in [0, 1] everywhere; normalisation stays inside the model.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..attacks.base import frozen
from ..models.outputs import logits_of
from ..models.parts import has_dial, has_experts, is_dual, mixes_weights

TOLERANCE = 1e-4  # largest difference of a logit between a model and its ONNX file
ONE_FILE_BYTES = 1_900_000_000  # an ONNX file cannot exceed 2 GB; the weights of larger models lie beside it
CHECKED_BATCHES = (1, 3)
OLDEST_OPSET = 18  # that PyTorch's exporter writes


class LogitsModel(nn.Module):
    """An image classifier as other tools expect it: an `nn.Module` from images in [0, 1] to logits, in eval mode.

    Gradients flow to the images, through the route that each image takes. So do those of other tools' attacks, and
    what hides behind hard routing and mixing stays hidden from them: `worst_case` finds more.

    Args:
        model: Our models, any model of transformers whose output carries `logits`, or a callable to logits; with
            images in [0, 1]. It is put in eval mode.
        alpha: Position of a dual model's dial, in [0, 1]; None = as it is set at each call.

    Raises:
        ValueError: alpha is out of range, or is given for a model without a dial.
    """

    def __init__(self, model: nn.Module, alpha: float | None = None):
        super().__init__()
        check_dial(model, alpha)
        self.model, self.alpha = model, alpha
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C), float32, of images (B, C, H, W) in [0, 1]; of a dual model log-probabilities."""
        if self.alpha is None:
            return logits_of(self.model, images)
        return self.model(images, alpha=self.alpha).logits


class DenseModel(nn.Module):
    """The same function as a mixture or dual model, without grouping images by expert: what a tracer can record.

    Every expert sees every image and the router's choice is picked afterwards, so that an image costs all E experts
    instead of k. With a dial in the weights it is the network that `merge` gives.

    Args:
        model: Mixture, dual model, or other classifier of images in [0, 1] whose output carries `logits`.
        alpha: As in `LogitsModel`.
    """

    def __init__(self, model: nn.Module, alpha: float | None = None):
        super().__init__()
        check_dial(model, alpha)
        self.normalize = None
        if mixes_weights(model):
            model, alpha, self.normalize = model.merge(alpha), None, model.normalize_robust
        self.model, self.alpha = model, alpha

    def forward(self, images: Tensor, alpha: Tensor | None = None) -> Tensor:
        """Logits (B, C), float32, of images (B, C, H, W) in [0, 1], at this call's `alpha` (a scalar) if given."""
        if not is_dual(self.model):
            return dense_logits(self.model, images, self.normalize)
        standard, robust = (
            dense_logits(part, images, normalize)
            for part, normalize in (
                (self.model.standard, self.model.normalize_standard),
                (self.model.robust, self.model.normalize_robust),
            )
        )
        return self.model.mix(standard, robust, self.alpha if alpha is None else alpha).float()


def dense_logits(model: nn.Module, images: Tensor, normalize: nn.Module | None = None) -> Tensor:
    """Logits (B, C) of a mixture by running all its experts on all images; another model is called as it is.

    Args:
        model: Mixture, or other classifier whose output carries `logits`.
        images: (B, C, H, W) floats in [0, 1].
        normalize: What a dual model does to the images before a component without experts; None = nothing.
    """
    if not has_experts(model):
        return logits_of(model, images if normalize is None else normalize(images).to(model.dtype))
    logits, router_logits = model.expert_logits(images)  # (B, E, C), (B, E)
    top_k = model.config.router_top_k
    log_gate, index = router_logits.log_softmax(dim=1).topk(top_k, dim=1)
    chosen = logits.float().gather(1, index[:, :, None].expand(-1, -1, logits.shape[2]))  # (B, k, C)
    if top_k == 1:
        return chosen.squeeze(1)
    log_gate = log_gate - log_gate.logsumexp(dim=1, keepdim=True)
    return (log_gate[:, :, None] + chosen.log_softmax(dim=2)).logsumexp(dim=1)


def check_dial(model: nn.Module, alpha: float | None) -> None:
    """Raise a ValueError unless `alpha` is None or a position in [0, 1] of a model that has a dial."""
    if alpha is None:
        return
    if not has_dial(model):
        raise ValueError(f"alpha={alpha!r} was given, but {type(model).__name__} has no dial; expected None.")
    if not 0 <= alpha <= 1:  # also false for NaN
        raise ValueError(f"alpha={alpha!r} must be in [0, 1].")


# --- ONNX ------------------------------------------------------------------------------------------------------------


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    alpha: float | None = None,
    dial_input: bool = False,
    image_size: int | None = None,
    num_channels: int | None = None,
    opset_version: int | None = None,
) -> float:
    """Write a classifier to an ONNX file and check it with onnxruntime against the model.

    The file takes "pixel_values", float32 (batch, C, H, W) in [0, 1] with any batch size, and gives "logits",
    float32 (batch, labels). Hard routing groups images by expert, which no ONNX graph of fixed shape can; the file
    therefore runs every expert on every image and picks: the same output at the cost of E experts (`DenseModel`).
    The class names are in its metadata, as JSON under "id2label".

    Args:
        model: Mixture with any k, dual model, or other classifier of images in [0, 1] whose output carries `logits`;
            comes back as it was.
        path: File to write, such as "model.onnx". Weights over 1.9 GB go beside it, to "model.onnx.data".
        alpha: Position of a dual model's dial that is written into the file; None = where it is set.
        dial_input: Keep the dial of a dual model: the file takes a second input "alpha", a float32 scalar in [0, 1]
            (not checked there). Not with a dial in the weights: such a file holds the network merged at one alpha.
        image_size, num_channels: Of the images; None = what the config says.
        opset_version: ONNX operator set, at least 18; None = PyTorch's default.

    Returns:
        The largest difference of a logit between model and file on random images, at most 1e-4.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        ValueError: An argument is out of range or does not go with the model, the model is in half precision, or the
            folder of `path` is missing.
        RuntimeError: An operator of the model cannot be exported (the message names it), or not in this operator set,
            or the file computes something else than the model; no file is left then.
    """
    check_packages()
    check_dial(model, alpha)
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"path={str(path)!r}: the folder {str(path.parent)!r} does not exist.")
    if dial_input and (not is_dual(model) or alpha is not None):
        reason = "alpha was given too" if is_dual(model) else f"{type(model).__name__} has no dial"
        if mixes_weights(model):
            reason = "with mixing='weights' a file holds the network of one alpha; write one file for each"
        raise ValueError(f"dial_input=True cannot be used: {reason}.")
    check_opset(opset_version)
    check_precision(model)
    shape = image_shape(model, image_size, num_channels)
    device = next(model.parameters()).device
    alphas = (0.0, 0.6, 1.0) if dial_input else (alpha,)
    with torch.no_grad(), frozen(model), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder, path.name)
        write_onnx(DenseModel(model, alpha).eval(), written, shape, device, dial_input, opset_version)
        worst = max(run_check(model, written, random_images(n, shape, device), *alphas) for n in CHECKED_BATCHES)
        if not worst <= TOLERANCE:  # also true for NaN
            raise RuntimeError(f"The ONNX file differs from {type(model).__name__} by {worst:.3g} in a logit.")
        for file in Path(folder).iterdir():  # the weights of a large model lie beside the graph
            file.replace(path.parent / file.name)
    return worst


def check_packages() -> None:
    """Raise an ImportError that says what to install where a package for ONNX is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ONNX export needs {error.name}: pip install 'hf_dualmoe[export]'") from error


def check_opset(opset_version: int | None) -> None:
    """Raise a ValueError unless `opset_version` is None or one that PyTorch's exporter and this onnx know."""
    import onnx

    highest = onnx.defs.onnx_opset_version()
    known = isinstance(opset_version, int) and OLDEST_OPSET <= opset_version <= highest
    if opset_version is not None and not known:
        raise ValueError(
            f"opset_version={opset_version!r} must be an integer in [{OLDEST_OPSET}, {highest}], or None."
        )


def check_precision(model: nn.Module) -> None:
    """Raise a ValueError for a model in half precision, whose operators onnxruntime lacks on a CPU."""
    half = {tensor.dtype for tensor in model.parameters()} & {torch.float16, torch.bfloat16}
    if half:
        raise ValueError(
            f"{type(model).__name__} has weights in {half.pop()}; ONNX files are written and checked in float32. "
            "Export model.float(): it has the same weights."
        )


def image_shape(model: nn.Module, image_size: int | None, num_channels: int | None) -> tuple[int, int, int]:
    """(C, H, W) of the images of a model, from its config where the arguments are None; ValueError if unknown."""
    config = getattr(model, "config", None)
    size = image_size or getattr(config, "image_size", None)
    if not isinstance(size, int):
        raise ValueError(f"image_size={size!r}: the config does not say one number; give image_size.")
    return num_channels or getattr(config, "num_channels", 3), size, size


def run_check(model: nn.Module, path: Path, images: Tensor, *alphas: float | None) -> float:
    """`onnx_difference`, or a RuntimeError in plain words where onnxruntime refuses the file or this batch size."""
    try:
        return onnx_difference(model, path, images, *alphas)
    except Exception as error:  # onnxruntime raises classes of its own
        reason = str(error).strip().splitlines()[0]
        raise RuntimeError(
            f"The ONNX file of {type(model).__name__} does not run on a batch of {len(images)} images (a model that "
            f"uses len(images) is recorded for one batch size; images.shape[0] is not): {reason}"
        ) from error


def random_images(number: int, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """The same uniform images (number, C, H, W) at every call."""
    return torch.rand((number, *shape), generator=torch.Generator().manual_seed(number)).to(device)


def write_onnx(
    model: DenseModel,
    path: Path,
    shape: Sequence[int],
    device: torch.device,
    dial_input: bool,
    opset_version: int | None,
) -> None:
    """Trace and write `model`; arguments and errors are those of `export_onnx`."""
    arguments = {"images": torch.rand((2, *shape), device=device)}
    dynamic = {"images": {0: torch.export.Dim("batch")}}
    if dial_input:
        arguments["alpha"], dynamic["alpha"] = torch.tensor(0.75, device=device), None
    try:
        program = torch.onnx.export(
            model,
            kwargs=arguments,
            dynamic_shapes=dynamic,
            input_names=["pixel_values", "alpha"][: len(arguments)],
            output_names=["logits"],
            opset_version=opset_version,
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # the exporter wraps every kind of failure of a model in classes of its own
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise RuntimeError(f"{type(model.model).__name__} cannot be exported to ONNX: {reason}") from error
    written = program.model.opset_imports[""]
    if opset_version not in (None, written):  # where it cannot convert, the exporter only warns
        raise RuntimeError(
            f"{type(model.model).__name__} cannot be written with opset_version={opset_version}, only with {written}."
        )
    id2label = getattr(getattr(model.model, "config", None), "id2label", None) or {}
    program.model.metadata_props["id2label"] = json.dumps({str(i): name for i, name in id2label.items()})
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    program.save(path, external_data=weights > ONE_FILE_BYTES)


def onnx_difference(model: nn.Module, path: str | os.PathLike, images: Tensor, *alphas: float | None) -> float:
    """Largest absolute difference of a logit between a classifier and an ONNX file of it.

    Args:
        model: The classifier, in eval mode.
        path: File of `export_onnx`.
        images: (B, C, H, W) floats in [0, 1].
        alphas: Positions of a dual model's dial to compare at; none, or None = where it is set.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    takes_alpha = "alpha" in [node.name for node in session.get_inputs()]
    differences = []
    for alpha in alphas or (None,):
        inputs = {"pixel_values": images.float().cpu().numpy()}
        if takes_alpha:
            inputs["alpha"] = torch.tensor(float(model.config.alpha if alpha is None else alpha)).numpy()
        with torch.no_grad():
            expected = logits_of(model, images) if alpha is None else model(images, alpha=alpha).logits.float()
        (found,) = session.run(["logits"], inputs)
        differences.append(float((torch.from_numpy(found) - expected.cpu()).abs().max()))
    return max(differences)


__all__ = ["DenseModel", "LogitsModel", "export_onnx", "onnx_difference"]
