"""What `fuzz.py` draws, and what it does with that: sensible values and nonsense for each part of the interface."""

import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from hf_dualmoe import DualMoEConfig, DualMoEForImageClassification, MoEConfig, MoEForImageClassification
from hf_dualmoe.attacks.apgd import APGD
from hf_dualmoe.attacks.fab import FAB
from hf_dualmoe.attacks.nfgsm import NFGSM
from hf_dualmoe.attacks.pgd import FGSM, PGD
from hf_dualmoe.attacks.square import Square
from hf_dualmoe.data.datasets import ImageTensorDataset, load_splits
from hf_dualmoe.data.decoding import decode_images
from hf_dualmoe.evaluation.evaluation import evaluate_robustness
from hf_dualmoe.trainer.arguments import RobustTrainingArguments

CHANNELS, SIZE, LABELS = 1, 6, 3
TINY = {
    **{"backbone": "lipschitz_mlp", "backbone_kwargs": {"hidden_sizes": [4]}, "num_experts": 2},
    **{"image_size": SIZE, "num_channels": CHANNELS, "num_labels": LABELS},
}

# --- values ----------------------------------------------------------------------------------------------------------

SMALL = st.sampled_from([None, True, False, 0, -1, -(10**12), 0.5, -0.5, math.nan, math.inf, -math.inf, "", "8/255"])
SMALL |= st.sampled_from([[], [1], {}, {"a": 1}, (), b"x", object, "linf", "1", [math.nan], ["a", None], 1e-320])
HUGE = st.sampled_from([10**4, 10**6, 10**9, 2**63, 10**40, 1e308, 1e-308, [10**9] * 4, [[[]]], {"depth": 10**9}])
NONSENSE = SMALL | HUGE | st.text(max_size=5) | st.lists(st.integers() | st.floats(), max_size=4)


def of(*values: Any) -> st.SearchStrategy:
    """Mostly one of the sensible `values`, else anything."""
    return st.integers(0, 3).flatmap(lambda i: NONSENSE if i == 3 else st.sampled_from(values))


def cheap(*values: Any) -> st.SearchStrategy:
    """Mostly one of the `values`, else anything but a large number: for what is run so many times."""
    return st.integers(0, 3).flatmap(lambda i: SMALL if i == 3 else st.sampled_from(values))


def some(choices: dict[str, st.SearchStrategy]) -> st.SearchStrategy:
    """A dict with one to four of the arguments."""
    names = st.lists(st.sampled_from(sorted(choices)), min_size=1, max_size=4, unique=True)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: choices[name] for name in chosen}))


