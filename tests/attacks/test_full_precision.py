"""Evaluations and certificates compute in float32 proper; what the caller has set for speed comes back."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from hf_dualmoe.attacks.adaptive_union import worst_case
from hf_dualmoe.attacks.auto_attack import autoattack
from hf_dualmoe.attacks.precision import full_precision
from hf_dualmoe.data.datasets import ImageTensorDataset
from hf_dualmoe.evaluation.batches import correct_mask
from hf_dualmoe.evaluation.evaluation import evaluate_robustness
from hf_dualmoe.evaluation.sanity import run_sanity_checks

PARTS = (
    *(torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn),
    *(torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn),
)
SET = {  # how a caller may have asked for speed
    "medium": "torch.set_float32_matmul_precision('medium')",
    "old": "torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cudnn.allow_tf32 = False",
    "new": "torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = 'tf32'",
    "whole": "torch.backends.fp32_precision = 'tf32'",
}
LOOK = """
import torch
from test_full_precision import PARTS
from hf_dualmoe.attacks.precision import full_precision

def state():
    def old(read):
        try:
            return read()
        except RuntimeError:
            return "mixed"
    reads = torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.allow_tf32
    return [part.fp32_precision for part in PARTS], [old(read) for read in reads]

SETTING
before = state()
try:
    with full_precision():
        inside = state()
        raise KeyError
except KeyError:
    pass
assert inside == (["ieee"] * 6, ["highest", False]), inside
assert state() == before, (state(), before)
"""


@pytest.mark.slow  # a process for each, since the settings are global and some cannot be taken back
@pytest.mark.parametrize("setting", SET)
def test_settings_of_every_kind_are_off_inside_and_come_back(setting, request):
    folder = request.path.parent
    code = LOOK.replace("SETTING", SET[setting])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, timeout=120)


def test_tf32_is_off_inside_and_comes_back():
    before = [part.fp32_precision for part in PARTS]
    assert torch.backends.cudnn.conv.fp32_precision != "ieee"  # torch's own default
    with full_precision():
        assert [part.fp32_precision for part in PARTS] == ["ieee"] * 6
        assert not torch.backends.cudnn.allow_tf32  # the old interface agrees
    assert [part.fp32_precision for part in PARTS] == before


def test_autocast_is_off_inside():
    with torch.autocast("cpu", torch.bfloat16):
        with full_precision():
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")


class Watched(nn.Module):
    """A classifier that notes the precision in which it is asked."""

    def __init__(self):
        super().__init__()
        self.linear, self.seen = nn.Linear(3 * 5 * 5, 4), set()

    def forward(self, images):
        self.seen.add((torch.backends.cudnn.conv.fp32_precision, torch.is_autocast_enabled("cpu")))
        return self.linear(images.flatten(1))


EVALUATIONS = {
    "worst_case": lambda model, data: worst_case(model, data.images / 255, data.labels, eps=0.1, steps=2),
    "autoattack": lambda model, data: autoattack(
        model, data.images / 255, data.labels, eps=0.1, version="fast", progress=False
    ),
    "evaluate": lambda model, data: evaluate_robustness(
        model, data, eps=0.1, steps=1, progress=False, check_names=False, level=["worst_case"]
    ),
    "sanity": lambda model, data: run_sanity_checks(model, data, eps=0.1, steps=1, square_queries=2, progress=False),
    "correct_mask": correct_mask,
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations_ask_the_model_in_full_precision(name):
    model = Watched().eval()
    images = torch.randint(0, 256, (6, 3, 5, 5), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        EVALUATIONS[name](model, ImageTensorDataset(images, torch.arange(6) % 4, list("abcd")))
    assert model.seen == {("ieee", False)}
