"""Tiny classifiers of other people's architectures with the image processor of their kind, for tests."""

import os

import torch
import transformers as hf

SIZE, LABELS = 32, 5
NORMALISATION = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SQUARE = {"height": SIZE, "width": SIZE}
SHORTEST, CROP = {"shortest_edge": SIZE}, {"do_center_crop": True, "crop_size": SQUARE}
SMALL = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
VIT = {"image_size": SIZE, "patch_size": 8, **SMALL}
STAGES = {"depths": [1, 1], "hidden_sizes": [8, 16]}


def vit():
    return hf.ViTForImageClassification(hf.ViTConfig(**VIT, num_labels=LABELS))


def timm_wrapper():
    settings = {"input_size": (3, SIZE, SIZE), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "crop_pct": 1.0}
    config = hf.TimmWrapperConfig(architecture="resnet10t", pretrained_cfg=settings, num_labels=LABELS)
    return hf.TimmWrapperForImageClassification(config)


FOREIGN = {  # a tiny model of each kind with random weights, and the image processor of its kind
    "vit": (vit, lambda: hf.ViTImageProcessor(size=SQUARE, image_mean=[0.5] * 3, image_std=[0.5] * 3)),
    "deit": (
        lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**VIT, num_labels=LABELS)),
        lambda: hf.DeiTImageProcessor(size=SQUARE, crop_size=SQUARE, **NORMALISATION),
    ),
    "swin": (
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(
                image_size=SIZE, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=LABELS
            )
        ),
        lambda: hf.ViTImageProcessor(size=SQUARE, **NORMALISATION),
    ),
    "convnext": (
        lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(num_stages=2, **STAGES, num_labels=LABELS)),
        lambda: hf.ConvNextImageProcessor(size=SHORTEST, crop_pct=0.875, **NORMALISATION),
    ),
    "resnet": (
        lambda: hf.ResNetForImageClassification(hf.ResNetConfig(embedding_size=8, **STAGES, num_labels=LABELS)),
        lambda: hf.ConvNextImageProcessor(size=SHORTEST, crop_pct=1.0, **NORMALISATION),
    ),
    "mobilenet_v2": (
        lambda: hf.MobileNetV2ForImageClassification(
            hf.MobileNetV2Config(image_size=SIZE, depth_multiplier=0.1, min_depth=8, num_labels=LABELS)
        ),
        lambda: hf.MobileNetV2ImageProcessor(size={"shortest_edge": 36}, crop_size=SQUARE),
    ),
    "beit": (
        lambda: hf.BeitForImageClassification(hf.BeitConfig(**VIT, num_labels=LABELS)),
        lambda: hf.BeitImageProcessor(size=SQUARE, do_center_crop=False, **NORMALISATION),
    ),
    "dinov2": (
        lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**VIT, num_labels=LABELS)),
        lambda: hf.BitImageProcessor(size=SHORTEST, crop_size=SQUARE, **NORMALISATION),
    ),
    "timm_wrapper": (timm_wrapper, None),  # its processor stands in its config.json
    "vit of 0 .. 255": (vit, lambda: hf.ViTImageProcessor(size=SQUARE, do_rescale=False, do_normalize=False)),
    "vit without normalisation": (vit, lambda: hf.ViTImageProcessor(size=SQUARE, do_normalize=False)),
}


def build(kind: str, labels: list[str] | None = None, seed: int = 0):
    """(model with generic random weights in eval mode, image processor or None)."""
    torch.manual_seed(seed)
    make, processor = FOREIGN[kind]
    model = make().eval()
    with torch.no_grad():  # answers that differ from photo to photo
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if labels:
        model.config.id2label, model.config.label2id = dict(enumerate(labels)), {n: i for i, n in enumerate(labels)}
    return model, processor and processor()


def save(kind: str, folder: "str | os.PathLike", labels: list[str] | None = None, seed: int = 0) -> None:
    """Save such a model; `labels` are the names of its five classes."""
    for part in build(kind, labels, seed):
        if part is not None:
            part.save_pretrained(folder)
