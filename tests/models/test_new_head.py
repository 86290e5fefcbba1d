"""A new head for other classes: drawn anew, everything below kept, saved and loaded like any other model."""

import json

import foreign_models
import pytest
import torch
from conftest import NUM_LABELS

from hf_dualmoe.models.loading import NormalizedClassifier, load_classifier
from hf_dualmoe.models.new_head import head_of, rename_classes, with_new_head

NAMES = ["ant", "bee", "cow"]
SAME_NUMBER = list("vwxyz")


@pytest.mark.parametrize(
    ("kind", "names"), [("vit", NAMES), ("resnet", SAME_NUMBER), ("convnext", NAMES), ("timm_wrapper", SAME_NUMBER)]
)
def test_only_the_head_is_new(kind, names, tmp_path):
    foreign_models.save(kind, tmp_path / "old", labels=list("abcde"))
    old = load_classifier(tmp_path / "old")
    new = with_new_head(old, names)
    assert isinstance(new, NormalizedClassifier) and not new.training
    head, before, after = head_of(old.network), old.network.state_dict(), new.network.state_dict()
    assert 1 <= len(head) <= 2 and before.keys() == after.keys()
    for name, tensor in after.items():
        kept = torch.equal(tensor, before[name]) if tensor.shape == before[name].shape else False
        assert kept == (name not in head), name
    new.save_pretrained(tmp_path / "new")
    again = load_classifier(tmp_path / "new")
    assert list(again.config.id2label.values()) == names and again.config.label2id[names[1]] == 1
    images = torch.rand(3, 3, 32, 32)
    assert new(images).logits.shape == (3, len(names))
    torch.testing.assert_close(again(images).logits, new(images).logits, rtol=1e-4, atol=1e-3)  # logits above 100
    assert list(old.config.id2label.values()) == list("abcde")


@pytest.mark.parametrize("kind", ["moe", "dual"])
def test_ours_get_a_new_head_for_every_expert(kind, make_moe, make_dual, images):
    model = {"moe": make_moe, "dual": make_dual}[kind]()
    new = with_new_head(model, NAMES)
    assert type(new) is type(model) and new(images).logits.shape == (len(images), 3)
    head, before, after = head_of(model), model.state_dict(), new.state_dict()
    assert len(head) < len(before) == len(after)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name not in head)
    assert new.config.id2label == dict(enumerate(NAMES)) and model.config.num_labels == NUM_LABELS


@pytest.mark.parametrize("kind", ["resnet", "timm_wrapper"])
def test_renamed_classes_are_saved(kind, tmp_path):
    foreign_models.save(kind, tmp_path / "old")
    model = load_classifier(tmp_path / "old")
    rename_classes(model, SAME_NUMBER)
    assert list(model.config.id2label.values()) == SAME_NUMBER
    model.save_pretrained(tmp_path / "new")
    again = load_classifier(tmp_path / "new")
    assert list(again.config.id2label.values()) == SAME_NUMBER
    assert "a" not in json.loads((tmp_path / "new" / "config.json").read_text()).get("label_names", [])
