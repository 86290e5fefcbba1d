"""Which class of a model is which class of a dataset, by name.

The same class is "golden retriever" in one place, "Golden_Retriever", "golden retriever, goldie" or the WordNet id
"n02099601" in another. Two names stand for one class where they share a spelling: case, hyphens and underscores aside,
each part of a comma list alone, and for a WordNet id the words that ImageNet gives it.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from timm.data import ImageNetInfo

SYNSET = re.compile(r"n\d{8}")
WORDNET = ("imagenet-22k", "imagenet-1k")  # timm's tables of ids: together they have all


def labels_of(config: Any) -> list[str]:
    """The class names of a model in label order; [] where its config has none."""
    id2label = getattr(config, "id2label", None) or {}
    return [str(id2label[i]) for i in sorted(id2label)]


def are_generic(names: Sequence[str]) -> bool:
    """Whether names are those that transformers fills in, LABEL_0 and so on: they say nothing."""
    return list(names) == [f"LABEL_{i}" for i in range(len(names))]


def match_names(names: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """For each of `names` the position in `known` of the same class; None where there is none, or more than one.

    Names in the same order stand for each other even where one of them stands twice, as "crane" does in ImageNet.
    """
    ours, theirs = [spellings(name) for name in names], [spellings(name) for name in known]
    # "crane" twice, and in order
    if len(ours) == len(theirs) and all(a & b for a, b in zip(ours, theirs, strict=True)):
        return list(range(len(names)))
    exact, by_spelling = positions([{name} for name in known]), positions(theirs)
    found = []
    for name, ways in zip(names, ours, strict=True):
        same = exact.get(name) or closest(ways, theirs, by_spelling)
        found.append(next(iter(same)) if len(same) == 1 else None)
    return [at if found.count(at) == 1 else None for at in found]


def spellings(name: str) -> set[str]:
    """All that a class of this name may be called, in lower case with single spaces."""
    words = wordnet_words().get(name, "") if SYNSET.fullmatch(name) else ""
    parts = re.sub(r"[\s_-]+", " ", f"{name},{words}".casefold()).split(",")
    return {part.strip() for part in parts} - {""}


def positions(spelled: Sequence[set[str]]) -> Mapping[str, set[int]]:
    """Spelling -> positions of the names that have it."""
    found: dict[str, set[int]] = {}
    for i, ways in enumerate(spelled):
        for way in ways:
            found.setdefault(way, set()).add(i)
    return found


def closest(ways: set[str], theirs: Sequence[set[str]], by_spelling: Mapping[str, set[int]]) -> set[int]:
    """The positions whose spellings have most in common with `ways`; empty where none has any."""
    shares = {
        at: len(ways & theirs[at]) / len(ways | theirs[at]) for way in ways for at in by_spelling.get(way, set())
    }
    return {at for at, share in shares.items() if share == max(shares.values())}


@cache
def wordnet_words() -> dict[str, str]:
    """WordNet id -> its words, joined by commas."""
    tables = [ImageNetInfo(subset).label_descriptions(as_dict=True) for subset in WORDNET]
    return {name: words for table in tables for name, words in table.items()}


__all__ = ["are_generic", "labels_of", "match_names"]
