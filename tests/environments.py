"""Run the test suite on the oldest and on the newest supported versions, each in an environment of its own.

python tests/environments.py                                      # oldest on Python 3.10, newest on 3.13
python tests/environments.py --only newest --python 3.10 3.13     # the newest, on both
python tests/environments.py --keep -- -k config                  # part of the suite; the environments stay

The oldest versions are the floors of pyproject.toml; what has no floor there gets what pip chooses to fit. An
environment takes about 6 GB and some minutes. One that is built already is used again, so a run that was cut off goes
on. Interpreters are looked for on the PATH, with uv and with pyenv; one that is not there is reported and left out.
`--output` holds for each environment the installed versions, the counts of the suite and the seconds, and is written
after each. Ends with status 1 where a suite failed or an environment could not be built.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings this along
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "training" / "benchmarks" / "results" / "environments.json"
KINDS = ("oldest", "newest")
NEWEST_PYTHON = "3.13"
EXTRA = "test"
VERSIONS = """
import importlib.metadata as m, json, platform, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = m.version(name)
    except m.PackageNotFoundError:
        found[name] = None
print(json.dumps({"python": platform.python_version(), "packages": found}))
"""


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


# --- what to install -------------------------------------------------------------------------------------------------


def read_project(path: Path = ROOT / "pyproject.toml") -> dict[str, Any]:
    """The [project] table of a pyproject.toml."""
    return tomllib.loads(path.read_text(encoding="utf-8"))["project"]


def requirements(project: dict[str, Any], extra: str = EXTRA) -> list[Requirement]:
    """The dependencies with those of an extra, and of the project's own extras that it names."""
    found = [Requirement(text) for text in project["dependencies"]]
    todo = [extra]
    for name in todo:  # which grows
        for requirement in map(Requirement, project["optional-dependencies"][name]):
            if requirement.name == project["name"]:
                todo += sorted(requirement.extras - {*todo})
            else:
                found.append(requirement)
    return found


def floors(project: dict[str, Any], extra: str = EXTRA) -> dict[str, str]:
    """The oldest supported version of each dependency that states one; a ValueError where one has two floors."""
    found: dict[str, str] = {}
    for requirement in requirements(project, extra):
        for part in requirement.specifier:
            if part.operator == ">=" and found.setdefault(requirement.name, part.version) != part.version:
                raise ValueError(f"{requirement.name} has two floors: {found[requirement.name]} and {part.version}.")
    return found


def oldest_python(project: dict[str, Any]) -> str:
    """The floor of requires-python, such as "3.10"."""
    match = re.search(r">=\s*(\d+\.\d+)", project["requires-python"])
    if match is None:
        raise ValueError(f"requires-python={project['requires-python']!r} states no floor (>=).")
    return match[1]


def constraints(kind: str, project: dict[str, Any]) -> str:
    """The text of pip's constraints file for the "oldest" or the "newest" versions."""
    pins = floors(project) if kind == "oldest" else {}
    return "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))


# --- interpreters ----------------------------------------------------------------------------------------------------


def candidates(wanted: str) -> Iterator[str]:
    """Paths at which an interpreter such as "3.13", or "/path/to/python", may be."""
    if os.sep in wanted:
        yield wanted
        return
    on_path = shutil.which(f"python{wanted}")
    if on_path:
        yield on_path
    if shutil.which("uv"):
        found = subprocess.run(["uv", "python", "find", wanted], capture_output=True, text=True)
        yield from found.stdout.split("\n")[:1] if found.returncode == 0 else []
    folder = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for pattern in (wanted, f"{wanted}.*"):
        yield from (str(path) for path in sorted(folder.glob(f"{pattern}/bin/python")))
    yield sys.executable


def find_interpreter(wanted: str) -> str | None:
    """An interpreter of this version that can make environments, or None."""
    code = "import ensurepip, sys, venv; print('.'.join(map(str, sys.version_info[:3])))"
    for path in candidates(wanted):
        try:
            answer = subprocess.run([path, "-c", code], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            continue
        version = answer.stdout.strip()
        if answer.returncode == 0 and (os.sep in wanted or f"{version}.".startswith(f"{wanted}.")):
            return path
    return None


# --- building and running --------------------------------------------------------------------------------------------


def clean_environment() -> dict[str, str]:
    """The environment variables, without those that would let in packages from elsewhere."""
    outside = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in outside}


def build(folder: Path, interpreter: str, pins: str, project: dict[str, Any]) -> str | None:
    """Make the environment, unless it is complete already; returns the end of what pip said where it failed."""
    contents = json.dumps([interpreter, pins, project["dependencies"], project["optional-dependencies"]])
    digest = hashlib.sha256(contents.encode()).hexdigest()
    built = folder / "built.txt"
    if built.is_file() and built.read_text() == digest:
        say(f"{folder.name}: is built already")
        return None
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    file = folder / "constraints.txt"
    file.write_text(pins)
    python = str(folder / "venv" / "bin" / "python")
    log = folder / "build.log"
    pip_install = [python, "-m", "pip", "install", "--upgrade", "--constraint", str(file)]
    install = [*pip_install, "--editable", f"{ROOT}[{EXTRA}]"]
    for command in ([interpreter, "-m", "venv", str(folder / "venv")], install):
        with log.open("a") as output:
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=clean_environment())
        if done.returncode:
            return f"{' '.join(command[:4])} ended with status {done.returncode}. " + log.read_text()[-1500:]
    built.write_text(digest)
    return None


