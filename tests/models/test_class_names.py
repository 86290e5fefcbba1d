"""Classes matched by name: however they are spelled, and only where there is one answer."""

import pytest
from timm.data import ImageNetInfo

from hf_dualmoe.models.class_names import are_generic, match_names, spellings

IMAGENET = ImageNetInfo("imagenet-1k")


@pytest.mark.parametrize(
    ("names", "known", "found"),
    [
        (["cat", "dog"], ["cat", "dog"], [0, 1]),
        (["cat", "dog"], ["dog", "fox", "cat"], [2, 0]),
        (["Golden_Retriever", "tabby"], ["golden retriever", "tabby, tabby cat"], [0, 1]),
        (["tabby cat"], ["tiger cat", "tabby, tabby cat"], [1]),
        (["n02099601"], ["Labrador retriever", "golden retriever"], [1]),
        (["n02099601"], ["n02099712", "n02099601"], [1]),
        (["cat"], ["dog", "Cat ", "CAT"], [None]),  # two answers are none
        (["cat", "CAT"], ["cat", "dog", "fox"], [None, None]),  # two classes are not one
        (["cat"], ["catfish"], [None]),
        (["crane", "crane"], ["crane", "crane"], [0, 1]),
        (["crane"], ["crane", "crane"], [None]),
        (["missile"], ["projectile, missile", "missile"], [1]),  # the closest
        ([], ["cat"], []),
        (["cat"], [], [None]),
    ],
    ids=str,
)
def test_names_are_matched(names, known, found):
    assert match_names(names, known) == found


def test_the_wordnet_ids_of_imagenet_are_its_classes_in_any_order():
    ids, words = IMAGENET.label_names(), IMAGENET.label_descriptions()
    assert match_names(ids, words) == list(range(1000))
    backwards = match_names(ids[::-1], words)
    wrong = [ids[999 - i] for i, at in enumerate(backwards) if at != 999 - i]
    assert sorted(wrong) == ["n02012849", "n03126707"]  # the bird and the machine are both called crane


def test_words_without_letters_are_no_spelling():
    assert spellings("Tiger-Cat,  big_cat,,") == {"tiger cat", "big cat"}
    assert are_generic(["LABEL_0", "LABEL_1"]) and not are_generic(["LABEL_1", "LABEL_0"])
