"""`hf_dualmoe.hub.onnx`: a plain module of logits, and ONNX files that compute what the model computes."""

import json
import sys

import pytest
import torch
from torch import nn

from hf_dualmoe import DualMoEForImageClassification
from hf_dualmoe.hub.onnx import DenseModel, LogitsModel, export_onnx, onnx_difference

SMALL = {"backbone": "resnet10t", "stem": "cifar", "num_experts": 2, "image_size": 10}
SMALL_VIT = {"backbone_kwargs": {"patch_size": 5, "embed_dim": 12, "depth": 1, "num_heads": 3}}
SMALL_VIT |= {"image_size": 10, "num_experts": 2}


@pytest.fixture
def small_dual(make_moe):
    """A dual model of two mixtures (k = 1 and dense), of which F_R shares its first stage among its experts."""
    standard = make_moe("vit", **SMALL_VIT, router_top_k=2)
    robust = make_moe("resnet", **SMALL, shared_stages=1, router="features")
    return DualMoEForImageClassification.from_models(standard, robust, alpha=0.7)


@pytest.fixture
def onnx():
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    return pytest.importorskip("onnx")


# --- a plain module --------------------------------------------------------------------------------------------------


def test_logits_model_is_the_model_in_eval_mode(moe, images):
    expected = moe(images).logits
    wrapped = LogitsModel(moe.train())
    assert not any(module.training for module in wrapped.modules())
    assert torch.equal(wrapped(images), expected)
    assert {name.removeprefix("model.") for name in wrapped.state_dict()} == set(moe.state_dict())


def test_logits_model_holds_or_follows_the_dial(dual, images):
    held, following = LogitsModel(dual, alpha=1.0), LogitsModel(dual)
    dual.set_alpha(0.0)
    output = dual(images)
    assert torch.allclose(held(images).softmax(1), output.robust_logits.softmax(1), atol=1e-6)
    assert torch.allclose(following(images).softmax(1), output.standard_logits.softmax(1), atol=1e-6)


