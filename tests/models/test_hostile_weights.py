"""Weights and configs from strangers: code that touches nothing else, safetensors only, nothing absurd, no tokens."""

import ast
import json
import logging
import pickle
import shutil
import struct
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
from transformers.integrations import peft as transformers_peft
from transformers.models.auto import auto_factory

import hf_dualmoe
from hf_dualmoe import DualMoEConfig, DualMoEForImageClassification, MoEConfig, MoEForImageClassification
from hf_dualmoe.models import backbones_dualmoe, pretrained_dualmoe
from hf_dualmoe.models.backbones_dualmoe import check_model_size

PACKAGE = Path(hf_dualmoe.__file__).parent / "models"
CODE = sorted(PACKAGE.glob("*_dualmoe.py"))

# --- the code that travels -------------------------------------------------------------------------------------------

STANDARD_LIBRARY = {
    *("collections.abc", "contextlib", "contextvars", "copy", "dataclasses", "difflib", "functools", "json", "math"),
    *("numbers", "os", "typing", "weakref"),
}
OTHERS = {"torch", "timm", "transformers", "deel"}  # deel: optional, for training
OF_OS = {"os.PathLike", "os.path.basename", "os.path.normpath", "os.path.getsize", "os.path.isdir"}
WORDS = {  # names that code needs in order to reach files, processes, the network or other code
    *("open", "exec", "eval", "compile", "__import__", "input", "breakpoint", "globals", "locals", "vars"),
    *("system", "popen", "spawn", "fork", "execv", "remove", "unlink", "rmdir", "mkdir", "makedirs", "rename"),
    *("subprocess", "socket", "requests", "urllib", "http", "httpx", "ctypes", "importlib", "pickle", "shutil", "sys"),
    *("environ", "getenv", "listdir", "scandir", "walk", "pathlib", "Path", "hf_hub_download", "snapshot_download"),
    *("torch.load", "torch.save", "torch.hub", "torch.package", "torch.ops.load_library", "torch.utils.cpp_extension"),
    *("timm.models.load_checkpoint", "__subclasses__", "__globals__", "__builtins__", "__code__"),
}


def dotted(node):
    """`a.b.c` of nested attributes, or None."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def forbidden(source):
    """What a code file does that code from the Hub must not do."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if not allowed_module(alias.name)]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and not allowed_module(node.module):
            found.append(node.module)
        elif isinstance(node, ast.ImportFrom):
            found += [alias.name for alias in node.names if alias.name in WORDS]
        elif isinstance(node, ast.Name) and node.id in WORDS:
            found.append(node.id)
        elif isinstance(node, ast.Attribute):
            name = dotted(node) or node.attr
            of_os = name.startswith("os.") and name not in OF_OS | {"os.path"}
            # `compile` and `eval` are methods of models, `remove` one of hooks; the other words are no method of ours
            names_word = any(name == word or name.startswith(f"{word}.") for word in WORDS)
            word = names_word or node.attr in WORDS - {"eval", "compile", "remove"}
            found += [name] if of_os or word else []
    return found


def allowed_module(name):
    return name in STANDARD_LIBRARY or name.split(".")[0] in OTHERS


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.stem)
def test_published_code_reaches_no_files_processes_or_network(path):
    assert forbidden(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess",
        "import socket as s",
        "from urllib.request import urlopen",
        "from os import system",
        "import os\nos.system('ls')",
        "import os\nx = os.environ['HF_TOKEN']",
        "import os\nos.path.exists('x')",
        "open('x')",
        "eval('1')",
        "getattr(__builtins__, 'op' + 'en')",
        "().__class__.__base__.__subclasses__()",
        "import torch\ntorch.load('x')",
        "from torch import load, hub\ntorch.hub.load('x')",
        "from huggingface_hub import HfApi",
        "import torch.utils.cpp_extension as c\nx = torch.utils.cpp_extension.load",
    ],
)
def test_the_check_of_the_code_finds(source):
    assert forbidden(source)


# --- weight files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(make_moe, tmp_path_factory):
    """A folder with a tiny mixture."""
    folder = tmp_path_factory.mktemp("saved") / "moe"
    make_moe("resnet", num_experts=2).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it, to be tampered with."""
    return Path(shutil.copytree(saved, tmp_path / "moe"))


class Bomb:
    """Pickled, it writes a file where it is loaded."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (Path.touch, (Path(self.marker),))


