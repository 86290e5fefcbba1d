"""Saved folders load where hf_dualmoe is not installed: issue item 6, checked in one fresh Python process."""

import ast
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shake
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

import hf_dualmoe
from hf_dualmoe import DualMoEForImageClassification, MoEForImageClassification
from hf_dualmoe.data.datasets import load_splits, to_unit_range

PACKAGE = Path(hf_dualmoe.__file__).parent / "models"
CODE = {path.name for path in PACKAGE.glob("*_dualmoe.py")}
CODE_OF = {"dual": CODE, "moe": CODE - {"merging_dualmoe.py", "mixing_dualmoe.py", "modeling_dualmoe.py"}}
NO_CODE = {"config.json", "model.safetensors", "preprocessor_config.json"}

# Runs elsewhere, with the package blocked; prints one JSON line. Images and expected logits come from the parent.
CHILD = """
import importlib.abc, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_dualmoe":
            raise ImportError("hf_dualmoe is not installed here")

sys.meta_path.insert(0, Blocker())

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

torch.set_num_threads(1)
torch.set_grad_enabled(False)
inputs = load_file("inputs.safetensors")
images = inputs["images"]
remote = {"trust_remote_code": True}

def error(left, right):
    return (left.float() - right.float()).abs().max().item()

def describe(model, kind):
    return {
        "class": type(model).__name__,
        "module": type(model).__module__,
        "config": type(model.config).__name__,
        "training": any(module.training for module in model.modules()),
        "error": error(model(images).logits, inputs[kind]),
        "dtype": str(model.dtype),
        "finite": bool(model(images).logits.isfinite().all()),
    }

def check(kind):
    model = AutoModelForImageClassification.from_pretrained(kind, **remote)
    half = AutoModel.from_pretrained(kind, dtype=torch.bfloat16, device_map="cpu", **remote)
    result = {
        "loaded": describe(model, kind),
        "bfloat16": describe(half, kind),
        "AutoConfig": type(AutoConfig.from_pretrained(kind, **remote)).__name__,
    }
    model.save_pretrained("again-" + kind)
    result["again"] = describe(AutoModel.from_pretrained("again-" + kind, **remote), kind)
    processor = AutoImageProcessor.from_pretrained(kind, **remote)
    for name in ("square", "wide", "grey"):
        pixels = processor(Image.open(name + ".png"), return_tensors="pt")["pixel_values"]
        result[name] = {"shape": list(pixels.shape), "low": pixels.min().item(), "high": pixels.max().item()}
        if name == "square":
            result[name]["error"] = error(pixels, inputs["square"])
            result[name]["probs"] = model(pixels).logits.softmax(dim=1)[0].tolist()
    classify = pipeline("image-classification", model=kind, **remote)
    for batch_size in (1, 2):
        try:
            result["pipeline-%d" % batch_size] = classify(["square.png", "grey.png"], batch_size=batch_size, top_k=7)
        except Exception as problem:  # told apart from the other results
            result["pipeline-%d" % batch_size] = repr(problem)
    return result

results = {kind: check(kind) for kind in ("dual", "moe")}

dual = AutoModel.from_pretrained("dual", **remote)
ends = {}
for alpha, name in ((0, "standard"), (1, "robust")):
    by_call = dual(images, alpha=alpha).logits
    dual.set_alpha(alpha)
    for how, logits in (("call", by_call), ("set", dual(images).logits)):
        alone = inputs[name]
        same = torch.equal(logits.argmax(dim=1), alone.argmax(dim=1))
        ends[name + "-" + how] = {"error": error(logits.softmax(dim=1), alone.softmax(dim=1)), "argmax": same}
dual.save_pretrained("robust-only")
loaded = AutoModel.from_pretrained("robust-only", **remote)
saved_error = error(loaded(images).logits.softmax(dim=1), alone.softmax(dim=1))
ends["saved"] = {"alpha": loaded.config.alpha, "error": saved_error}
results["ends"] = ends

weights = AutoModelForImageClassification.from_pretrained("weights", **remote)
weights(images, alpha=0.75)
weights.save_pretrained("weights-again")
weights.merge(0.75).save_pretrained("merged")
alone = AutoModelForImageClassification.from_pretrained("merged", **remote)
again = AutoModel.from_pretrained("weights-again", **remote)
by_probs = AutoModel.from_pretrained("weights", mixing="probs", **remote)(images).logits
results["weights"] = {
    "call": error(weights(images).logits, inputs["weights"]),
    "again": error(again(images).logits, inputs["weights"]),
    "turned": error(weights(images, alpha=0.75).logits, alone(images).logits),
    "class": type(alone).__name__,
    "outputs": error(by_probs, inputs["weights"]),
    "pipeline": pipeline("image-classification", model="weights", top_k=1, **remote)("square.png")[0]["label"],
}
results["imported"] = sorted(name for name in sys.modules if name.split(".")[0] == "hf_dualmoe")
print(json.dumps(results))
"""


