"""The checkout and the wheel are the same tree."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKS = ["kernels", "hub", "train", "demos"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CODE = {".py", ".pyc"}


def data_files() -> list[Path]:
    """Every file of the package that is no code, relative to saert/ (the links are followed)."""
    return sorted(
        Path(folder, name).relative_to(ROOT / "saert")
        for folder, _, names in os.walk(ROOT / "saert", followlinks=True)
        for name in names
        if Path(name).suffix not in CODE
    )


@pytest.mark.parametrize("name", LINKS)
def test_links_are_relative_and_resolve(name):
    link = ROOT / "saert" / name
    assert link.is_symlink(), f"{link} is no symlink; on Windows clone with core.symlinks=true"
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == (ROOT / name).resolve() and link.is_dir()


def test_every_data_file_is_packaged():
    globs = PYPROJECT["tool"]["setuptools"]["package-data"]
    saert = ROOT / "saert"
    covered = {path for pattern in globs["saert"] for path in saert.glob(pattern)}
    for folder, _, _ in os.walk(saert, followlinks=True):
        if "." not in str(Path(folder).relative_to(saert)).lstrip("."):  # a dot: no package
            package = ".".join(("saert", *Path(folder).relative_to(saert).parts))
            patterns = [*globs["*"], *(globs.get(package, []) if package != "saert" else [])]
            covered |= {path for pattern in patterns for path in Path(folder).glob(pattern)}
    left_out = [str(path) for path in data_files() if saert / path not in covered]
    assert not left_out, "no package-data pattern in pyproject.toml matches these"


def test_pinned_versions_satisfy_the_ranges():
    packaging = pytest.importorskip("packaging.requirements")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("#")[0].strip().split("==") for line in lines if "==" in line)
    project = PYPROJECT["project"]
    asked = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    for requirement in map(packaging.Requirement, asked):
        assert requirement.name in pins, f"constraints.txt does not pin {requirement.name}"
        assert pins[requirement.name] in requirement.specifier


@pytest.mark.slow
def test_wheel_holds_the_whole_tree(tmp_path):
    """Build offline, in a copy (setuptools writes build/ into its source); import the outcome."""
    pytest.importorskip("setuptools")
    copy = tmp_path / "copy"
    copy.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("saert", *LINKS):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--no-index", "-w", tmp_path, "."], cwd=copy, check=True)
    (wheel,) = tmp_path.glob("saert-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [Path(name) for name in archive.namelist()]
        packed = {name.relative_to("saert") for name in names if name.parts[0] == "saert"}
        archive.extractall(tmp_path / "site")
    code = {
        Path(folder, name).relative_to(ROOT / "saert")
        for folder, _, names in os.walk(ROOT / "saert", followlinks=True)
        for name in names
        if name.endswith(".py")
    }
    assert packed == code | set(data_files())
    seen = subprocess.run(
        [sys.executable, "-c", "import saert, saert.kernels.decode as d; print(d.__file__)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        check=True,
        capture_output=True,
        text=True,
    )
    assert seen.stdout.startswith(str(tmp_path / "site"))