def load(folder):
    return AutoModelForImageClassification.from_pretrained(folder)


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_untampered_folder_loads(folder, make_moe):
    loaded, original = load(folder).state_dict(), make_moe("resnet", num_experts=2).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize(
    ("place", "how"), [("pytorch_model.bin", "torch.save"), ("index", "torch.save"), ("config", "pickle")]
)
def test_pickles_are_refused_and_never_run(folder, tmp_path, place, how):
    marker = tmp_path / "marker"
    weights = {**load_file(folder / "model.safetensors"), "bomb": Bomb(marker)}
    (folder / "model.safetensors").unlink()
    name = "pytorch_model.bin"
    if how == "pickle":
        (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    else:
        torch.save(weights, folder / name)
    if place == "index":
        keys = dict.fromkeys(weights, name)
        index = {"metadata": {"dtype": "float32", "total_size": 1}, "weight_map": keys}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif place == "config":
        change_config(folder, transformers_weights=name)
    with pytest.raises((OSError, ValueError), match="safetensors|transformers_weights.*not allowed"):
        load(folder)
    assert not marker.exists()
    with pytest.raises(ValueError, match="use_safetensors=False is not allowed"):
        MoEForImageClassification.from_pretrained(folder, use_safetensors=False)
    with pytest.raises((OSError, ValueError)):
        MoEForImageClassification.from_pretrained(folder / name, config=MoEConfig.from_pretrained(folder))
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()  # it would have


def with_header(path, change):
    """Rewrite the JSON header of a safetensors file."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header = json.dumps(change(header)).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])


def first_shape(shape):
    def change(header):
        name = next(name for name in header if name != "__metadata__")
        return {**header, name: {**header[name], "shape": shape}}

    return change


def overlapping(header):
    return {n: {**v, "data_offsets": [0, 4]} if n != "__metadata__" else v for n, v in header.items()}


DAMAGES = {
    "endless header": lambda path: path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:]),
    "header beyond the end": lambda path: path.write_bytes(struct.pack("<Q", 10**6) + b"{}"),
    "no JSON": lambda path: path.write_bytes(struct.pack("<Q", 4) + b"junk" + path.read_bytes()),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "empty": lambda path: path.write_bytes(b""),
    "huge shape": lambda path: with_header(path, first_shape([10**12])),
    "negative shape": lambda path: with_header(path, first_shape([-1])),
    "overlap": lambda path: with_header(path, overlapping),
    "a pickle by another name": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_safetensors_are_refused(folder, damage):
    DAMAGES[damage](folder / "model.safetensors")
    with pytest.raises(ValueError, match="The weights are not a valid safetensors file"):
        load(folder)


def rewritten(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


TAMPERED = {
    "missing": (lambda t: t.pop("experts.1.fc.weight"), r"1 missing \(experts.1.fc.weight\)"),
    "extra": (lambda t: t.update(spy=torch.zeros(3)), r"1 unexpected \(spy\)"),
    "shape": (
        lambda t: t.update({"experts.0.fc.bias": torch.zeros(9)}),
        r"1 of another shape \(experts.0.fc.bias \(9,\) instead of \(7,\)\)",
    ),
    "renamed": (lambda t: t.update(other=t.pop("experts.1.fc.bias")), "1 missing .*; 1 unexpected"),
    "NaN": (lambda t: t["experts.1.fc.bias"].fill_(torch.nan), "experts.1.fc.bias holds values that are NaN"),
    "inf": (lambda t: t["experts.1.bn1.running_var"].fill_(torch.inf), "experts.1.bn1.running_var holds values that"),
}


MISFITS = [(what, torch.float32) for what in TAMPERED] + [("shape", torch.bfloat16), ("NaN", torch.bfloat16)]


@pytest.mark.parametrize(("what", "dtype"), MISFITS, ids=str)
def test_weights_that_do_not_fit_are_refused(folder, what, dtype):
    change, message = TAMPERED[what]
    rewritten(folder, change)
    with pytest.raises(ValueError, match=message):
        AutoModelForImageClassification.from_pretrained(folder, dtype=dtype)


def test_other_shapes_can_be_asked_for(folder):
    model = MoEForImageClassification.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)
    assert model.experts[0].fc.bias.shape == (3,)
    model, info = MoEForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and isinstance(model, MoEForImageClassification)


# --- adapters --------------------------------------------------------------------------------------------------------

BASE = "other/base"


@pytest.fixture(params=[False, True], ids=["without-peft", "with-peft"])
def peft(request, monkeypatch):
    """Whether transformers believes that peft is installed; it looks for adapters only then."""
    places = (pretrained_dualmoe, auto_factory, transformers_peft, transformers.pipelines)
    for place in places:
        monkeypatch.setattr(place, "is_peft_available", lambda: request.param)
    return request.param


def add_adapter(folder, base=BASE):
    """Put what peft saves into the folder: a low-rank change of the last layer of each expert."""
    adapter = {"peft_type": "LORA", "base_model_name_or_path": base, "target_modules": ["fc"], "r": 1}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    save_file({"base_model.model.experts.0.fc.lora_A.weight": torch.ones(1, 32)}, folder / "adapter_model.safetensors")


def in_cache(name, monkeypatch, tmp_path):
    """An empty snapshot of the Hub repository `name`, where offline loading finds it."""
    root = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def loaders(name):
    """What a user may call; the pipeline wraps the error in one of its own."""
    yield lambda: AutoModelForImageClassification.from_pretrained(name)
    yield lambda: MoEForImageClassification.from_pretrained(name)
    yield lambda: MoEForImageClassification.from_pretrained(name, revision="main")
    yield lambda: transformers.pipeline("image-classification", model=str(name))


def test_adapter_beside_the_weights_is_refused(folder, peft):
    add_adapter(folder)
    for call in loaders(folder):
        with pytest.raises(ValueError, match="adapter_config.json. Adapters are not loaded"):
            call()


@pytest.mark.parametrize("complete", [True, False], ids=["with-weights", "adapter-only"])
def test_adapter_in_a_repository_never_brings_in_another_one(complete, folder, peft, monkeypatch, tmp_path):
    base, stranger = (in_cache(name, monkeypatch, tmp_path) for name in (BASE, "some/stranger"))
    shutil.copytree(folder, base, dirs_exist_ok=True)
    if complete:
        shutil.copytree(folder, stranger, dirs_exist_ok=True)
    add_adapter(stranger)
    for call in loaders("some/stranger"):
        if peft:
            with pytest.raises(ValueError, match="some/stranger has an adapter_config.json"):
                call()
        elif complete:  # nobody looks at the adapter
            assert call() is not None
        else:
            with pytest.raises(OSError):
                call()
    assert type(load(BASE)) is MoEForImageClassification


def test_adapter_is_refused_on_a_loaded_model_too(folder):
    model = load(folder)
    add_adapter(folder)
    with pytest.raises(ValueError, match="peft.PeftModel.from_pretrained"):
        model.load_adapter(folder)


# --- configs ---------------------------------------------------------------------------------------------------------

deep = {"model_type": "dual_moe"}
for _ in range(40):
    deep = {"model_type": "dual_moe", "standard": deep}
VIT = {"model_type": "vit", "image_size": 32, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
TIMM = {"model_type": "timm_wrapper", "architecture": "test_vit"}
ABSURD_MOE = [
    ({"num_experts": 10**9}, "num_experts=1000000000 must be at most 1024"),
    ({"num_experts": 10**400}, "num_experts=an integer beyond"),
    ({"width": 10**7}, "width=10000000 must be"),
    ({"width": [10**7] * 4}, r"width\[0\]=10000000 must be"),
    ({"width": [8] * 10**5}, "width has 100000 items"),
    ({"image_size": 10**6}, "image_size=1000000 must be at most 4096"),
    ({"backbone_image_size": 10**6}, "backbone_image_size=1000000 must be at most 4096"),
    ({"num_channels": 10**9}, "num_channels=1000000000 must be at most 1024"),
    ({"router": "pooled", "router_pool_size": 10**6}, "router_pool_size=1000000 must be at most 4096"),
    ({"id2label": None, "label2id": None, "num_labels": 10**9}, "num_labels=1000000000 must be at most 200000"),
    ({"id2label": {"5": "a"}}, "id2label={'5': 'a'} must name the labels 0, 1, 2"),
    ({"id2label": "abc"}, "id2label='abc' must be a dict|for field 'id2label'"),
    ({"backbone": "x" * 10**6}, "backbone='xxx.* must be the name of a timm model"),
    ({"backbone": "hf-hub:stranger/model"}, "backbone='hf-hub:stranger/model' is not a timm model"),
    ({"backbone_kwargs": {"checkpoint_path": "stranger.pth"}}, "backbone_kwargs.'checkpoint_path'.* not allowed"),
    ({"backbone_kwargs": {"pretrained": True}}, "backbone_kwargs.'pretrained'.* not allowed"),
    ({"backbone_kwargs": {"pretrained_cfg": {"url": "x"}}}, "backbone_kwargs.'pretrained_cfg'.* not allowed"),
    ({"backbone": "test_vit", "backbone_kwargs": {"depth": 10**9}}, "backbone_kwargs.'depth'.=1000000000 must be"),
    ({"backbone": "test_vit", "backbone_kwargs": {"depth": 10**5}}, "model of more than"),
    ({"backbone": "test_vit", "backbone_kwargs": {"embed_dim": 96_000}}, "model of more than"),
    ({"num_channels": 3, "image_size": 4096, "num_experts": 1024}, "router='linear' would have more than"),
    ({"backbone_kwargs": {f"k{i}": 1 for i in range(2000)}}, "backbone_kwargs has 2000 items"),
    ({"backbone_kwargs": {"a": deep}}, "nested too deeply"),
    ({"dtype": "load"}, "dtype='load' must be"),
    ({"transformers_weights": "../other.safetensors"}, "transformers_weights.* not allowed"),
    ({"attn_implementation": "stranger/kernel"}, "attn_implementation.* not allowed"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config.* not allowed"),
]
ABSURD_DUAL = [
    ({"standard": deep}, "nested too deeply"),
    ({"standard": {**VIT, "hidden_size": 10**7}}, "model of more than"),
    ({"standard": {**VIT, "hidden_size": 10**8}}, "standard.'hidden_size'.=100000000 must be"),
    ({"standard": {**VIT, "num_labels": 10**6}}, "standard.'num_labels'.=1000000 must be"),
    ({"standard": {"model_type": "timm_wrapper", "label_names": ["a"] * 300_000}}, "more than 200000 label_names"),
    ({"standard": {**VIT, "num_hidden_layers": 10**9}}, "standard.'num_hidden_layers'.=1000000000 must be"),
    ({"standard": {**VIT, "num_hidden_layers": 10**5}}, "model of more than"),
    ({"standard": {**VIT, "hidden_size": "wide"}}, "standard is no usable config of model_type='vit'"),
    ({"standard": {**VIT, "attn_implementation": "stranger/kernel"}}, "'attn_implementation'.* not allowed"),
    ({"standard": {"model_type": "no_such_model"}}, "standard is no usable config of model_type='no_such_model'"),
    ({"standard": {"model_type": ["vit"]}}, "model_type.* must be text"),
    ({"standard": {**TIMM, "architecture": "hf-hub:stranger/model"}}, "would load another model"),
    ({"standard": {**TIMM, "model_args": {"checkpoint_path": "x.pth"}}}, "'checkpoint_path'.* not allowed"),
    ({"standard": {"num_experts": 10**9}}, "standard.'num_experts'.=1000000000 must be"),
    ({"standard": {"num_experts": 2000}}, "num_experts=2000 must be at most 1024"),
    ({"robust": 5}, "robust=5 must be a config"),
]


# the latter from transformers before 5.23, which checks some types itself
REFUSED = (ValueError, StrictDataclassError)


def case_id(value):
    return None if isinstance(value, str) else str(value)[:60] if isinstance(value, dict) else value.__name__


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [(MoEConfig, *case) for case in ABSURD_MOE] + [(DualMoEConfig, *case) for case in ABSURD_DUAL],
    ids=case_id,
)
def test_absurd_config_is_refused_before_it_takes_memory(config_class, fields, message, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(backbones_dualmoe, "MAX_TENSORS", 1_000)  # reached sooner
    config = json.loads(config_class(num_labels=2).to_json_string(use_diff=False))
    config = {key: value for key, value in config.items() if value is not None or key in fields}
    (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, a high-water mark
    with pytest.raises(REFUSED, match=message):
        load(tmp_path)
    with pytest.raises(REFUSED):
        model_class = {MoEConfig: MoEForImageClassification, DualMoEConfig: DualMoEForImageClassification}
        model_class[config_class](config_class.from_pretrained(tmp_path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000


def test_weights_far_too_small_for_the_config_are_refused_before_it_takes_memory(folder):
    change_config(folder, width=[4096, 4096, 4096, 4096])
    with pytest.raises(ValueError, match=r"asks for [\d,]+ numbers, but the weight files have [\d,]+ bytes only"):
        load(folder)


def test_unknown_keys_are_left_out_with_a_warning(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_dualmoe"), "propagate", True)
    change_config(folder, to_dict="boom", num_expert=9, attribute_map={"num_experts": "image_size"})
    with caplog.at_level(logging.WARNING):
        config = MoEConfig.from_pretrained(folder)
    assert config.num_experts == 2 and config.to_dict()["num_experts"] == 2
    assert not hasattr(config, "num_expert") and config.attribute_map == {}
    said = caplog.text.replace("'num_expert', 'to_dict'", "'to_dict', 'num_expert'")
    assert "MoEConfig has no field 'to_dict', 'num_expert', 'attribute_map'; ignored" in said


def test_checking_the_size_draws_no_random_numbers():
    for fields in ({}, {"backbone": "test_vit"}, {"backbone": "lipschitz_mlp"}):
        config = MoEConfig(num_experts=1, **fields)
        state = torch.get_rng_state()
        check_model_size(config)
        assert torch.equal(state, torch.get_rng_state())