def save_png(path, array):
    Image.fromarray((255 * array).round().astype(np.uint8)).save(path)


NAMES = dict(enumerate(("ant", "bee", "cat", "dog", "elk", "fox", "gnu")))


@pytest.fixture(scope="module")
def saved(make_moe, _native_vit, _images, tmp_path_factory):
    """A folder with a dual model of a transformers ViT and a mixture, a one-channel mixture, and inputs."""
    tmp_path, native_vit, images = tmp_path_factory.mktemp("saved"), copy.deepcopy(_native_vit), _images
    labels = {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}
    constants = {"standard_image_mean": [0.5] * 3, "standard_image_std": [0.5] * 3}
    dual = DualMoEForImageClassification.from_models(native_vit, make_moe("resnet"), 0.625, **constants, **labels)
    moe = make_moe("vit", num_channels=1, image_mean=0.3, image_std=0.4, router_top_k=2, shared_stages=1)
    moe.config.id2label, moe.config.label2id = labels.values()
    robust = make_moe("resnet", backbone="resnet10t", num_experts=2)
    standard = copy.deepcopy(robust)
    shake(standard, 5)
    weights = DualMoEForImageClassification.from_models(standard, robust, 0.25, mixing="weights", **labels)
    weights.save_pretrained(tmp_path / "weights")
    dual.train().save_pretrained(tmp_path / "dual")
    moe.save_pretrained(tmp_path / "moe")
    square = (images[0].permute(1, 2, 0).numpy() * 255).round() / 255
    save_png(tmp_path / "square.png", square)
    save_png(tmp_path / "wide.png", np.tile(square, (2, 3, 1)))
    save_png(tmp_path / "grey.png", square[:, :, 0])
    with torch.no_grad():
        output = dual.eval()(images)
        tensors = {"dual": output.logits, "standard": output.standard_logits, "robust": output.robust_logits}
        tensors["moe"] = moe(images).logits
        tensors["weights"] = weights(images).logits
    tensors["square"] = torch.tensor(square).permute(2, 0, 1)[None].float()
    save_file(
        {name: t.contiguous() for name, t in {**tensors, "images": images}.items()}, tmp_path / "inputs.safetensors"
    )
    return tmp_path


# --- in a fresh process: slow, since `tests/hub/test_hub.py` loads models of the Hub in one --------------------------


