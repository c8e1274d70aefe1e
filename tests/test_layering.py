"""The plan of the house as a test: who may import whom, which library lives where, how long a file is.

The checkers are functions over a root folder, so the last tests plant violations in a temporary tree.
"""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPO = Path(__file__).resolve().parent.parent

RANKS = {
    "cli": 8,
    "server": 7, "eval": 7, "bench": 7, "notebook": 7,
    "api": 6, "train": 6,
    "engine": 5,
    "checkpoint": 4,
    "control": 3, "quant": 3,
    "model": 2, "diffusion": 2, "cache": 2, "view": 2,
    "kernels": 1, "text": 1, "settings": 1, "trace": 1,
    "config": 0, "events": 0,
    "errors": -1,
}  # fmt: skip

# Library -> the rooms that may import it. A library not named here may be used in every room above rank 0.
THIRD_PARTY = {
    "triton": {"kernels"},
    "fastapi": {"server"},
    "uvicorn": {"server"},
    "prometheus_client": {"server"},
    "ray": {"server"},
    "safetensors": {"checkpoint", "quant"},
    "huggingface_hub": {"checkpoint", "quant"},
    "gguf": {"checkpoint", "quant"},
    "datasets": {"train", "eval"},
    "peft": {"train"},
    "transformers": {"bench"},
}

MAX_LINES = 400
SIZED_FOLDERS = ("dgemma", "tests", "recipes", "scripts")


class Import(NamedTuple):
    line: int
    target: str  # dotted name; from a import b -> a.b
    lazy_export: bool  # inside a module-level __getattr__


def imports_of(tree: ast.Module) -> Iterator[Import]:
    """Every import at any depth: in functions, under TYPE_CHECKING, through importlib with a literal name."""
    exports = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "__getattr__"]
    inside_export = {id(n) for export in exports for n in ast.walk(export)}
    for node in ast.walk(tree):
        for target in _targets(node):
            yield Import(getattr(node, "lineno", 0), target, id(node) in inside_export)


def _targets(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=module, names=names, level=level):
            yield from (f"{'.' * level}{module or ''}.{alias.name}" for alias in names)
        case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called), args=[name, *_]):
            if called in ("import_module", "__import__"):
                yield from _literal_start(name)


def _literal_start(node: ast.expr) -> Iterator[str]:
    """The text of a literal, or what an f-string begins with: f"dgemma.kernels.{name}" -> dgemma.kernels."""
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


def room_of(relative: Path) -> str:
    """The room a file of dgemma/ belongs to; "" for dgemma/__init__.py, which stands above all."""
    room = relative.parts[0].removesuffix(".py")
    return "" if relative.name == "__init__.py" and len(relative.parts) == 1 else room


def import_fault(room: str, imported: Import) -> str | None:
    """What is wrong with one import in a file of `room`, or None."""
    target = imported.target
    if target.startswith("."):
        return "relative import, write it from dgemma on"
    top, _, rest = target.partition(".")
    if top != "dgemma":
        return third_party_fault(room, top)
    if room == "__main__":
        return None
    if room == "":
        return None if imported.lazy_export else "dgemma/__init__.py imports rooms only inside __getattr__"
    goal = rest.partition(".")[0]
    if goal in ("__version__", room):
        return None
    if goal == "LLM":
        goal = "api"
    if goal == "":
        return None if room == "cli" else "import a room, not the whole of dgemma"
    if goal not in RANKS:
        return f"{target} is in no room of the rank table"
    if RANKS[goal] < RANKS[room]:
        return None
    return f"{room} (rank {RANKS[room]}) must not import {goal} (rank {RANKS[goal]})"


def third_party_fault(room: str, library: str) -> str | None:
    if library in THIRD_PARTY and room not in THIRD_PARTY[library]:
        return f"{library} belongs into {' and '.join(sorted(THIRD_PARTY[library]))} only"
    if RANKS.get(room, 1) <= 0 and library not in sys.stdlib_module_names:
        return f"{room} uses the standard library only, not {library}"
    return None


def import_faults(root: Path) -> list[str]:
    """Violations of the import rules in root/dgemma, one `file:line: what` each."""
    faults = []
    package = root / "dgemma"
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        room = room_of(path.relative_to(package))
        if room not in RANKS and room not in ("", "__main__"):
            faults.append(f"{name}:1: {room} is not a room of the rank table")
            continue
        for imported in imports_of(ast.parse(path.read_text(encoding="utf-8"), filename=name)):
            if fault := import_fault(room, imported):
                faults.append(f"{name}:{imported.line}: {fault}")
    return faults


def python_files(root: Path) -> Iterable[Path]:
    """Sources under the sized folders: what git tracks or would track; without git, every file."""
    if (root / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *SIZED_FOLDERS]
        listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
        found = {root / name for name in listed.split("\0") if name.endswith(".py")}
        return sorted(path for path in found if path.is_file())
    return sorted(path for folder in SIZED_FOLDERS for path in (root / folder).rglob("*.py"))


def size_faults(root: Path) -> list[str]:
    faults = []
    for path in python_files(root):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES:
            faults.append(f"{path.relative_to(root).as_posix()}: {lines} lines, {MAX_LINES} allowed")
    return faults


# -- the house -----------------------------------------------------------------------


def test_imports_follow_the_rank_table() -> None:
    faults = import_faults(REPO)
    assert not faults, "\n" + "\n".join(faults)


def test_no_file_is_longer_than_the_limit() -> None:
    faults = size_faults(REPO)
    assert not faults, "\n" + "\n".join(faults)


def test_import_dgemma_does_not_import_torch() -> None:
    code = "import sys, dgemma; heavy = {'torch', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


