import json
import math

import pytest
from transformers import AutoConfig, ViTConfig

from hf_dualmoe import DualMoEConfig, MoEConfig, MoEForImageClassification

ALL_MOE_FIELDS = {"backbone": "vit_tiny_patch16_224", "backbone_kwargs": {"patch_size": 6, "embed_dim": 48}}
ALL_MOE_FIELDS |= {"stem": "default", "width": [8, 16, 24, 32], "image_size": 30, "backbone_image_size": 36}
ALL_MOE_FIELDS |= {"num_channels": 2, "image_mean": [0.1, 0.2], "image_std": [0.3, 0.4], "num_experts": 5}
ALL_MOE_FIELDS |= {"router_top_k": 3, "router": "features", "router_pool_size": 7, "shared_stages": 2}
ALL_MOE_FIELDS |= {"router_aux_loss_coef": 0.5, "output_router_logits": True}
ALL_DUAL_FIELDS = {"alpha": 0.625, "mixing": "logits", "robust_logit_map": {"scale": 0.5}}
ALL_DUAL_FIELDS |= {"standard_logit_map": {"scale": 2.0, "clamp": 0.5, "power": 3.0}}
ALL_DUAL_FIELDS |= {"standard_image_mean": [0.1, 0.2, 0.3], "standard_image_std": [0.4, 0.5, 0.6]}
ALL_DUAL_FIELDS |= {"robust_image_mean": [0.7, 0.8, 0.9], "robust_image_std": [0.15, 0.25, 0.35]}


def case_id(value) -> str:
    """Readable part of a test's id: the fields set in this case."""
    if isinstance(value, dict):
        return ",".join(f"{name}={field}" for name, field in value.items())[:60]
    return value.__name__ if isinstance(value, type) else ""


def test_moe_defaults_are_those_of_the_paper():
    config = MoEConfig()
    assert (config.backbone, config.stem, config.num_experts, config.router_top_k) == ("resnet18", "cifar", 4, 1)
    assert (config.router, config.shared_stages, config.image_size, config.num_channels) == ("linear", 0, 32, 3)
    assert config.image_mean == [0.5] * 3 and config.image_std == [0.25] * 3
    assert config.backbone_kwargs == {} and config.width is None and config.output_router_logits is False


def test_dual_defaults_allow_certificates():
    config = DualMoEConfig()
    assert config.alpha > 0.5 and config.mixing == "probs"
    assert type(config.standard) is type(config.robust) is MoEConfig
    assert config.standard_logit_map is config.robust_logit_map is config.standard_image_mean is None


NAMES = {"id2label": {0: "cat", 1: "dog", 2: "emu"}, "label2id": {"cat": 0, "dog": 1, "emu": 2}}
PARTS = {"standard": MoEConfig(num_experts=1, **NAMES), "robust": MoEConfig(num_experts=5, router="conv", **NAMES)}
NATIVE = ViTConfig(image_size=30, patch_size=6, hidden_size=24, num_labels=7)
CONFIGS = {
    "moe": (MoEConfig(**ALL_MOE_FIELDS, **NAMES), ALL_MOE_FIELDS | NAMES | {"num_labels": 3}),
    "dual": (DualMoEConfig(**PARTS, **ALL_DUAL_FIELDS), ALL_DUAL_FIELDS | NAMES),
    "of a ViT": (DualMoEConfig(standard=NATIVE, robust=MoEConfig(image_size=30, num_labels=7)), {"num_labels": 7}),
}


def facts(config):
    """What a config says, but for where it came from."""
    fields = config.to_dict()
    for part in (fields, fields.get("standard", {}), fields.get("robust", {})):
        for name in ("transformers_version", "_name_or_path", "auto_map", "architectures", "dtype"):
            part.pop(name, None)
    return fields


@pytest.mark.parametrize(("config", "expected"), CONFIGS.values(), ids=CONFIGS)
def test_config_survives_every_way_out(config, expected, tmp_path):
    config.save_pretrained(tmp_path / "inner")
    config.to_json_file(tmp_path / "all.json", use_diff=False)
    copies = {
        "dict": type(config).from_dict(config.to_dict()),
        "diff": type(config).from_dict(config.to_diff_dict()),
        "text": type(config).from_dict(json.loads(config.to_json_string())),
        "file": type(config).from_json_file(tmp_path / "all.json"),
        "subfolder": type(config).from_pretrained(tmp_path, subfolder="inner"),
        "auto": AutoConfig.from_pretrained(tmp_path / "inner"),
    }
    for how, twin in copies.items():
        assert type(twin) is type(config) and facts(twin) == facts(config), how
        assert {name: getattr(twin, name) for name in expected} == expected, how
        for part in ("standard", "robust"):
            assert type(getattr(twin, part, None)) is type(getattr(config, part, None)), how


