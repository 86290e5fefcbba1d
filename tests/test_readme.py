"""The README's numbers are those of the results.json it points to, and its links lead somewhere."""

import re
from pathlib import Path

from hf_dualmoe.evaluation import RobustnessReport

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_table_is_rendered_from_results():
    report = RobustnessReport.load(ROOT / "model_cards" / "digits_dual" / "results.json")
    assert report.table() in README


def test_local_links_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_public_names_in_the_table_exist():
    for modules, names in re.findall(r"^\| (`hf_dualmoe[^|]*) \| ([^|]*) \|$", README, flags=re.M):
        modules = [m if m.startswith("hf_dualmoe") else f"hf_dualmoe{m}" for m in re.findall(r"`([\w.]+)`", modules)]
        loaded = [__import__(module, fromlist=["*"]) for module in modules]
        for name in re.findall(r"`(\w+)`", names):
            assert any(hasattr(module, name) for module in loaded), name