def count_outcomes(junit: Path) -> dict[str, Any]:
    """Numbers of tests of a --junitxml by outcome, and the names of those that failed or had errors, `not_passed`."""
    counts: dict[str, Any] = {"passed": 0, "failed": 0, "errors": 0, "skipped": 0, "not_passed": []}
    for case in ET.parse(junit).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        outcomes = {"failure": "failed", "error": "errors", "skipped": "skipped"}
        outcome = next((outcomes[tag] for tag in outcomes if tag in kinds), "passed")
        counts[outcome] += 1
        if outcome in ("failed", "errors"):
            counts["not_passed"].append(f"{case.get('classname')}::{case.get('name')}")
    return counts


def run_suite(folder: Path, pytest_args: list[str], project: dict[str, Any]) -> dict[str, Any]:
    """Run pytest in the environment; its output goes to the terminal and to `folder`/tests.xml."""
    python, junit = str(folder / "venv" / "bin" / "python"), folder / "tests.xml"
    junit.unlink(missing_ok=True)
    names = sorted({requirement.name for requirement in requirements(project)})
    environ = clean_environment()
    asked = subprocess.run([python, "-c", VERSIONS, *names], capture_output=True, text=True, check=True, env=environ)
    options = ["-p", "no:cacheprovider", "--basetemp", str(folder / "tmp"), f"--junitxml={junit}"]
    start = time.monotonic()
    done = subprocess.run([python, "-m", "pytest", *options, *pytest_args], cwd=ROOT, env=environ)
    result = {**json.loads(asked.stdout), "pytest_args": pytest_args, "exit_status": done.returncode}
    result["test_seconds"] = round(time.monotonic() - start, 1)
    if not junit.is_file():
        return {**result, "status": "pytest did not finish"}
    counts = count_outcomes(junit)
    passed = done.returncode == 0 and counts["passed"] > 0
    return {**result, **counts, "status": "passed" if passed else "failed"}


def write_result(output: Path, name: str, result: dict[str, Any]) -> None:
    """Put the result of one environment into the file, beside those of others."""
    results = json.loads(output.read_text()) if output.is_file() else {"environments": {}}
    results["environments"][name] = result
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    partial.write_text(json.dumps(results, indent=2) + "\n")
    partial.replace(output)


def run_environment(kind: str, version: str, args: argparse.Namespace, project: dict[str, Any]) -> dict[str, Any]:
    """Find the interpreter, build the environment, run the suite."""
    interpreter = find_interpreter(version)
    if interpreter is None:
        return {"status": "no interpreter", "error": f"No Python {version} was found."}
    folder = args.workdir.resolve() / f"{kind}-py{version.strip(os.sep).replace(os.sep, '-')}"
    say(f"{folder.name}: building with {interpreter}; see {folder / 'build.log'}")
    start = time.monotonic()
    error = build(folder, interpreter, constraints(kind, project), project)
    seconds = {"build_seconds": round(time.monotonic() - start, 1)}
    if error is not None:
        return {"status": "not built", "error": error, **seconds}
    result = run_suite(folder, args.pytest_args, project)
    if not args.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return {**result, **seconds}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Read the command line; what comes after "--" goes to pytest."""
    own, pytest_args = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=KINDS, help="only this environment (default: both)")
    parser.add_argument("--python", nargs="+", metavar="VERSION", help="Pythons, such as 3.10 3.13, or their paths")
    parser.add_argument("--workdir", type=Path, default=ROOT / "outputs" / "environments", help="where they are built")
    parser.add_argument("--keep", action="store_true", help="keep the environments after their suite has run")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file with the results")
    args = parser.parse_args(own)
    args.pytest_args = pytest_args
    return args


def plan(args: argparse.Namespace, project: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs of "oldest" or "newest" and a Python version."""
    defaults = {"oldest": [oldest_python(project)], "newest": [NEWEST_PYTHON]}
    kinds = [args.only] if args.only else KINDS
    return [(kind, version) for kind in kinds for version in args.python or defaults[kind]]


def main(argv: list[str] | None = None) -> int:
    args, project = parse_args(sys.argv[1:] if argv is None else argv), read_project()
    results = {}
    for kind, version in plan(args, project):
        name = f"{kind}, Python {version}"
        results[name] = run_environment(kind, version, args, project)
        write_result(args.output, name, results[name])
        say(f"{name}: {results[name]['status']}")
    for name, result in results.items():
        counts = [f"{result[key]} {key}" for key in ("passed", "failed", "errors", "skipped") if key in result]
        say(f"{name}: {result['status']} ({', '.join(counts) or result.get('error', '').strip()})")
    return int(any(result["status"] not in ("passed", "no interpreter") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
