"""What is installed is what the tree holds, and no other `statemachine` is in its place."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Final

import pytest

from tests.specs import book

ROOT: Final = Path(__file__).parents[1]
PACKAGES: Final = {"statemachine", "transport", "linux", "specs"}
UNPACKED: Final = ("specs/_build/", "specs/pictures/", "specs/scenarios/")
"""What only this tree needs: with the chapters, which lie in `specs` itself."""
PROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (built,) = directory.iterdir()
    return built


def test_basic_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    packed = {name for name in names if ".dist-info/" not in name and "/scripts/" not in name}
    in_tree = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".sh")
    }
    chapters = {f"specs/{path.name}" for path in (ROOT / "specs").glob("*.md")}
    assert packed == {path for path in in_tree - chapters if not path.startswith(UNPACKED)}
    assert {f"{package}/py.typed" for package in PACKAGES} <= packed


def test_the_wheel_says_what_it_needs_and_under_which_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        lines = archive.read(metadata).decode().partition("\n\n")[0].splitlines()
        licence = archive.read(metadata.replace("METADATA", "licenses/LICENSE")).decode()
    needed = [
        line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line
    ]
    assert [line.split()[1].partition("<")[0].partition(">")[0] for line in needed] == [
        "msgpack",
        "transitions",
    ]
    assert "License-Expression: Apache-2.0" in lines
    assert "Classifier: Private :: Do Not Upload" in lines
    assert licence.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in licence


def test_only_this_project_provides_the_names_here() -> None:
    # Installed from the tree, this project records a pointer to it and not the names themselves.
    listed = packages_distributions()
    assert {name: set(listed.get(name, ())) - {PROJECT["name"]} for name in PACKAGES} == {
        name: set() for name in PACKAGES
    }


def test_the_packages_come_from_one_place() -> None:
    found = {Path(str(importlib.import_module(name).__file__)).parents[1] for name in PACKAGES}
    assert found == {ROOT}


def test_the_version_is_the_same_wherever_it_is_asked_for(wheel: Path) -> None:
    versions = {importlib.import_module(name).__version__ for name in PACKAGES}
    assert versions == {wheel.name.split("-")[1]}


@pytest.mark.parametrize("name", ["transport", "linux"])
def test_a_package_offers_what_mypy_is_told(name: str) -> None:
    package = importlib.import_module(name)
    (block,) = (
        node
        for node in ast.parse(Path(str(package.__file__)).read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    told = {
        alias.name: "." * node.level + str(node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(told) == sorted(package.__all__)
    for public, home in told.items():
        assert getattr(package, public) is getattr(importlib.import_module(home, name), public)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = package.Nothing


def test_importing_a_package_imports_none_of_its_modules() -> None:
    program = "import sys, transport, linux; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    ours = {name for name in run.stdout.split() if name.partition(".")[0] in PACKAGES}
    assert ours == {"transport", "linux"}


def test_a_clash_with_python_statemachine_would_be_seen(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "ours")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "ours")])
    assert packages_distributions() == {name: [PROJECT["name"]] for name in PACKAGES}

    info = tmp_path / "theirs" / "python_statemachine-3.2.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: python-statemachine\n")
    (info / "RECORD").write_text("statemachine/__init__.py,,\nstatemachine/state.py,,\n")
    sys.path.append(str(info.parent))
    owners = set(packages_distributions()["statemachine"])
    assert owners == {PROJECT["name"], "python-statemachine"}


OTHER_PACKAGE: Final = {
    "__init__.py": "from .statemachine import StateMachine\n",
    "events.py": "class Events: pass\n",
    "exceptions.py": "",
    "statemachine.py": "class StateMachine: pass\n",
    "states.py": "class States: pass\n",
}
"""Of the files of python-statemachine 3.2.2 those that every version has, or we have, too."""


@pytest.fixture(params=["ours last", "theirs last", "theirs alone"])
def clash(request: pytest.FixtureRequest, wheel: Path, tmp_path: Path) -> Path:
    """What pip makes of both: one folder `statemachine` with the files of either."""
    theirs = tmp_path / "statemachine"
    theirs.mkdir()

    def write_theirs() -> None:
        for name, text in OTHER_PACKAGE.items():
            (theirs / name).write_text(text)

    write_theirs()
    with zipfile.ZipFile(wheel) as archive:
        left_out = "statemachine/" if request.param == "theirs alone" else " "
        names = [name for name in archive.namelist() if not name.startswith(left_out)]
        archive.extractall(tmp_path, names)
    if request.param == "theirs last":
        write_theirs()
    return tmp_path


@pytest.mark.parametrize("name", ["transport", "linux", "linux.cli", "statemachine"])
def test_a_clash_with_python_statemachine_is_said_at_import(clash: Path, name: str) -> None:
    program = f"import sys; sys.path.insert(0, {str(clash)!r}); import {name}"
    run = subprocess.run([sys.executable, "-c", program], cwd="/", capture_output=True, text=True)
    is_ours = "touches nothing" in (clash / "statemachine" / "__init__.py").read_text()
    if name == "statemachine" and not is_ours:
        assert run.returncode == 0, run.stderr
    else:
        last = run.stderr.splitlines()[-1]
        assert last.startswith("ImportError: python-statemachine is installed in the same"), last


def test_the_command_is_where_the_project_says(wheel: Path) -> None:
    script = ROOT / "linux" / "nshandoff.sh"
    assert Path(sys.executable).with_name("nshandoff").read_bytes() == script.read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/scripts/nshandoff"))
        assert archive.read(name) == script.read_bytes()
        assert archive.getinfo(name).external_attr >> 16 & 0o111 == 0o111


@pytest.mark.deep("long")
def test_every_use_of_chapter_11_needs_the_wheel_and_nothing_else(
    wheel: Path, tmp_path: Path
) -> None:
    """In a fresh environment, from an empty folder: no clone, no path to one."""
    python = tmp_path / "venv" / "bin" / "python"
    venv = [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-compile",
    ]
    for command in (venv, [*pip, "--disable-pip-version-check", f"{wheel}[testing]"]):
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
    chapter = ROOT / "specs" / "11-certifying.md"
    assert book.run(chapter, python.parent) >= 13