# -- the checkers themselves ---------------------------------------------------------


def plant(root: Path, name: str, text: str) -> Path:
    """Write root/dgemma/NAME.py and return the root."""
    path = root / "dgemma" / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return root


ALLOWED = {
    "lower rank": ("model/block", "from dgemma.kernels.table import run\nfrom dgemma import config, errors"),
    "own package": ("model/block", "from dgemma.model import rope\nimport dgemma.model.attention"),
    "cli imports anything": ("cli", "import dgemma\ndef f():\n    from dgemma import server, LLM"),
    "version": ("kernels/cpu", "from dgemma import __version__"),
    "ordinary library": ("kernels/cpu", "import torch, numpy as np"),
    "standard library in config": ("config", "import json, dataclasses\nfrom collections import abc"),
    "triton in kernels": ("kernels/triton_moe", "import triton.language as tl\nimport triton"),
    "safetensors in quant": ("quant/gptq", "from safetensors import safe_open"),
    "peer in bench": ("bench/decode", "import transformers"),
    "name that only begins alike": ("model/block", "import transformers_like, tritonclient"),
    "other __import__-like names": ("text/chat", "reimport_module('dgemma.server')"),
}

FORBIDDEN = {
    "upward": ("kernels/table", "from dgemma.model import block"),
    "upward, from dgemma": ("kernels/table", "from dgemma import config, engine"),
    "upward, plain import": ("model/block", "import dgemma.engine.loop as loop"),
    "equal rank": ("model/block", "from dgemma.cache.ring import Ring"),
    "equal rank files": ("config", "from dgemma.events import Draft"),
    "equal rank, top": ("server/app", "from dgemma.bench import decode"),
    "nobody imports cli": ("server/app", "from dgemma.cli import main"),
    "lazy": ("engine/loop", "def f():\n    from dgemma.api import LLM"),
    "lazy in a __getattr__ elsewhere": ("engine/x", "def __getattr__(n):\n    from dgemma.api import LLM"),
    "in a method": ("cache/ring", "class A:\n    def f(self):\n        import dgemma.train"),
    "type checking": ("text/chat", "import typing\nif typing.TYPE_CHECKING:\n    import dgemma.api"),
    "in try": ("cache/ring", "try:\n    import dgemma.model.rope\nexcept ImportError:\n    pass"),
    "importlib": ("control/pins", "import importlib\nimportlib.import_module('dgemma.engine.loop')"),
    "importlib, f-string": ("control/pins", "import importlib\nimportlib.import_module(f'dgemma.api.{x}')"),
    "__import__": ("control/pins", "__import__('dgemma.engine')"),
    "relative sibling": ("model/block", "from . import rope"),
    "relative module": ("model/block", "from .rope import Rope"),
    "relative parent": ("model/block", "from ..config import Model"),
    "whole package": ("model/block", "import dgemma"),
    "LLM from below": ("engine/loop", "from dgemma import LLM"),
    "room that does not exist": ("cli", "import dgemma.utils"),
    "eager export": ("__init__", "from dgemma.api import LLM"),
    "eager export in another function": ("__init__", "def load():\n    from dgemma.api import LLM"),
    "unknown room": ("utils/misc", "import os"),
    "code in the data folder": ("models/default/build", "import os"),
    "triton outside": ("engine/loop", "import triton"),
    "triton lazily": ("model/moe", "def f():\n    import triton.language as tl"),
    "fastapi outside": ("api", "from fastapi import FastAPI"),
    "uvicorn in cli": ("cli", "import uvicorn"),
    "safetensors outside": ("model/text", "from safetensors.torch import load_file"),
    "hub outside": ("api", "import huggingface_hub"),
    "gguf outside": ("train/data", "import gguf"),
    "datasets outside": ("bench/decode", "import datasets"),
    "peft outside": ("eval/tasks", "import peft"),
    "transformers in text": ("text/tokenizer", "from transformers import AutoTokenizer"),
    "transformers in train": ("train/data", "import transformers"),
    "transformers at the top": ("__init__", "import transformers"),
    "library in config": ("config", "import torch"),
    "library in events": ("events", "import numpy as np"),
}  # fmt: skip


@pytest.mark.parametrize("case", ALLOWED)
def test_checker_passes(case: str, tmp_path: Path) -> None:
    name, text = ALLOWED[case]
    assert import_faults(plant(tmp_path, name, text)) == []


@pytest.mark.parametrize("case", FORBIDDEN)
def test_checker_catches(case: str, tmp_path: Path) -> None:
    name, text = FORBIDDEN[case]
    assert len(import_faults(plant(tmp_path, name, text))) == 1


def test_checker_passes_the_lazy_export_and_main(tmp_path: Path) -> None:
    export = "def __getattr__(name):\n    from dgemma.api import LLM\n    return LLM"
    plant(tmp_path, "__init__", export)
    plant(tmp_path, "__main__", "from dgemma.cli import main")
    assert import_faults(tmp_path) == []


def test_checker_names_file_and_line(tmp_path: Path) -> None:
    (fault,) = import_faults(plant(tmp_path, "model/block", "import torch\n\nimport dgemma.engine.loop\n"))
    assert fault == "dgemma/model/block.py:3: model (rank 2) must not import engine (rank 5)"


@pytest.mark.parametrize("folder", SIZED_FOLDERS)
def test_size_checker(folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "full.py").write_text("x = 1\n" * MAX_LINES)
    assert size_faults(tmp_path) == []
    (tmp_path / folder / "long.py").write_text("x = 1\n" * (MAX_LINES + 1))
    assert size_faults(tmp_path) == [f"{folder}/long.py: {MAX_LINES + 1} lines, {MAX_LINES} allowed"]