def test_from_pretrained_takes_overrides(tmp_path):
    MoEConfig(num_experts=5).save_pretrained(tmp_path / "moe")
    loaded = MoEConfig.from_pretrained(tmp_path / "moe", router_top_k=3, num_labels=7, image_mean=0.125)
    assert (loaded.num_experts, loaded.router_top_k, loaded.num_labels) == (5, 3, 7)
    assert loaded.image_mean == [0.125] * 3

    DualMoEConfig(alpha=0.25, mixing="logits").save_pretrained(tmp_path / "dual")
    loaded, unused = DualMoEConfig.from_pretrained(
        tmp_path / "dual", alpha=0.875, robust={"num_experts": 6}, colour="red", return_unused_kwargs=True
    )
    assert (loaded.alpha, loaded.mixing, loaded.robust.num_experts) == (0.875, "logits", 6)
    assert unused == {"colour": "red"}


@pytest.mark.parametrize(
    ("config_class", "override", "expected"),
    [
        (MoEConfig, {"router_top_k": 6}, "router_top_k=6"),
        (MoEConfig, {"image_mean": [0.5]}, "image_mean has 1 values"),
        (DualMoEConfig, {"alpha": 2}, "alpha=2"),
    ],
)
def test_overrides_of_from_pretrained_are_checked_like_other_fields(config_class, override, expected, tmp_path):
    config_class().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=expected):
        config_class.from_pretrained(tmp_path, **override)


def test_scalars_become_one_value_per_channel():
    config = MoEConfig(num_channels=2, image_mean=0.5, image_std=1)
    assert config.image_mean == [0.5, 0.5] and config.image_std == [1.0, 1.0]


def test_configs_do_not_share_mutable_state():
    kwargs = {"patch_size": 4}
    first, second = MoEConfig(backbone_kwargs=kwargs), MoEConfig(backbone_kwargs=kwargs)
    first.backbone_kwargs["patch_size"] = 8
    assert kwargs == second.backbone_kwargs == {"patch_size": 4}


def test_dual_takes_its_labels_from_the_robust_model():
    for maps in (NAMES, {"id2label": NAMES["id2label"], "label2id": None}):
        config = DualMoEConfig(standard=MoEConfig(num_labels=3), robust=MoEConfig(**maps))
        assert (config.id2label, config.label2id) == (NAMES["id2label"], NAMES["label2id"])


