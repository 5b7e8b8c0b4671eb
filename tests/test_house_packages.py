"""Packaging: the list of packages, the tree and the built wheel agree, and the metadata names what exists."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"rewriter": "subquad", "passes": "subquad.passes", "codegen": "subquad.codegen", "kernels": "subquad.kernels",
           "cli": "subquad.cli"}  # fmt: skip


def tree() -> dict[str, Path]:
    """package name -> folder, for every folder that holds a Python file."""
    found = {}
    for top, package in FOLDERS.items():
        for path in {p.parent for p in (ROOT / top).rglob("*.py")}:
            rest = path.relative_to(ROOT / top).parts
            found[".".join((package, *rest))] = path
    return found


def test_listed_packages_are_the_tree() -> None:
    assert set(CONFIG["tool"]["setuptools"]["packages"]) == set(tree())


def test_every_package_has_an_init() -> None:
    assert [str(folder) for folder in tree().values() if not (folder / "__init__.py").is_file()] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", *FOLDERS):
        (source / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(source)],
        capture_output=True,
        text=True,
        cwd=out,
    )
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("subquad-*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_source_file_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = {
        "/".join((*package.split("."), path.name))
        for package, folder in tree().items()
        for path in folder.iterdir()
        if path.suffix in (".py", ".cpp", ".h")
    } | {"subquad/py.typed"}
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == expected


def test_wheel_carries_licence_entry_points_and_version(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert any(name.endswith("/LICENSE") for name in names)
    (metadata,) = (wheel.read(n).decode() for n in names if n.endswith("dist-info/METADATA"))
    declared = re.search(r'__version__ = "(.+)"', (ROOT / "rewriter" / "__init__.py").read_text())
    assert declared is not None
    assert f"\nVersion: {declared.group(1)}\n" in metadata
    (points,) = (wheel.read(n).decode() for n in names if n.endswith("entry_points.txt"))
    assert "[console_scripts]\nsubquad = subquad.cli.__main__:main" in points
    assert "[torch_dynamo_backends]\nsubquad = subquad.backend:compile_graph" in points


def test_entry_points_resolve() -> None:
    for group in ("console_scripts", "torch_dynamo_backends"):
        (point,) = [p for p in entry_points(group=group) if p.name == "subquad"]
        assert callable(point.load())


def test_constraints_pin_every_direct_dependency() -> None:
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
              if "==" in line}  # fmt: skip
    project = CONFIG["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.split(r"[\[<>=~! ]", d)[0].lower() for d in wanted} - {"subquad"}
    assert names <= pinned
