"""Fixtures for all tests: offline, on CPU, tiny models in eval mode whose sizes all differ from each other.

`make_moe` and `make_dual` build each model once a session and hand every test a deep copy of its own.
"""

import copy
import io
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

HF_HOME = tempfile.TemporaryDirectory(
    prefix="hf_dualmoe_tests_"
)  # removed at exit; read when transformers is imported
os.environ.update(
    HF_HOME=HF_HOME.name,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    MPLBACKEND="Agg",
)

import pytest  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402
from transformers import ViTConfig, ViTForImageClassification  # noqa: E402
from transformers.utils import logging  # noqa: E402

from hf_dualmoe import (  # noqa: E402
    DualMoEForImageClassification,
    MoEConfig,
    MoEForImageClassification,
)
from hf_dualmoe.data.datasets import ImageTensorDataset  # noqa: E402

torch.set_num_threads(1)  # tiny tensors: two threads that wait for each other are ten times slower on a busy machine
logging.disable_progress_bar()

STUDIES = Path(__file__).parents[1] / "training" / "benchmarks" / "study" / "studies"
BATCH, NUM_CHANNELS, IMAGE_SIZE, NUM_LABELS, NUM_EXPERTS = 13, 3, 30, 7, 4
MEAN, STD = [0.48, 0.45, 0.4], [0.25, 0.3, 0.2]
ARCHITECTURES = {
    "resnet": {"backbone": "resnet18", "width": [8, 16, 24, 32]},
    "vit": {
        "backbone": "vit_tiny_patch16_224",
        "backbone_kwargs": {"patch_size": 6, "embed_dim": 48, "depth": 3, "num_heads": 3},
    },
}


TOY = {  # a mixture of networks that cost next to nothing, for what does not depend on the architecture
    **{"backbone": "lipschitz_mlp", "backbone_kwargs": {"hidden_sizes": [16], "logit_scale": 8.0}},
    **{"num_labels": 4, "image_size": 10, "num_channels": 1, "num_experts": 2},
}


class Digits(NamedTuple):
    """A mixture trained on scikit-learn's digits (8x8 pixels, one channel), and images that it has not seen."""

    model: MoEForImageClassification
    images: torch.Tensor  # (60, 1, 8, 8) in [0, 1]
    labels: torch.Tensor  # (60,)


@torch.no_grad()
def shake(model: nn.Module, seed: int = 0) -> None:
    """Move every weight to a generic place: timm starts with zero gains and biases, which would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)):
            module.weight.uniform_(0.5, 1.5, generator=generator)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def assert_same_tensors(left: nn.Module, right: nn.Module) -> None:
    """Parameters and buffers of two models are equal to the bit."""
    for kind in ("named_parameters", "named_buffers"):
        expected, actual = dict(getattr(left, kind)()), dict(getattr(right, kind)())
        assert expected.keys() == actual.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def trace(model: nn.Module) -> dict:
    """Everything of a model that attacks and evaluations must leave as it was: name -> tensor or value."""
    found = {f"state {name}": tensor.clone() for name, tensor in model.state_dict().items()}
    found |= {f"buffer {name}": tensor.clone() for name, tensor in model.named_buffers()}  # not saved ones too
    found |= {f"mode of {name}": module.training for name, module in model.named_modules()}
    for name, parameter in model.named_parameters():
        found[f"needs gradient {name}"] = parameter.requires_grad
        found[f"gradient {name}"] = None if parameter.grad is None else parameter.grad.clone()
        found[f"place of {name}"] = parameter.data_ptr()
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    found |= {f"hooks {n}": [len(getattr(m, hook)) for hook in hooks] for n, m in model.named_modules()}
    if hasattr(model, "config"):
        found["config"] = repr(model.config.to_dict())
    return found | {"threads": torch.get_num_threads(), "gradients": torch.is_grad_enabled()}


def assert_same_trace(model: nn.Module, before: dict) -> None:
    """The model is as it was when `before = trace(model)` was taken."""
    after = trace(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        assert same, name


def save_and_load(model, folder, **kwargs):
    """The model as `from_pretrained(folder, **kwargs)` gives it back."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, **kwargs)


def solid(colour, size=(6, 6), mode="RGB") -> Image.Image:
    """An image of one colour."""
    return Image.new(mode, size, colour)


