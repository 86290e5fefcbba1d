"""What the benchmarks share, and that every script starts from any folder."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.benchmarks.shared import render, run, store

SCRIPTS = [path for path in sorted(store.BENCHMARKS.rglob("*.py")) if '__name__ == "__main__"' in path.read_text()]
WITHOUT_HELP = {"run.py": "usage: run.py"}  # takes what study.py hands it


@pytest.mark.slow  # each imports torch and transformers
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(store.BENCHMARKS).as_posix())
def test_a_script_starts_from_any_folder(path, tmp_path):
    done = subprocess.run([sys.executable, path, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert WITHOUT_HELP.get(path.name, "usage: ") in done.stdout + done.stderr
    assert done.returncode == (1 if path.name in WITHOUT_HELP else 0), done.stderr


def test_scripts_put_the_checkout_on_the_path_all_in_one_way():
    assert len(SCRIPTS) > 10
    for path in SCRIPTS:
        up = len(path.relative_to(store.CHECKOUT).parts) - 1
        assert path.read_text().count(f"sys.path.insert(0, str(Path(__file__).parents[{up}]))") == 1, path
        assert path.parents[up] == store.CHECKOUT


def test_a_section_takes_the_place_of_the_old_one(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{render.section('a', 'old')}\nbetween\n{render.section('b', 'kept')}\nafter\n")
    render.replace_section("a", "new", readme)
    assert readme.read_text() == (
        f"before\n{render.section('a', 'new')}\nbetween\n{render.section('b', 'kept')}\nafter\n"
    )
    with pytest.raises(ValueError, match="no section 'c'"):
        render.replace_section("c", "new", readme)


def test_tables_by_hand():
    assert render.markdown_table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
    assert render.mean_and_range([1.0, 2.0], ".2f") == "1.50 (1.00 to 2.00)"
    assert render.mean_and_range([2.0, 2.0]) == "2.0"


def test_runs_are_merged_by_their_settings(tmp_path):
    path, settings = tmp_path / "new" / "results.json", {"version": "fast"}

    def row(attack, value):
        return {"attack": attack, "value": value}

    first = {"settings": settings, "rows": [row("square", 1), row("union", 2)]}
    other = {"settings": {"version": "standard"}, "rows": []}
    for found in (first, other, {"settings": settings, "rows": [row("square", 3)]}):
        store.store_run(found, path)
    runs = json.loads(path.read_text())["runs"]
    assert [run["settings"] for run in runs] == [other["settings"], settings]
    assert runs[1]["rows"] == [row("union", 2), row("square", 3)]


def test_what_is_not_positive_is_refused_by_name(capsys):
    parser = argparse.ArgumentParser()
    run.require_positive(parser, argparse.Namespace(jobs=1, threads=None), "jobs", "threads")
    with pytest.raises(SystemExit):
        run.require_positive(parser, argparse.Namespace(jobs=0), "jobs")
    assert "jobs=0 must be > 0" in capsys.readouterr().err


def test_the_clock_stops_what_survives_exceptions():
    clock, rounds = run.Clock(0.05), 0
    with pytest.raises(run.OutOfTime), clock.limit():
        while True:
            try:
                rounds += 1
                time.sleep(1)
            except Exception:
                pass
    assert clock.left() < 0 and rounds == 1
    with pytest.raises(run.OutOfTime), clock.limit():
        pytest.fail("no time was left")


@pytest.mark.parametrize("path", sorted(store.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_kept_results_name_no_place_on_a_machine(path: Path):
    assert not [text for text in ("/work", "/tmp", "/home", "/root") if text in path.read_text()]
