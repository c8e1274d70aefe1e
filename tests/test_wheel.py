"""The wheel is the product: built, looked into, installed, and run from an empty folder."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dgemma

REPO = Path(__file__).resolve().parent.parent


def call(*command: str | Path, cwd: Path, **env: str) -> str:
    """Run a command with the hub switched off; its standard output, or a failure with all it printed."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | {"HF_HUB_OFFLINE": "1"} | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{command} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, REPO, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("target")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    call(*pip, "--no-index", "--no-deps", "--target", target, wheel, cwd=target)
    return target


def run_installed(installed: Path, empty: Path, *arguments: str) -> str:
    """`python ...` in an empty folder and an empty home, with the installed wheel before everything else."""
    home = empty.parent / f"{empty.name}-home"
    home.mkdir(exist_ok=True)
    assert not list(empty.iterdir())
    return call(sys.executable, *arguments, cwd=empty, PYTHONPATH=str(installed), HOME=str(home))


def test_wheel_is_named_after_the_version(wheel: Path) -> None:
    assert wheel.name == f"dgemma-{dgemma.__version__}-py3-none-any.whl"


def test_wheel_holds_the_package_and_nothing_else(names: set[str]) -> None:
    assert {"dgemma/__init__.py", "dgemma/__main__.py", "dgemma/cli/__init__.py", "dgemma/py.typed"} <= names
    info = f"dgemma-{dgemma.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"dgemma", info}
    assert f"{info}/licenses/LICENSE" in names
    strays = [n for n in names if re.search(r"(^|/)(tests?/|test_|conftest|__pycache__)|\.pyc$", n)]
    assert not strays


def test_wheel_holds_every_source_and_model_file(names: set[str]) -> None:
    command = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "dgemma")
    listed = call(*command, cwd=REPO).split("\0")
    sources = {name for name in listed if name and (REPO / name).is_file()}
    on_disk = {p.relative_to(REPO).as_posix() for p in (REPO / "dgemma/models").rglob("*") if p.is_file()}
    missing = (sources | on_disk) - names
    assert not missing, f"not in the wheel (ignored by .gitignore?): {sorted(missing)}"


def test_the_installed_wheel_is_what_runs(installed: Path, tmp_path: Path) -> None:
    found = run_installed(installed, tmp_path, "-c", "import dgemma; print(dgemma.__file__)")
    assert Path(found.strip()).is_relative_to(installed)


def test_version_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    assert dgemma.__version__ in run_installed(installed, tmp_path, "-m", "dgemma", "--version")


def test_generate_from_an_empty_folder(installed: Path, names: set[str], tmp_path: Path) -> None:
    if not any(n.startswith("dgemma/models/") and n.endswith(".safetensors") for n in names):
        pytest.skip("this tree ships no model yet")
    generate = ("-m", "dgemma", "generate", "Once", "--max-new-tokens", "32", "--json")
    assert json.loads(run_installed(installed, tmp_path, *generate))