MOE = {
    "backbone": of("lipschitz_mlp", "lipschitz_cnn", "test_resnet", "test_vit", "no_such_model"),
    "backbone_kwargs": of(None, {"hidden_sizes": [8]}, {"depth": 1}, {"patch_size": 2}, {"num_heads": 0}, {"a": "b"}),
    "stem": of("cifar", "default"),
    "width": of(None, 0.25, [8, 8, 8, 8]),
    "image_size": of(1, 6, 8, 30),
    "backbone_image_size": of(None, 8, 12),
    "num_channels": of(1, 2, 3),
    "image_mean": of(0.5, [0.5], [0.5] * 3),
    "image_std": of(0.25, [0.25], [0.25] * 3),
    "num_experts": of(1, 2, 3),
    "router_top_k": of(1, 2),
    "router": of("linear", "pooled", "conv", "features"),
    "router_pool_size": of(1, 2, 4),
    "shared_stages": of(0, 1, 2),
    "router_aux_loss_coef": of(0, 0.01, 1),
    "output_router_logits": of(True, False),
    "num_labels": of(1, 2, 3),
    "id2label": of(None, {0: "a", 1: "b"}, {"0": "a", "1": "b"}, {1: "a"}),
    "format_version": of(1),
    "dtype": of(None, "float32", "bfloat16"),
}
MAP = of(None, {"scale": 2.0}, {"clamp": 0.5, "power": 2}, {"power": math.nan}, {"scale": "a"}, {"slope": 1})
DUAL = {
    "standard": of(TINY, {**TINY, "num_experts": 1}, {"model_type": "vit"}, {"model_type": "no_such"}),
    "robust": of(TINY, {**TINY, "router_top_k": 2}, {"model_type": "dual_moe"}),
    "alpha": of(0, 0.5, 1),
    "mixing": of("probs", "logits"),
    "standard_logit_map": MAP,
    "robust_logit_map": MAP,
    "standard_image_mean": of(None, [0.5]),
    "standard_image_std": of(None, [0.5]),
    "num_labels": of(2, LABELS),
    "format_version": of(1),
}
EPS = of(0, 0.1, 1)
ATTACKS = {
    PGD: {
        **{"eps": EPS, "steps": cheap(1, 3), "step_size": of(None, 0.1), "norm": of("linf", "l2")},
        **{"objective": of("ce", "margin", "kl"), "random_start": of(True, False), "restarts": cheap(1, 2)},
        **{"keep_best": of(True, False), "seed": of(None, 0)},
    },
    APGD: {
        **{"eps": EPS, "steps": cheap(1, 4), "norm": of("linf", "l2"), "restarts": cheap(1, 2), "seed": of(0)},
        **{"objective": of("ce", "dlr", "dlr_targeted"), "target_classes": cheap(1, 2)},
    },
    FGSM: {"eps": EPS, "norm": of("linf", "l2"), "objective": of("ce", "margin", "kl")},
    NFGSM: {"eps": EPS, "noise": of(0, 2.0), "objective": of("ce", "margin", "kl")},
    FAB: {"eps": EPS, "steps": cheap(1, 3), "norm": of("linf", "l2"), "target_classes": cheap(1, 2)},
    Square: {"eps": EPS, "queries": cheap(1, 9), "norm": of("linf", "l2"), "seed": of(0)},
}
EVALUATION = {
    "eps": EPS,
    "norm": of("linf", "l2"),
    "steps": cheap(1, 2),
    "alphas": of((0, 1), [0.5]),
    "batch_size": cheap(2, 50),
    "seed": of(0, 1),
    "level": of(["components"], ["dial"], ["component_attacks"], []).filter(lambda value: value not in ("", ())),
    "num_images": cheap(None, 3),
    "min_sa": of(None, 50),
    "min_ra": of(None, 20),
    "worst_case_steps": cheap(None, 1),
    "autoattack_version": of(None, "fast"),
    "sanity_images": cheap(None, 2),
    "check_names": of(False),
}
TENSORS = st.sampled_from(
    [
        *(torch.rand(2, CHANNELS, SIZE, SIZE), torch.rand(0, CHANNELS, SIZE, SIZE), torch.rand(2, 4, SIZE, SIZE)),
        *(torch.rand(2, CHANNELS, 5, 7), torch.rand(CHANNELS, SIZE, SIZE), torch.tensor(0.5), torch.rand(2, 1)),
        *(torch.zeros(2, CHANNELS, SIZE, SIZE, dtype=torch.uint8), torch.full((2, CHANNELS, SIZE, SIZE), torch.nan)),
        *(255 * torch.rand(2, CHANNELS, SIZE, SIZE), torch.rand(2, CHANNELS, SIZE, SIZE).to(torch.complex64)),
        *(torch.tensor([0, 1]), torch.tensor([0, LABELS]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0])),
        *(torch.tensor([[0, 1]]), torch.tensor([], dtype=torch.int64), torch.tensor([True, False])),
    ]
)
FORWARD = {
    "pixel_values": TENSORS,
    "labels": TENSORS | st.none(),
    "expert_index": TENSORS | st.none(),
    "alpha": of(0, 0.5, 1) | TENSORS,
    "robust_pixel_values": TENSORS | st.none(),
    "output_router_logits": st.sampled_from([None, True, False]),
}
SPLITS = {
    "image_size": of(None, 8),
    "num_channels": of(None, 1),
    "validation_fraction": of(0.1),
    "max_train_samples": of(None, 20),
    "max_test_samples": of(None, 20),
    "on_bad_image": of("raise", "skip"),
    "seed": of(0),
    "train_split": of(None, "train"),
    "label_column": of(None, "label"),
}
OURS = ("train_alpha", "eps", "norm", "beta", "trades_lambda", "method", "second_term", "second_attack", "ema_decay")
OURS += ("attack_steps", "attack_step_size", "eps_warmup_ratio", "eval_attack_steps")
OURS += ("crop_padding", "training_attack")
TRAINING = {
    field.name: of(field.default, *(field.metadata.get("choices") or ()))
    for field in fields(RobustTrainingArguments)
    if field.name in OURS
}
CHANGES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6)  # (where, new byte)
FILES = st.tuples(CHANGES, st.none() | st.floats(0, 1))  # and where the file ends

# --- what is done with them ------------------------------------------------------------------------------------------


@cache
def moe() -> MoEForImageClassification:
    """A tiny mixture."""
    torch.manual_seed(0)
    return MoEForImageClassification(MoEConfig(**TINY)).eval()


@cache
def dual() -> DualMoEForImageClassification:
    """A tiny dual model."""
    return DualMoEForImageClassification.from_models(moe(), moe()).eval()


