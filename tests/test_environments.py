"""The script that runs the suite on the oldest and newest versions: its parts, without building an environment."""

import json
import sys
import textwrap

import environments
import pytest

PROJECT = {
    "name": "thing",
    "requires-python": ">=3.10",
    "dependencies": ["torch>=2.11", "transformers>=5.17,<6", "scipy", "timm >= 1.0.22"],
    "optional-dependencies": {
        "plots": ["matplotlib>=3"],
        "test": ["thing[plots,more]", "pytest>=8"],
        "more": ["thing[plots]", "gradio>=6"],
        "docs": ["sphinx>=7"],
    },
}


def test_floors_are_those_of_the_dependencies_and_the_test_extra():
    pins = {"torch": "2.11", "transformers": "5.17", "timm": "1.0.22", "matplotlib": "3", "pytest": "8", "gradio": "6"}
    assert environments.floors(PROJECT) == pins
    assert set(environments.constraints("oldest", PROJECT).split()) == {f"{n}=={v}" for n, v in pins.items()}
    assert environments.constraints("newest", PROJECT) == ""
    with pytest.raises(ValueError, match="torch has two floors: 2.11 and 2.12"):
        environments.floors({**PROJECT, "dependencies": ["torch>=2.11", "torch>=2.12"]})


def test_floors_of_this_project():
    project = environments.read_project()
    floors = environments.floors(project)
    for name in ("torch", "transformers", "huggingface_hub", "timm"):  # each is the text of the file
        assert any(text.startswith(f"{name}>={floors[name]}") for text in project["dependencies"])
    assert environments.oldest_python(project) == project["requires-python"].removeprefix(">=")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], [("oldest", "3.10"), ("newest", "3.13")]),
        (["--only", "newest"], [("newest", "3.13")]),
        (["--only", "oldest", "--python", "3.10", "3.12"], [("oldest", "3.10"), ("oldest", "3.12")]),
        (["--python", "3.12", "--", "-k", "config"], [("oldest", "3.12"), ("newest", "3.12")]),
    ],
)
def test_plan(argv, expected):
    args = environments.parse_args(argv)
    assert environments.plan(args, PROJECT) == expected
    assert args.pytest_args == (argv[argv.index("--") + 1 :] if "--" in argv else [])


def test_interpreters_are_asked_for_their_version(tmp_path):
    version = ".".join(map(str, sys.version_info[:2]))
    assert environments.find_interpreter(sys.executable) == sys.executable
    assert environments.find_interpreter(version) is not None
    assert environments.find_interpreter("3.1") is None
    impostor = tmp_path / "python"
    impostor.write_text("#!/bin/sh\nexit 127\n")
    impostor.chmod(0o755)
    assert environments.find_interpreter(str(impostor)) is None


def test_outcomes_are_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "test_sample.py").write_text(
        textwrap.dedent("""
            import pytest
            @pytest.fixture
            def broken(): raise OSError
            @pytest.mark.parametrize("i", range(3))
            def test_good(i): pass
            def test_bad(): assert False
            def test_error(broken): pass
            def test_skipped(): pytest.skip("no")
            @pytest.mark.xfail
            def test_expected(): assert False
        """)
    )
    junit = tmp_path / "tests.xml"
    options = ["-p", "no:cacheprovider", "-q", "--rootdir", str(tmp_path), "-c", "/dev/null", f"--junitxml={junit}"]
    environments.subprocess.run([sys.executable, "-m", "pytest", *options, str(tmp_path)], capture_output=True)
    assert environments.count_outcomes(junit) == {
        **{"passed": 3, "failed": 1, "errors": 1, "skipped": 2},
        "not_passed": ["test_sample::test_bad", "test_sample::test_error"],
    }


def test_results_of_other_environments_stay_in_the_file(tmp_path):
    output = tmp_path / "results" / "environments.json"
    for name, status in (("a", "failed"), ("b", "passed"), ("a", "passed")):
        environments.write_result(output, name, {"status": status})
    assert json.loads(output.read_text()) == {"environments": {"a": {"status": "passed"}, "b": {"status": "passed"}}}


def test_missing_interpreter_is_reported_and_nothing_is_built(tmp_path, capsys):
    output, workdir = tmp_path / "out.json", tmp_path / "work"
    arguments = ["--only", "oldest", "--python", "2.99", "--workdir", str(workdir), "--output", str(output)]
    assert environments.main(arguments) == 0
    assert "No Python 2.99 was found" in capsys.readouterr().out
    assert json.loads(output.read_text())["environments"]["oldest, Python 2.99"]["status"] == "no interpreter"
    assert not workdir.exists()


@pytest.fixture
def built(tmp_path):
    """A project without dependencies, and an environment of it whose Python is a stand-in that only takes notes."""
    project = {"name": "thing", "dependencies": [], "optional-dependencies": {"test": []}}
    interpreter, notes = tmp_path / "python", tmp_path / "notes"
    interpreter.write_text(
        f'#!/bin/sh\necho "$@" >> {notes}\n'
        '[ "$2" = venv ] || exit ${STATUS:-0}\nmkdir -p "$3/bin"\ncp "$0" "$3/bin/python"\n'
    )
    interpreter.chmod(0o755)
    return lambda pins: environments.build(tmp_path / "env", str(interpreter), pins, project), notes


def test_environment_is_built_once_for_the_same_versions_and_again_after_a_failure(built, monkeypatch):
    build, notes = built
    monkeypatch.setenv("STATUS", "3")
    assert "-m pip install ended with status 3" in build("torch==2.11\n")
    monkeypatch.setenv("STATUS", "0")
    notes.unlink()
    assert build("torch==2.11\n") is None and build("torch==2.11\n") is None
    calls = notes.read_text().splitlines()
    assert len(calls) == 2 and calls[0].startswith("-m venv") and calls[1].startswith("-m pip install --upgrade")
    assert build("torch==2.12\n") is None
    assert len(notes.read_text().splitlines()) == 4