INVALID_MOE = [
    ({"stem": "imagenet"}, ["stem='imagenet'", "'cifar', 'default'"]),
    ({"router": "mlp"}, ["router='mlp'", "'linear', 'pooled', 'conv', 'features'"]),
    ({"router": "features"}, ["router='features'", "shared_stages >= 1"]),
    ({"num_experts": 0}, ["num_experts=0", "at least 1"]),
    ({"num_experts": 2.5}, ["num_experts=2.5", "integer"]),
    ({"num_experts": True}, ["num_experts=True"]),
    ({"router_top_k": 5}, ["router_top_k=5", "num_experts=4"]),
    ({"router_top_k": 0}, ["router_top_k=0", "at least 1"]),
    ({"image_size": 0}, ["image_size=0", "at least 1"]),
    ({"image_size": "32"}, ["image_size='32'", "integer"]),
    ({"backbone_image_size": -224}, ["backbone_image_size=-224", "at least 1"]),
    ({"num_channels": 0}, ["num_channels=0", "at least 1"]),
    ({"router_pool_size": 0}, ["router_pool_size=0", "at least 1"]),
    ({"shared_stages": -1}, ["shared_stages=-1", "at least 0"]),
    ({"router_aux_loss_coef": -0.1}, ["router_aux_loss_coef=-0.1", "at least 0"]),
    ({"router_aux_loss_coef": math.nan}, ["router_aux_loss_coef=nan"]),
    ({"width": 0}, ["width=0", "> 0"]),
    ({"width": -0.5}, ["width=-0.5", "> 0"]),
    ({"image_mean": [0.5, 0.5]}, ["image_mean has 2 values", "num_channels=3"]),
    ({"image_std": [0.5] * 4}, ["image_std has 4 values", "num_channels=3"]),
    ({"image_std": [0.5, 0.0, 0.5]}, ["image_std=[0.5, 0.0, 0.5]", "> 0"]),
    ({"image_std": math.nan}, ["image_std=[nan, nan, nan]"]),
    ({"image_mean": [0.5, math.inf, 0.5]}, ["image_mean=[0.5, inf, 0.5]"]),
    ({"format_version": 2}, ["format_version=2", "newer hf_dualmoe", "trust_remote_code=True"]),
]
INVALID_DUAL = [
    ({"alpha": -0.1}, ["alpha=-0.1", "[0, 1]"]),
    ({"alpha": 1.01}, ["alpha=1.01", "[0, 1]"]),
    ({"alpha": math.nan}, ["alpha=nan", "[0, 1]"]),
    ({"alpha": "0.5"}, ["alpha='0.5'", "[0, 1]"]),
    ({"mixing": "sum"}, ["mixing='sum'", "'probs', 'logits'"]),
    ({"standard_logit_map": {"scale": 1, "slope": 2}}, ["standard_logit_map", "'slope'", "'clamp', 'power', 'scale'"]),
    ({"robust_logit_map": {"scale": 0}}, ["robust_logit_map['scale']=0", "> 0"]),
    ({"robust_logit_map": {"power": -1}}, ["robust_logit_map['power']=-1", "> 0"]),
    ({"standard_image_mean": [0.5] * 3}, ["standard_image_std"]),
    ({"robust_image_mean": [0.5] * 3, "robust_image_std": [0.5, 0.0, 0.5]}, ["robust_image_std", "> 0"]),
    ({"robust_image_mean": [0.5], "robust_image_std": [0.5]}, ["robust_image_mean has 1 values", "num_channels=3"]),
    ({"standard": MoEConfig(image_size=28)}, ["standard.image_size=28", "robust.image_size=32"]),
    ({"standard": MoEConfig(num_channels=1)}, ["standard.num_channels=1", "robust.num_channels=3"]),
    ({"standard": MoEConfig(num_labels=7)}, ["standard.num_labels=7", "robust.num_labels=2"]),
    ({"standard": {"num_experts": 0}}, ["num_experts=0"]),
    ({"format_version": "1.0"}, ["format_version='1.0'", "newer hf_dualmoe"]),
]


@pytest.mark.parametrize(
    ("config_class", "fields", "expected"),
    [(MoEConfig, *case) for case in INVALID_MOE] + [(DualMoEConfig, *case) for case in INVALID_DUAL],
    ids=case_id,
)
def test_invalid_field_is_refused_by_name_and_value(config_class, fields, expected):
    with pytest.raises(ValueError) as error:
        config_class(**fields)
    for text in expected:
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"backbone": "resnet81"}, ["backbone='resnet81'", "did you mean", "resnet18"]),
        ({"backbone": "qqqq"}, ["backbone='qqqq'", "not a timm model."]),
        ({"backbone": "test_convnext", "width": 0.5}, ["width=0.5", "'test_convnext'", "ResNet"]),
        ({"width": [8, 16, 24]}, ["width=[8, 16, 24]", "4 positive"]),
        ({"width": [8, 16, 24, 0]}, ["width=[8, 16, 24, 0]", "4 positive"]),
        ({"backbone": "resnet18d", "stem": "default", "width": 0.125}, ["width", "deep stem", "stem='cifar'"]),
        ({"width": 0.125, "shared_stages": 5}, ["shared_stages=5", "4 stages"]),
        ({"backbone": "test_vit", "shared_stages": 9}, ["shared_stages=9", "stages of VisionTransformer"]),
        ({"backbone": "test_convnext", "shared_stages": 1}, ["shared_stages=1", "ResNet or ViT"]),
        ({"backbone": "test_vit", "backbone_kwargs": {"depht": 2}}, ["backbone='test_vit'", "depht"]),
    ],
    ids=case_id,
)
def test_model_that_cannot_be_built_is_refused(fields, expected):
    with pytest.raises(ValueError) as error:
        MoEForImageClassification(MoEConfig(**fields))
    for text in expected:
        assert text in str(error.value)


@pytest.mark.parametrize("config", [MoEConfig(), DualMoEConfig()], ids=lambda config: config.model_type)
def test_config_of_a_newer_version_is_refused_on_loading(config, tmp_path):
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(ValueError, match="format_version=99.*newer hf_dualmoe"):
        type(config).from_pretrained(tmp_path)