def test_logits_model_passes_gradients_to_the_images(dual, images, labels):
    images.requires_grad_(True)
    nn.functional.cross_entropy(LogitsModel(dual)(images), labels).backward()
    assert (images.grad.flatten(1).abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize("wrapper", [LogitsModel, DenseModel])
def test_wrappers_refuse_a_dial_that_is_not_there_or_out_of_range(wrapper, resnet_moe, dual):
    with pytest.raises(ValueError, match=r"alpha=0.5 was given, but MoEForImageClassification has no dial"):
        wrapper(resnet_moe, alpha=0.5)
    for alpha in (1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"alpha={alpha} must be in \[0, 1\]"):
            wrapper(dual, alpha=alpha)


# --- the traceable path ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "top_k"), [("resnet", 1), ("vit", 1), ("resnet", 2), ("vit", 4)])
def test_dense_model_equals_dispatch(make_moe, images, arch, top_k):
    model = make_moe(arch, router_top_k=top_k)
    with torch.no_grad():
        output = model(images)
        assert output.expert_index.unique().numel() > 1  # else no choice is tested
        assert torch.allclose(DenseModel(model)(images), output.logits, atol=1e-5)


def test_dense_dual_model_equals_dispatch(small_dual, native_vit, resnet_moe, images):
    small = images[:, :, :10, :10].contiguous()
    normalised = DualMoEForImageClassification.from_models(
        native_vit, resnet_moe, 0.6, standard_image_mean=[0.4] * 3, standard_image_std=[0.3] * 3
    )
    with torch.no_grad():
        for model, inputs in ((small_dual, small), (normalised, images)):
            for alpha in (None, 0.0, 1.0):
                expected = model(inputs, alpha=alpha).logits.softmax(1)
                assert torch.allclose(DenseModel(model, alpha)(inputs).softmax(1), expected, atol=1e-6)
                if alpha is not None:  # given at the call
                    found = DenseModel(model)(inputs, torch.tensor(alpha))
                    assert torch.allclose(found.softmax(1), expected, atol=1e-6)


# --- ONNX ------------------------------------------------------------------------------------------------------------


LIPSCHITZ = {"backbone": "lipschitz_mlp", "width": None, "backbone_kwargs": {"hidden_sizes": [6]}, "num_experts": 2}
SLOW = pytest.mark.slow  # the dual model below has parts like these
MIXTURES = [
    pytest.param("resnet", LIPSCHITZ, 21, id="lipschitz"),
    pytest.param("resnet", {**SMALL, "router_top_k": 1}, 18, id="resnet-k1", marks=SLOW),
    pytest.param("vit", {**SMALL_VIT, "router_top_k": 2}, 22, id="vit-dense", marks=SLOW),
]


@pytest.mark.parametrize(("arch", "fields", "opset_version"), MIXTURES)
def test_onnx_of_a_mixture(onnx, make_moe, tmp_path, arch, fields, opset_version):
    model = make_moe(arch, **fields)
    path = tmp_path / "model.onnx"
    assert 0 <= export_onnx(model.train(), path, opset_version=opset_version) <= 1e-4
    assert {entry.version for entry in onnx.load(path).opset_import if entry.domain == ""} == {opset_version}
    assert model.training and all(p.requires_grad for p in model.parameters())  # comes back as it was
    model.eval()
    for batch in (1, 2, 5, 32):
        images = torch.rand(batch, 3, model.config.image_size, model.config.image_size)
        if batch == 32:
            assert model(images).expert_index.unique().numel() > 1
        assert onnx_difference(model, path, images) <= 1e-4
    assert list(tmp_path.iterdir()) == [path]
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(metadata["id2label"]) == {str(i): name for i, name in model.config.id2label.items()}


def test_onnx_of_a_dual_model_keeps_its_dial(onnx, small_dual, tmp_path):
    path = tmp_path / "dual.onnx"
    export_onnx(small_dual, path, dial_input=True)
    images = torch.rand(6, 3, 10, 10)
    assert onnx_difference(small_dual, path, images, 0.0, 0.35, 1.0) <= 1e-4
    assert onnx_difference(small_dual, path, images) <= 1e-4  # where it is set
    written = small_dual.config.alpha
    small_dual.set_alpha(0.1)
    assert onnx_difference(small_dual, path, images) <= 1e-4
    assert (small_dual(images).logits - small_dual(images, alpha=written).logits).abs().max() > 1e-2


def test_export_refuses_before_writing(small_dual, resnet_moe, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    path.write_text("an earlier file")
    cases = [
        (resnet_moe, {"alpha": 0.5}, "has no dial"),
        (resnet_moe, {"dial_input": True}, "MoEForImageClassification has no dial"),
        (small_dual, {"dial_input": True, "alpha": 0.5}, "alpha was given too"),
        (nn.Conv2d(3, 4, 1), {}, "give image_size"),
    ]
    for model, options, message in cases:
        with pytest.raises(ValueError, match=message):
            export_onnx(model, path, **options)
    with pytest.raises(ValueError, match="does not exist"):
        export_onnx(resnet_moe, tmp_path / "nowhere" / "model.onnx")
    assert path.read_text() == "an earlier file"


@pytest.mark.parametrize("opset_version", [17, 0, 1000, "20", 20.0])
def test_operator_set_out_of_range_is_refused(onnx, opset_version, resnet_moe, tmp_path):
    with pytest.raises(ValueError, match=rf"opset_version={opset_version!r} must be an integer in \[18, \d+\]"):
        export_onnx(resnet_moe, tmp_path / "model.onnx", opset_version=opset_version)


def test_operator_set_that_the_exporter_left_aside_is_told(onnx, resnet_moe, tmp_path, monkeypatch):
    program = type("Program", (), {"model": type("Model", (), {"opset_imports": {"": 18}})})
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: program)
    with pytest.raises(RuntimeError, match="cannot be written with opset_version=19, only with 18"):
        export_onnx(resnet_moe, tmp_path / "model.onnx", opset_version=19)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_with_what_to_do(onnx, half, native_vit, resnet_moe, tmp_path):
    model = DualMoEForImageClassification.from_models(native_vit, resnet_moe.to(half))
    with pytest.raises(ValueError, match=rf"weights in {half}.*Export model.float\(\)"):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Sorter(nn.Module):
    """A model with an operator that ONNX does not have."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, images):
        return torch.linalg.eigvals(images.mean(dim=1)).real * self.weight


def test_export_names_what_cannot_be_exported_and_leaves_no_file(onnx, tmp_path):
    with pytest.raises(RuntimeError, match=r"Sorter cannot be exported to ONNX: .*linalg_eig"):
        export_onnx(Sorter(), tmp_path / "model.onnx", image_size=4, num_channels=3)
    assert not list(tmp_path.iterdir())


class Fickle(nn.Module):
    """A model that a tracer records wrongly: it answers differently from call to call."""

    def __init__(self):
        super().__init__()
        self.scale, self.calls = nn.Parameter(torch.ones(1)), 0

    def forward(self, images):
        self.calls += 1
        return images.flatten(1) * self.scale * self.calls


def test_export_refuses_a_file_that_differs_and_keeps_the_earlier_one(onnx, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("an earlier file")
    with pytest.raises(RuntimeError, match="differs from Fickle by"):
        export_onnx(Fickle(), path, image_size=2, num_channels=3)
    assert path.read_text() == "an earlier file"
    assert list(tmp_path.iterdir()) == [path]


class OneBatchSize(nn.Module):
    """A model that a tracer records for one batch size only: `len` of a tensor is a plain number."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images):
        return images.reshape(len(images), -1) * self.scale


def test_export_refuses_a_file_for_one_batch_size(onnx, tmp_path):
    with pytest.raises(RuntimeError, match="OneBatchSize does not run on a batch of 1 images"):
        export_onnx(OneBatchSize(), tmp_path / "model.onnx", image_size=2, num_channels=3)
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(resnet_moe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_dualmoe\[export\]'"):
        export_onnx(resnet_moe, tmp_path / "model.onnx")