@cache
def images() -> ImageTensorDataset:
    """A few labelled images for the tiny models."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (8, CHANNELS, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return ImageTensorDataset(pixels, torch.arange(8) % LABELS, ["a", "b", "c"])


def build(config: MoEConfig | DualMoEConfig) -> None:
    """Build the model of a config; a small one also classifies two images."""
    model_class = DualMoEForImageClassification if isinstance(config, DualMoEConfig) else MoEForImageClassification
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in model_class(config).parameters())
    if numbers < 10**6 and config.image_size <= 64 and config.num_channels <= 8:
        model = model_class(config).eval()
        with torch.no_grad():
            logits = model(torch.rand(2, config.num_channels, config.image_size, config.image_size)).logits
        assert logits.shape == (2, config.num_labels)


def run_config(config_class: type, drawn: dict[str, Any], folder: Path) -> None:
    """Make a config, build its model, save and load the config."""
    base = TINY if config_class is MoEConfig else {"standard": TINY, "robust": TINY}
    base = {name: value for name, value in base.items() if not (name == "num_labels" and "id2label" in drawn)}
    config = config_class(**{**base, **drawn})
    config.save_pretrained(folder)
    build(config_class.from_pretrained(folder))


def run_config_file(drawn: dict[str, Any], folder: Path) -> None:
    """Read a config.json that somebody changed."""
    text = json.dumps({"model_type": "robust_moe", **TINY, **drawn}, default=str)
    (folder / "config.json").write_text(text, encoding="utf-8")
    build(MoEConfig.from_pretrained(folder))


def run_attack(attack_class: type, drawn: dict[str, Any], folder: Path) -> None:
    """Attack four images of the tiny mixture."""
    attack = attack_class(**drawn)
    pixels, labels = images().images[:4].float() / 255, images().labels[:4]
    attacked = attack(moe(), pixels, labels)
    assert attacked.shape == pixels.shape and attacked.isfinite().all()
    assert attacked.min() >= 0 and attacked.max() <= 1


def run_evaluation(drawn: dict[str, Any], folder: Path) -> None:
    """Evaluate the tiny dual model."""
    settings = {"level": ["components"], "steps": 1, "progress": False, "path": folder / "results.json"}
    evaluate_robustness(dual(), images(), **{**settings, **drawn})


def run_forward(model: Callable[[], torch.nn.Module], drawn: dict[str, Any], folder: Path) -> None:
    """Call a tiny model."""
    with torch.no_grad():
        model()(**{"pixel_values": torch.rand(2, CHANNELS, SIZE, SIZE), **drawn})


def run_training_arguments(drawn: dict[str, Any], folder: Path) -> None:
    """Make training arguments and their attacks."""
    args = RobustTrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True, **drawn)
    args.create_training_attack()
    args.evaluation_attack()


def run_splits(drawn: dict[str, Any], folder: Path) -> None:
    """Load the digits."""
    load_splits("digits", **drawn)


def changed(data: bytes, drawn: tuple) -> bytes:
    """The bytes of a file, some of them replaced, and cut off."""
    changes, end = drawn
    result = bytearray(data)
    for where, byte in changes:
        result[min(int(where * len(result)), len(result) - 1)] = byte
    return bytes(result if end is None else result[: int(end * len(result))])


@cache
def encoded_images() -> list[bytes]:
    """One image in several formats and modes."""
    picture = Image.linear_gradient("L").resize((24, 24))
    kinds = [("PNG", "L"), ("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("GIF", "P")]
    kinds += [("WEBP", "RGB"), ("TIFF", "RGB"), ("TIFF", "I;16"), ("BMP", "RGB"), ("PPM", "RGB"), ("TGA", "RGBA")]
    found = []
    for file_format, mode in kinds:
        buffer = io.BytesIO()
        picture.convert("RGB" if mode in ("P", "CMYK", "RGBA") else "L").convert(mode).save(buffer, file_format)
        found.append(buffer.getvalue())
    return found


def run_image(drawn: tuple, folder: Path) -> None:
    """Decode a damaged image."""
    number, damage = drawn
    decode_images([{"bytes": changed(encoded_images()[number], damage), "path": None}], 1, image_size=8)


def run_weights(drawn: tuple, folder: Path) -> None:
    """Load a damaged weight file."""
    moe().config.save_pretrained(folder)
    save_file(moe().state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "model.safetensors"
    path.write_bytes(changed(path.read_bytes(), drawn))
    MoEForImageClassification.from_pretrained(folder)


@dataclass(frozen=True)
class Target:
    """A part of the interface: what is drawn for it, what is done, and the errors that its docstring promises."""

    name: str
    drawn: st.SearchStrategy
    run: Callable[[Any, Path], None]
    errors: tuple[type[Exception], ...] = (ValueError, TypeError, StrictDataclassError)  # of huggingface_hub < 2
    weight: int = 4


TARGETS = [
    Target("MoEConfig", some(MOE), partial(run_config, MoEConfig)),
    Target("DualMoEConfig", some(DUAL), partial(run_config, DualMoEConfig)),
    Target("config.json", some(MOE), run_config_file, (ValueError, OSError, StrictDataclassError)),
    Target("RobustTrainingArguments", some(TRAINING), run_training_arguments),
    *(Target(kind.__name__, some(drawn), partial(run_attack, kind), weight=2) for kind, drawn in ATTACKS.items()),
    Target("evaluate_robustness", some(EVALUATION), run_evaluation, (ValueError, TypeError, RuntimeError), weight=1),
    Target("forward of a mixture", some({k: FORWARD[k] for k in list(FORWARD)[:3]}), partial(run_forward, moe)),
    Target("forward of a dual model", some(FORWARD), partial(run_forward, dual)),
    Target("load_splits", some(SPLITS), run_splits, weight=1),
    Target("image file", st.tuples(st.integers(0, 11), FILES), run_image, (ValueError,)),
    Target("weight file", FILES, run_weights, (ValueError, OSError), weight=2),
]
