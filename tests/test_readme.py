"""The documentation is run: every bash and python block of README.md and docs/*.md.

A block stands alone (python blocks share no variables) and runs in the root of the checkout, with this
environment first in PATH, no hub, and a TMPDIR of its own for what it writes. `make` becomes `make -n`.
`<!-- no-test: reason -->` on the line before a block skips it; other kinds (console, json) are not run.
"""

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

REPO = Path(__file__).resolve().parent.parent
LIMIT_S = 300
RUNNERS = {
    "bash": ("bash", "-euo", "pipefail", "-c"),
    "sh": ("bash", "-euo", "pipefail", "-c"),
    "shell": ("bash", "-euo", "pipefail", "-c"),
    "python": (sys.executable, "-c"),
    "py": (sys.executable, "-c"),
}

FENCE = re.compile(r"^\s*(?P<mark>`{3,}|~{3,})\s*(?P<kind>[\w+-]*)")
NO_TEST = re.compile(r"<!--\s*no-test:\s*(?P<reason>\S.*?)\s*-->\s*$")
# `make` where a command may stand: at a line's start, after an operator, after assignments.
MAKE = re.compile(r"(?m)(^|[;&|(])(\s*(?:\w+=(?:'[^']*'|\"[^\"]*\"|\S*)\s+)*)make(?=\s|$)")


class Block(NamedTuple):
    line: int
    kind: str
    text: str
    skip: str | None


def blocks_of(markdown: str) -> list[Block]:
    """The fenced blocks that are to be run, with the reason of those that are to be skipped."""
    blocks = []
    before = ""  # the last line that is not blank
    lines = enumerate(markdown.splitlines(), start=1)
    for number, line in lines:
        if fence := FENCE.match(line):
            body = []
            for _, inner in lines:
                if re.fullmatch(rf"\s*{fence['mark'][0]}{{{len(fence['mark'])},}}\s*", inner):
                    break
                body.append(inner)
            if fence["kind"] in RUNNERS:
                reason = NO_TEST.search(before)
                text = textwrap.dedent("\n".join(body))
                blocks.append(Block(number, fence["kind"], text, reason["reason"] if reason else None))
        if line.strip():
            before = line
    return blocks


def run_block(block: Block, scratch: Path) -> tuple[int, str]:
    """Run a block; its exit status and all it printed. Whatever it left running is ended."""
    *command, text = (*RUNNERS[block.kind], block.text)
    if command[0] == "bash":
        text = MAKE.sub(r"\1\2make -n", text)
    outer_make = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    env = {key: value for key, value in os.environ.items() if key not in outer_make}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env |= {"HF_HUB_OFFLINE": "1", "TMPDIR": str(scratch)}
    with open(scratch / "output", "w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            [*command, text],
            cwd=REPO,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            status = 124
        finally:
            end_group(process)
        output.seek(0)
        return status, output.read()


def end_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def documented() -> list[object]:
    parameters: list[object] = []
    for page in [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]:
        if not page.is_file():
            continue
        name = page.relative_to(REPO).as_posix()
        for block in blocks_of(page.read_text(encoding="utf-8")):
            marks = [pytest.mark.skip(reason=f"{name}:{block.line}: {block.skip}")] if block.skip else []
            parameters.append(pytest.param(block, id=f"{name}:{block.line}-{block.kind}", marks=marks))
    return parameters


# -- the documentation ----------------------------------------------------------------


def test_readme_has_blocks_to_run() -> None:
    blocks = blocks_of((REPO / "README.md").read_text(encoding="utf-8"))
    assert any(block.skip is None for block in blocks), "README.md shows no command that can be run"


@pytest.mark.parametrize("block", documented())
def test_block(block: Block, tmp_path: Path) -> None:
    status, output = run_block(block, tmp_path)
    assert status == 0, f"exit {status} (124: longer than {LIMIT_S} s)\n{block.text}\n--\n{output}"


# -- the machinery --------------------------------------------------------------------

PAGE = """
# A page

```bash
echo one
```

<!-- no-test: needs a GPU -->

```bash
echo two
```

Text in between uses up the comment.

```python title="x.py"
print(3)
```

* a list

  ````bash
  cat <<EOF
  ```
  EOF
  ````

```console
$ echo never
```

<!-- no-test -->
```sh
echo five
```
"""


def test_blocks_are_found() -> None:
    assert blocks_of(PAGE) == [
        Block(4, "bash", "echo one", None),
        Block(10, "bash", "echo two", "needs a GPU"),
        Block(16, "python", "print(3)", None),
        Block(22, "bash", "cat <<EOF\n```\nEOF", None),
        Block(33, "sh", "echo five", None),
    ]


@pytest.mark.parametrize(
    ("written", "run"),
    [
        ("make run", "make -n run"),
        ("make", "make -n"),
        ("  make test && make soak", "  make -n test && make -n soak"),
        ("cd docs; PROMPT='a b' make run", "cd docs; PROMPT='a b' make -n run"),
        ("echo make run", "echo make run"),
        ("cmake --version\nmake check # make", "cmake --version\nmake -n check # make"),
        ("dgemma generate 'make it so'", "dgemma generate 'make it so'"),
    ],
)
def test_make_is_only_looked_at(written: str, run: str) -> None:
    assert MAKE.sub(r"\1\2make -n", written) == run


@pytest.mark.parametrize(
    ("kind", "text", "status", "said"),
    [
        ("bash", "pwd", 0, f"{REPO}\n"),
        ("bash", "command -v python", 0, f"{Path(sys.executable).parent}/python\n"),
        ("bash", "sleep 100 & echo started", 0, "started\n"),
        ("bash", "false | cat\necho unreached", 1, ""),
        ("bash", "make help >/dev/null", 0, ""),
        ("python", "import sys\nprint('out')\nsys.exit(3)", 3, "out\n"),
    ],
)
def test_blocks_run(kind: str, text: str, status: int, said: str, tmp_path: Path) -> None:
    assert run_block(Block(1, kind, text, None), tmp_path) == (status, said)
