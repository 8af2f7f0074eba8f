"""The package that pip builds and installs: its files, its commands, its dependencies."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from stream_service import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ["stream_generator", "stream_service", "chat_page"]
MODULES = ["llama3_service.py", "llama3_app.py"]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
TIMEOUT = 120


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools writes into the directory that it builds from."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in [*MODULES, "pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, source)
    # torch requires setuptools, so the build needs no download.
    build = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", directory, source]
    subprocess.run(build, check=True, timeout=TIMEOUT)
    return next(directory.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel. It uses the dependencies that the tests use."""
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory, symlinks=True)
    python = directory / "bin" / "python"
    install = [*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, timeout=TIMEOUT)
    (site_packages(directory) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return directory


def site_packages(environment: Path) -> Path:
    return next(environment.glob("lib/python*/site-packages"))


def output_of(environment: Path, command: str, *arguments: str) -> str:
    """Run an installed command outside of this clone, and return its output."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [environment / "bin" / command, *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        cwd=environment,
        env=clean,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert any(name.endswith(".js") for name in expected)
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected | {*MODULES}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_installed_service_prints_its_version_and_its_flags(environment: Path) -> None:
    version = output_of(environment, "llama3-service", "--version")
    assert version == f"llama3-service {__version__}\n"
    assert "--ckpts" in output_of(environment, "llama3-service", "--help")


def test_the_installed_service_finds_the_page_and_the_page_starts(environment: Path) -> None:
    """`--app` runs the page as a script; `--help` imports the page with all of its assets."""
    found = output_of(environment, "python", "-c", "import llama3_service as s; print(s.PAGE)")
    assert Path(found.strip()) == site_packages(environment) / "llama3_app.py"
    assert "--auth" in output_of(environment, "python", found.strip(), "--help")


def test_the_installed_command_llama3_app_runs(environment: Path) -> None:
    assert "--auth" in output_of(environment, "llama3-app", "--help")


def test_each_tested_version_is_in_the_range_that_the_package_requires() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    ranges = {r.name: r.specifier for r in map(Requirement, PROJECT["project"]["dependencies"])}
    assert ranges.keys() - {"pip"} == tested.keys()
    for name, version in tested.items():
        assert version in ranges[name], name


def test_the_version_is_defined_in_one_file() -> None:
    assert "version" not in PROJECT["project"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    files = [
        path.relative_to(ROOT).as_posix()
        for pattern in ("stream_*/**/*.py", "chat_page/*.py", "*.py")
        for path in ROOT.glob(pattern)
        if f'"{__version__}"' in path.read_text()
    ]
    assert files == ["stream_service/__init__.py"]
