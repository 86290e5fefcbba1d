"""`from_official`: checkpoints in the layout of the paper's released code give the logits of that code."""

import functools
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import save_and_load, shake
from torch import nn

from hf_dualmoe import DualMoEForImageClassification, MoEForImageClassification
from hf_dualmoe.models.converting import CIFAR_MEAN, CIFAR_STD, from_official

SLOW = pytest.mark.slow  # full-width networks

# The layout is that of the released code; these few lines of ours say what it computes.


class Block(nn.Module):
    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        same = stride == 1 and channels == width
        layers = [] if same else [nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)]
        self.shortcut = nn.Sequential(*layers)

    def forward(self, x):
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class ResNet18(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        channels = 64
        for i, width in enumerate((64, 128, 256, 512), start=1):
            setattr(self, f"layer{i}", nn.Sequential(Block(channels, width, 1 + (i > 1)), Block(width, width, 1)))
            channels = width
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        return self.linear(F.avg_pool2d(x, 4).flatten(1))


class Expert(nn.Module):
    def __init__(self, name, network):
        super().__init__()
        self.name = name
        setattr(self, name, network)

    def forward(self, x):
        return getattr(self, self.name)(x)


class Mixture(nn.Module):
    """Top-1 of two experts, on normalised images."""

    def __init__(self, name, networks, size):
        super().__init__()
        self.experts = nn.ModuleList(Expert(name, network) for network in networks)
        self.router = nn.ModuleDict({"gate": nn.Linear(3 * size * size, len(networks))})

    def forward(self, x):
        route = self.router["gate"](x.flatten(1)).argmax(dim=1)
        return torch.stack([self.experts[i](image[None])[0] for i, image in zip(route.tolist(), x, strict=True)])


def reference(kind):
    torch.manual_seed(5)
    if kind == "vit":
        model = Mixture(
            "vit", [timm.create_model("vit_small_patch16_224", img_size=32, num_classes=5) for _ in "ab"], 32
        )
    else:
        model = Mixture("net", [ResNet18(5) for _ in "ab"], 32)
    shake(model, seed=int(kind == "Rmoe"))
    return model.eval()


@pytest.fixture(scope="module")
def references():
    return functools.cache(reference)


@pytest.fixture(scope="module")
def photos():
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(6))


def normal(photos):
    return (photos - torch.tensor(CIFAR_MEAN)[:, None, None]) / torch.tensor(CIFAR_STD)[:, None, None]


def checkpoint(state, path, **more):
    torch.save({"net": state, "optimizer": {"state": {}}, "acc": 41.5, "epoch": 129, **more}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "parallel"),
    [("Smoe", True), pytest.param("Smoe", False, marks=SLOW), pytest.param("vit", False, marks=SLOW)],
)
@torch.no_grad()
def test_mixture_gives_the_logits_of_the_released_code(kind, parallel, references, photos, tmp_path):
    state = {f"{'module.' * parallel}{name}": tensor for name, tensor in references(kind).state_dict().items()}
    model = from_official(checkpoint(state, tmp_path / "mixture.t7"), class_names=list("abcde"))
    expected = references(kind)(normal(photos))
    output = model(photos)
    assert type(model) is MoEForImageClassification and not model.training
    assert output.expert_index.unique().numel() == 2  # else no choice is tested
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
    assert model.config.id2label == dict(enumerate("abcde")) and model.config.image_size == 32
    if kind == "Smoe" and parallel:
        loaded = save_and_load(model, tmp_path / "converted")
        assert torch.equal(loaded(photos).logits, output.logits)
        assert not list((tmp_path / "converted").glob("*.bin"))


@SLOW
@torch.no_grad()
def test_dual_model_mixes_the_logits_of_the_released_code(references, photos, tmp_path):
    parts = {name: references(name) for name in ("Smoe", "Rmoe")}
    state = {f"{part}.{name}": t for part, model in parts.items() for name, t in model.state_dict().items()}
    dual = from_official(checkpoint(state, tmp_path / "dual.t7"), alpha=0.6)
    standard, robust = (parts[name](normal(photos)) for name in ("Smoe", "Rmoe"))
    assert type(dual) is DualMoEForImageClassification and dual.config.alpha == 0.6
    torch.testing.assert_close(dual(photos).logits, 0.4 * standard + 0.6 * robust, rtol=1e-4, atol=1e-4)


@SLOW
def test_normalisation_can_be_another(references, photos, tmp_path):
    path = checkpoint(references("Smoe").state_dict(), tmp_path / "a.t7")
    model = from_official(path, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    with torch.no_grad():
        expected = references("Smoe")((photos - 0.5) / 0.25)
        torch.testing.assert_close(model(photos).logits, expected, rtol=1e-4, atol=1e-4)


class Evil:
    def __reduce__(self):
        return print, ("code of a stranger",)


def test_what_is_no_such_checkpoint_is_refused(references, tmp_path, capsys):
    path, state = tmp_path / "a.t7", references("Smoe").state_dict()
    with pytest.raises(ValueError, match="cannot be read as tensors and plain data alone"):
        from_official(checkpoint(state, path, more=Evil()))
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="cannot be read as tensors and plain data alone"):
        from_official(path)
    assert "stranger" not in capsys.readouterr().out
    for content, message in (
        ({"net": {}}, "holds no state dict"),
        ([state], "holds no state dict"),
        ({"net": {"conv1.weight": torch.zeros(1)}}, "not a mixture of that code"),
        ({"net": {**state, "more": torch.zeros(1)}}, "does not fit 2 experts 'resnet18'.*such as more"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            from_official(path)
    with pytest.raises(FileNotFoundError):
        from_official(tmp_path / "nowhere.t7")