def encode(image: Image.Image, file_format: str = "PNG", **options) -> dict:
    """An image as `datasets.Image(decode=False)` gives it."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture(scope="session")
def tiny_config():
    """tiny_config("resnet" | "vit", **fields): the config of a tiny mixture."""

    def make(arch: str = "resnet", **fields) -> MoEConfig:
        sizes = {"image_size": IMAGE_SIZE, "num_labels": NUM_LABELS, "num_experts": NUM_EXPERTS}
        return MoEConfig(**{**ARCHITECTURES[arch], **sizes, "image_mean": MEAN, "image_std": STD, **fields})

    return make


@pytest.fixture(scope="session")
def _built():
    return {}


@pytest.fixture(scope="session")
def make_moe(tiny_config, _built):
    """make_moe("resnet" | "vit", **fields): a copy of a tiny mixture with generic weights, in eval mode."""

    def make(arch: str = "resnet", **fields) -> MoEForImageClassification:
        key = (arch, repr(sorted(fields.items())))
        if key not in _built:
            torch.manual_seed(1)
            _built[key] = MoEForImageClassification(tiny_config(arch, **fields)).eval()
            shake(_built[key])
        return copy.deepcopy(_built[key])

    return make


@pytest.fixture(scope="session")
def make_dual(make_moe, _built):
    """make_dual(**fields): a tiny dual model of a one-expert ViT (F_S) and a ResNet mixture (F_R), in eval mode."""

    def make(**fields) -> DualMoEForImageClassification:
        key = ("dual", repr(sorted(fields.items())))
        if key not in _built:
            standard, robust = make_moe("vit", num_experts=1), make_moe("resnet")
            _built[key] = DualMoEForImageClassification.from_models(standard, robust, **fields)
        return copy.deepcopy(_built[key])

    return make


@pytest.fixture(scope="session")
def toy_dual():
    """A dual model of a toy mixture and one near it, in eval mode; not to be changed.

    Within 0.02 its parts, positions of the dial and routes fall on different images of `toy_data`.
    """
    torch.manual_seed(0)
    standard, robust = (MoEForImageClassification(MoEConfig(**TOY)).eval() for _ in range(2))
    robust.load_state_dict(standard.state_dict())
    for name, tensor in robust.state_dict().items():
        if name.endswith(("applied_weight", "router.1.weight")):
            tensor.add_(0.05 * torch.randn(tensor.shape))
    return DualMoEForImageClassification.from_models(standard, robust, alpha=0.6)


@pytest.fixture(scope="session")
def toy_data(toy_dual):
    """23 random images that F_S of `toy_dual` gets right, but for the first 5; not to be changed."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (23, 1, 10, 10), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        labels = toy_dual(images / 255).standard_logits.argmax(dim=1)
    labels[:5] = (labels[:5] + 1) % 4
    return ImageTensorDataset(images, labels, [*"abcd"], rows=torch.arange(100, 123))


@pytest.fixture
def resnet_moe(make_moe):
    return make_moe("resnet")


@pytest.fixture
def vit_moe(make_moe):
    return make_moe("vit")


@pytest.fixture(params=list(ARCHITECTURES))
def moe(request, make_moe):
    """Both tiny mixtures in turn."""
    return make_moe(request.param)


@pytest.fixture(autouse=True)
def _same_threads():
    """Scripts set the number of CPU threads; that must not last beyond their test."""
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def dual(make_dual):
    return make_dual()


@pytest.fixture(scope="session")
def _native_vit():
    torch.manual_seed(2)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 37}
    config = ViTConfig(image_size=IMAGE_SIZE, patch_size=6, num_labels=NUM_LABELS, **sizes)
    model = ViTForImageClassification(config).eval()
    shake(model)
    return model


@pytest.fixture
def tiny_study(tmp_path):
    """tiny_study(name, settings=None, **changes): a study of `training/benchmarks`, small enough for seconds.

    Writes it with these settings and other changes into a file; returns its path.
    """

    def write(name: str, settings: dict | None = None, **changes) -> Path:
        content = yaml.safe_load((STUDIES / f"{name}.yaml").read_text())
        content["passes"] = 1
        content["settings"] |= {"width": "8,8,8,16", "max_train_samples": 128, "max_test_samples": 30}
        content["settings"] |= settings or {}
        content["evaluation"] = {"steps": 1, "worst_case_steps": 1, "batch_size": 64, "alphas": [0, 0.6, 1]}
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
        return path

    return write


@pytest.fixture
def native_vit(_native_vit):
    """A classifier of transformers' own, which expects normalised images."""
    return copy.deepcopy(_native_vit)


@pytest.fixture(scope="session")
def _images():
    generator = torch.Generator().manual_seed(3)
    return torch.rand(BATCH, NUM_CHANNELS, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


@pytest.fixture
def images(_images):
    """(B, C, H, W) floats in [0, 1]."""
    return _images.clone()


@pytest.fixture
def labels():
    """(B,) int64."""
    return torch.arange(BATCH) % NUM_LABELS


@pytest.fixture(scope="session")
def _trained_digits() -> Digits:
    from sklearn.datasets import load_digits

    torch.manual_seed(4)
    data = load_digits()
    images, labels = torch.tensor(data.images / 16, dtype=torch.float32)[:, None], torch.tensor(data.target)
    constants = {"image_mean": 0.3, "image_std": 0.37, "num_channels": 1, "image_size": 8}
    config = MoEConfig(**constants, num_labels=10, num_experts=3, width=[8, 16, 24, 32], backbone="resnet10t")
    model = MoEForImageClassification(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(6):
        for rows in torch.randperm(1500).split(100):
            loss = model(images[rows], labels[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Digits(model.eval(), images[1500:1560], labels[1500:1560])


@pytest.fixture
def trained_digits_moe(_trained_digits) -> Digits:
    """(model, images, labels): a mixture that is about 95 % right on 60 held-out digits, and those digits."""
    model, images, labels = _trained_digits
    model = copy.deepcopy(model)
    model.zero_grad()
    return Digits(model, images.clone(), labels.clone())
