"""The wheel holds everything, and nothing leaks out of the `vlm2rec` name."""

from __future__ import annotations

import ast
import hashlib
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from sources import parsed

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["package-dir"]
FOLDERS = ("downstream", "embedder", "pipelines")


def test_every_package_folder_is_listed_in_pyproject() -> None:
    assert sorted(path.parent.name for path in ROOT.glob("*/__init__.py")) == list(FOLDERS)
    assert {f"vlm2rec.{name}": name for name in FOLDERS} == PACKAGES
    found = [path.parent.relative_to(ROOT) for name in FOLDERS for path in (ROOT / name).rglob("__init__.py")]
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(".".join(("vlm2rec", *f.parts)) for f in found)


def inner_folders() -> list[Path]:
    return [
        path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.is_dir() and path.name != "__pycache__"
    ]


def test_packages_go_one_level_down_and_no_further() -> None:
    inner = inner_folders()
    assert inner and all(len(path.relative_to(ROOT).parts) == 2 for path in inner)
    assert all((path / "__init__.py").is_file() for path in inner)


def test_no_folder_holds_more_than_fifteen_modules() -> None:
    """The commands in `pipelines` aside, of which there is a file each."""
    for folder in (ROOT / "embedder", ROOT / "downstream", *inner_folders()):
        assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 15, folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, without a network."""
    copy = tmp_path_factory.mktemp("sources")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "."]
    built = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (found,) = copy.glob("*.whl")
    return found


def test_every_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"vlm2rec/{path.relative_to(ROOT)}"
        for name in FOLDERS
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert wanted - inside == set()
    assert len(wanted) > 100


def test_the_wheel_installs_nothing_outside_vlm2rec(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    version = PROJECT["project"]["version"]
    assert tops == {"vlm2rec", f"vlm2rec-{version}.dist-info"}


def test_the_wheel_carries_the_licence_and_the_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"vlm2rec-{PROJECT['project']['version']}.dist-info"
    assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "vlm2rec = vlm2rec.pipelines.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert "License-Expression: Apache-2.0" in archive.read(f"{info}/METADATA").decode()


def test_the_wheel_is_installed_and_runs_without_the_sources(wheel: Path, tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(tmp_path)]
    installed = subprocess.run([*install, str(wheel)], capture_output=True, text=True, check=False)
    assert installed.returncode == 0 and (tmp_path / "bin" / "vlm2rec").is_file(), installed.stderr
    code = (
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[2]]; sys.argv = ['vlm2rec', '--help'];"
        "from vlm2rec.pipelines import cli; print(cli.__file__); cli.main()"
    )
    # -S: no .pth file, so no editable installation of the sources
    command = [sys.executable, "-I", "-S", "-c", code, str(tmp_path), sysconfig.get_path("purelib")]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[0] == str(tmp_path / "vlm2rec/pipelines/cli.py")
    assert "export-items" in ran.stdout


def test_nobody_imports_a_package_by_its_bare_name() -> None:
    offenders = []
    for path in (file for name in (*FOLDERS, "tests", "docker") for file in (ROOT / name).rglob("*.py")):
        for node in ast.walk(parsed(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [node.module or ""]
            offenders += [f"{path}: {name}" for name in names if name.split(".")[0] in FOLDERS]
    assert offenders == []


def test_the_licence_is_the_unmodified_apache_text() -> None:
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def test_every_pinned_library_lies_in_the_range_of_pyproject() -> None:
    from vlm2rec.pipelines.doctor import in_range

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = dict(line.split("==") for line in lines)
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["recbole"], *extras["ray"], *extras["sentence"]]
    for text in wanted:
        name = text.split(">")[0].split("<")[0]
        if name in pins:
            assert in_range(pins[name], text[len(name) :]), f"{name} {pins[name]} against {text}"
    required = {text.split(">=")[0] for text in PROJECT["project"]["dependencies"]}
    assert {"torch", "transformers", "peft", "accelerate", "numpy", "pyarrow", "faiss-cpu"} <= required & set(pins)