@pytest.fixture(scope="module")
def child(saved):
    """What a fresh process without the package found in the saved folders."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(HF_HOME=str(saved / "hf_home"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", CHILD]
    process = subprocess.run(command, cwd=saved, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1])


CLASSES = {
    "dual": ("DualMoEForImageClassification", "DualMoEConfig"),
    "moe": ("MoEForImageClassification", "MoEConfig"),
}
KINDS = pytest.mark.parametrize("kind", CLASSES)


@KINDS
@pytest.mark.slow
def test_fresh_process_loads_saves_and_loads_again(child, saved, kind):
    for how in ("loaded", "again"):
        result = child[kind][how]
        assert (result["class"], result["config"]) == CLASSES[kind]
        assert result["module"].startswith("transformers_modules.")
        assert result["error"] == 0 and result["training"] is False and result["dtype"] == "torch.float32"
    assert {path.name for path in (saved / f"again-{kind}").iterdir()} == NO_CODE | CODE_OF[kind]
    half = child[kind]["bfloat16"]
    assert half["dtype"] == "torch.bfloat16" and half["finite"]
    assert 0 < half["error"] < 1 and half["training"] is False


@pytest.mark.slow
def test_fresh_process_does_not_see_the_package(child):
    assert child["imported"] == []
    assert (child["dual"]["AutoConfig"], child["moe"]["AutoConfig"]) == ("DualMoEConfig", "MoEConfig")


@pytest.mark.slow
def test_fresh_process_turns_the_dial_and_saves_it(child):
    for how in ("standard-call", "standard-set", "robust-call", "robust-set"):
        assert child["ends"][how]["error"] <= 1e-6 and child["ends"][how]["argmax"]
    assert child["ends"]["saved"]["alpha"] == 1 and child["ends"]["saved"]["error"] <= 1e-6


@pytest.mark.slow
def test_fresh_process_has_a_dial_in_the_weights(child):
    found = child["weights"]
    assert max(found[name] for name in ("call", "again", "turned")) <= 1e-5
    assert found["class"] == "MoEForImageClassification" and found["pipeline"] in NAMES.values()
    assert found["outputs"] > 1e-3


@KINDS
@pytest.mark.slow
def test_fresh_process_reads_any_picture_as_pixels_in_0_1(child, kind):
    assert child[kind]["square"]["error"] <= 1e-6
    for name in ("square", "wide", "grey"):
        assert child[kind][name]["shape"] == [1, 3, 30, 30]
        assert child[kind][name]["low"] >= 0 and child[kind][name]["high"] <= 1


@KINDS
@pytest.mark.slow
def test_fresh_process_runs_the_pipeline(child, kind):
    for batch_size in (1, 2):
        result = child[kind][f"pipeline-{batch_size}"]
        assert isinstance(result, list), result
        for entries in result:
            assert {entry["label"] for entry in entries} == set(NAMES.values())
        scores = {entry["label"]: entry["score"] for entry in result[0]}
        assert [scores[NAMES[i]] for i in range(7)] == pytest.approx(child[kind]["square"]["probs"], abs=1e-5)


# --- in this process -------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize(("auto_class", "trust"), [(AutoModel, False), (AutoModelForImageClassification, True)])
def test_installed_package_uses_its_own_classes(saved, kind, auto_class, trust):
    model = auto_class.from_pretrained(saved / kind, trust_remote_code=trust)
    assert type(model) is {"dual": DualMoEForImageClassification, "moe": MoEForImageClassification}[kind]
    config = AutoConfig.from_pretrained(saved / kind, trust_remote_code=trust)
    assert type(config).__module__.startswith("hf_dualmoe")
    assert not any(module.training for module in model.modules())


@KINDS
def test_saved_folder_holds_code_and_safetensors_but_no_pickle(saved, kind):
    assert {path.name for path in (saved / kind).iterdir()} == NO_CODE | CODE_OF[kind]
    for name in CODE_OF[kind]:
        assert (saved / kind / name).read_text() == (PACKAGE / name).read_text()
    config = json.loads((saved / kind / "config.json").read_text())
    model_class, config_class = CLASSES[kind]
    module = {"dual": "modeling_dualmoe", "moe": "moe_dualmoe"}[kind]
    assert config["auto_map"] == {
        "AutoConfig": f"configuration_dualmoe.{config_class}",
        "AutoModel": f"{module}.{model_class}",
        "AutoModelForImageClassification": f"{module}.{model_class}",
    }
    processor = json.loads((saved / kind / "preprocessor_config.json").read_text())
    assert processor["do_rescale"] is True and processor["do_normalize"] is False


# --- what the modules import -----------------------------------------------------------------------------------------


def test_importing_the_package_imports_no_data_or_plotting_library():
    """Follow what `import hf_dualmoe` runs (module level only) through our own files."""
    todo, seen, external = ["__init__"], set(), set()
    while todo:
        module = todo.pop()
        seen.add(module)
        for node in ast.parse((PACKAGE / f"{module}.py").read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                todo += [name for name in [node.module] if name not in seen]
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                external |= {name.split(".")[0] for name in names}
    assert "modeling_dualmoe" in seen and "torch" in external
    assert not external & {"datasets", "evaluate", "pyarrow", "sklearn", "matplotlib", "scipy", "pandas"}


def test_shipped_digits_model_is_what_its_results_say():
    folder = Path(__file__).parents[2] / "model_cards" / "digits_dual"
    assert (folder / "model.safetensors").stat().st_size < 3_000_000
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    results = json.loads((folder / "results.json").read_text())
    test = load_splits("digits").test
    with torch.no_grad():
        right = model(to_unit_range(test.images)).logits.argmax(dim=1) == test.labels
    assert 100 * right.float().mean().item() == pytest.approx(results["metrics"]["sa"], abs=0.01)
    assert model.config.alpha == results["model"]["alpha"]


def test_shipped_cifar10_model_is_that_of_its_results():
    folder = Path(__file__).parents[2] / "model_cards" / "cifar10_dual"
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    results = json.loads((folder / "results.json").read_text())
    assert model.config.alpha == results["model"]["alpha"] == results["alpha_choice"]["alpha"]
    assert sum(p.numel() for p in model.parameters()) == results["model"]["parameters"]
    with torch.no_grad():
        assert model(torch.rand(2, 3, 32, 32)).logits.shape == (2, 10)
