"""The compiled row-by-row ops of `native.cpp`: built once where there is a C++ compiler, kept in the user's cache.

Nothing is built at import. Without a compiler, or with DGEMMA_NATIVE=0, `load` gives None and the torch ops serve.
Tensors are CPU tensors, contiguous, float32 or bfloat16; nothing here is differentiable.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = [
    Path(__file__).with_name(name) for name in ("native.cpp", "native_math.h", "native_gemm.h", "native_vocab.h")
]
_FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
_SUFFIX = {torch.float32: "_f32", torch.bfloat16: "_bf16"}
PANEL = 32
_STATE = 56  # bytes of a row's running values in the vocabulary pass
_SECONDS = 120


@cache
def load() -> Native | None:
    """The library, built if it has to be; None where that cannot be done."""
    if os.environ.get("DGEMMA_NATIVE", "1") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    text = b"".join(path.read_bytes() for path in SOURCES)
    key = hashlib.sha256(b"\0".join([text, " ".join(_FLAGS).encode(), _processor().encode()])).hexdigest()[:16]
    path = _folder() / f"native-{key}.so"
    if not path.exists() and not (compiler and _build(compiler, path)):
        return None
    try:
        return Native(ctypes.CDLL(str(path)))
    except OSError:
        return None


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dgemma"


def _processor() -> str:
    """What the compiled code depends on: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(next((line for line in lines if line.startswith(name)), "") for name in ("model name", "flags"))
    except OSError:
        return platform.processor() + platform.machine()


def _build(compiler: str, path: Path) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            subprocess.run(
                [compiler, *_FLAGS, str(SOURCES[0]), "-o", str(made)], check=True, capture_output=True, timeout=_SECONDS
            )
            made.replace(path)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


class Native:
    """The functions by their types. Outputs are new tensors; `T` rows, see `native.cpp` for each formula."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number, whole, small = ctypes.c_void_p, ctypes.c_float, ctypes.c_int64, ctypes.c_int
        p, f, n, i = pointer, number, whole, small
        signatures = {
            "multiply": [p, n, p, n, n, p, i],
            "experts": [p, p, n, p, p, n, n, p, p, i],
            "bytes": [p, n, n, n, p, p, i],
            "multiply_bytes": [p, p, n, n, p, p, p, n, n, p, n, i],
            "attention": [p, p, p, n, n, n, n, n, p, p, i],
            "norm": [p, p, f, n, n, p, i],
            "middle": [p, p, p, p, p, p, f, n, n, p, p, p, p, i],
            "close": [p, p, p, p, p, p, p, p, f, n, n, p, p, i],
            "heads": [p, p, p, p, p, f, n, n, n, n, i, p, p, p, i],
            "geglu": [p, n, n, p, i],
            "softmax": [p, n, n, i],
            "route": [p, p, n, n, n, p, p, p, p, p, p],
            "combine": [p, p, p, n, n, n, p, i],
            "vocab": [p, n, n, n, f, p, p, p, n, p, p, p, i],
        }  # fmt: skip
        self._call: dict[tuple[str, torch.dtype], Any] = {}
        for name, kinds in signatures.items():
            for dtype, suffix in _SUFFIX.items():
                function = getattr(library, name + suffix)
                function.argtypes, function.restype = kinds, None
                self._call[name, dtype] = function
        self._pack_bytes = library.pack_bytes
        self._pack_bytes.argtypes, self._pack_bytes.restype = [p, n, n, p, p], None
        found = library.products()
        self._products = {
            kind for bit, kind in enumerate((torch.float32, torch.bfloat16, torch.int8)) if found >> bit & 1
        }

    def multiplies(self, dtype: torch.dtype, inputs: int) -> bool:
        """Whether there are products of that type here. They need AVX2; with AVX-512 bfloat16 also its
        extension for that, bytes always."""
        return dtype in self._products and (dtype is not torch.bfloat16 or inputs % 2 == 0)

    def multiply(self, x: Tensor, panels: Tensor, outputs: int) -> Tensor:
        """`[T, in]` times a weight that `panels_of` packed: `[T, out]`."""
        rows, size = x.shape
        out = x.new_empty(rows, outputs)
        self._call["multiply", x.dtype](_at(x), rows, _at(panels), outputs, size, _at(out), torch.get_num_threads())
        return out

    def experts(self, x: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, inner: int) -> Tensor:
        """Gated MLPs of rows `[T k, H]` grouped by expert, `counts [E]`; `gate_up, down [E]`: where the panels are."""
        rows, size = x.shape
        room, out = x.new_empty(rows, 3 * inner), torch.empty_like(x)
        self._call["experts", x.dtype](
            _at(x), _at(counts), len(counts), _at(gate_up), _at(down), size, inner, _at(room), _at(out),
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def pack_bytes(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """`codes [out, in]` int8 as `panels_of` lays them out, and what the levels' zero adds to each output."""
        outputs, inputs = codes.shape
        codes, panels = codes.contiguous(), -(-outputs // PANEL)
        packed = torch.empty(panels, -(-inputs // 4), PANEL, 4, dtype=torch.int8)
        zero = torch.zeros(panels * PANEL, dtype=torch.int32)
        self._pack_bytes(_at(codes), outputs, inputs, _at(packed), _at(zero))
        return packed, zero

    def bytes_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows `[T, in]` as unsigned levels, 128 for 0, with room at their ends, and each row's step `[T]`."""
        rows, size = x.shape
        levels = torch.empty(rows, -(-size // 4) * 4 + 64, dtype=torch.uint8)
        steps = torch.empty(rows)
        self._call["bytes", x.dtype](_at(x), rows, size, levels.shape[1], _at(levels), _at(steps), _threads(rows))
        return levels, steps

    def multiply_bytes(
        self, rounded: tuple[Tensor, Tensor], inputs: int, panels: Tensor, zero: Tensor, scale: Tensor, out: Tensor
    ) -> None:
        """`out [T, outputs]`, maybe a slice of columns: (level - 128) * step of each row times code * scale of panels.

        `zero` and `scale` have an entry for each output of the panels, those that do not exist included.
        """
        levels, steps = rounded
        self._call["multiply_bytes", out.dtype](
            _at(levels), _at(steps), out.shape[0], levels.shape[1], _at(panels), _at(zero), _at(scale), out.shape[1],
            inputs, _at(out), out.stride(0), torch.get_num_threads(),
        )  # fmt: skip

    def attention(self, q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None) -> Tensor:
        """`reference.attention` of `q [T, Q, D]` and `k, v [S, K, D]`, where query t sees keys `spans[t]` `[T, 2]`."""
        (tokens, heads, dim), (keys, groups, _) = q.shape, k.shape
        q, k, v, out = q.contiguous(), k.contiguous(), v.contiguous(), torch.empty_like(q)
        self._call["attention", q.dtype](
            _at(q), _at(k), _at(v), tokens, heads, groups, dim, keys, _at(spans), _at(out), torch.get_num_threads()
        )
        return out

    def norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """`reference.rms_norm` of rows `[T, H]`."""
        rows, size = x.shape
        out = torch.empty_like(x)
        self._call["norm", x.dtype](_at(x), _at(weight), eps, rows, size, _at(out), _threads(rows))
        return out

    def middle(
        self,
        x: Tensor,
        attended: Tensor,
        post: Tensor,
        dense: Tensor,
        eps: float,
        mixed: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The residual after attention, and the inputs of MLP, experts and router (None without experts)."""
        rows, size = x.shape
        out, for_dense = torch.empty_like(x), torch.empty_like(x)
        for_mixed, routed = (None, None) if mixed is None else (torch.empty_like(x), torch.empty_like(x))
        self._call["middle", x.dtype](
            _at(x), _at(attended), _at(post), _at(dense), _at(mixed), _at(scale), eps, rows, size, _at(out),
            _at(for_dense), _at(for_mixed), _at(routed), _threads(rows),
        )  # fmt: skip
        return out, for_dense, for_mixed, routed

    def close(
        self,
        x: Tensor,
        dense: Tensor,
        mixed: Tensor | None,
        weights: tuple[Tensor | None, Tensor | None, Tensor],
        scalar: Tensor,
        following: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """The layer's output, and its norm under the next layer's weight. `weights`: MLP, experts, both together."""
        rows, size = x.shape
        out, normed = torch.empty_like(x), torch.empty_like(x)
        self._call["close", x.dtype](
            _at(x), _at(dense), _at(mixed), *map(_at, weights), _at(scalar), _at(following), eps, rows, size, _at(out),
            _at(normed), _threads(rows),
        )  # fmt: skip
        return out, normed

    def heads(
        self,
        packed: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        counts: tuple[int, int],
        has_v: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From rows `[T, queries | keys | values]` to normed and rotated q, k and normed v `[T, heads, D]` each."""
        rows, (queries, keys), dim = packed.shape[0], counts, cos.shape[-1]
        q, k, v = (packed.new_empty(rows, heads, dim) for heads in (queries, keys, keys))
        self._call["heads", packed.dtype](
            _at(packed), _at(q_norm), _at(k_norm), _at(cos), _at(sin), eps, rows, queries, keys, dim, has_v, _at(q),
            _at(k), _at(v), _threads(rows),
        )  # fmt: skip
        return q, k, v

    def geglu(self, x: Tensor) -> Tensor:
        """`gelu(gate) * up` of `[T, gate | up]`."""
        rows, size = x.shape[0], x.shape[1] // 2
        out = x.new_empty(rows, size)
        self._call["geglu", x.dtype](_at(x), rows, size, _at(out), _threads(rows))
        return out

    def softmax_(self, scores: Tensor) -> Tensor:
        """In place over the last axis of `[R, S]`."""
        rows, size = scores.shape
        self._call["softmax", scores.dtype](_at(scores), rows, size, _threads(rows))
        return scores

    def route(self, scores: Tensor, expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`reference.route` from its scores `[T, E]`: weights `[T, k]`; rows grouped by expert `[T k]`, where a row's
        parts lie in that order `[T, k]`, and the groups' sizes."""
        rows, experts = scores.shape
        weights = torch.empty(rows, top_k)
        order, place = torch.empty(2, rows * top_k, dtype=torch.int64)
        counts, ids = torch.empty(experts, dtype=torch.int64), torch.empty(rows * top_k, dtype=torch.int64)
        room = torch.empty(experts, dtype=torch.int64)
        self._call["route", scores.dtype](
            _at(scores), _at(expert_scale), rows, experts, top_k, _at(weights), _at(order), _at(place), _at(counts),
            _at(room), _at(ids),
        )  # fmt: skip
        return weights, order, place, counts

    def combine(self, parts: Tensor, place: Tensor, weights: Tensor) -> Tensor:
        """Each row's weighted parts `[T k, H]`, added in ascending order of experts: `[T, H]`."""
        rows, top_k = weights.shape
        out = parts.new_empty(rows, parts.shape[1])
        self._call["combine", parts.dtype](
            _at(parts), _at(place), _at(weights), rows, top_k, parts.shape[1], _at(out), _threads(rows)
        )
        return out

    def vocab_state(self, rows: int) -> Tensor:
        """Running values of `vocab`, before the first chunk: `[T, 7]` float64, read by `vocab_result`."""
        state = torch.zeros(rows, _STATE // 8, dtype=torch.float64)
        state.view(torch.float32)[:, 6] = -torch.inf
        return state

    def vocab(
        self,
        logits: Tensor,
        first: int,
        cap: float,
        temperature: Tensor,
        own: Tensor | None,
        uniforms: Tensor,
        state: Tensor,
    ) -> Tensor:
        """Take a chunk of raw logits `[T, n]` that begins at token `first`; exp(z - highest z so far), in place."""
        rows, size = logits.shape
        threads = _threads(rows)
        room = torch.empty(threads, size)
        self._call["vocab", logits.dtype](
            _at(logits), rows, size, first, cap, _at(temperature), _at(own), _at(uniforms), uniforms.shape[1],
            _at(logits), _at(state), _at(room), threads,
        )  # fmt: skip
        return logits


def panels_of(weight: Tensor) -> Tensor:
    """`weight [out, in]` as panels of 32 outputs, `[out / 32, in / n, 32, n]`, with n inputs to four bytes."""
    each = 4 // weight.element_size()
    lack = (0, -weight.shape[1] % each, 0, -weight.shape[0] % PANEL)
    filled = torch.nn.functional.pad(weight.detach(), lack) if any(lack) else weight.detach()
    return filled.reshape(-1, PANEL, filled.shape[1] // each, each).transpose(1, 2).contiguous()


def weight_of(panels: Tensor, outputs: int, inputs: int) -> Tensor:
    """What `panels_of` packed."""
    return panels.transpose(1, 2).reshape(panels.shape[0] * PANEL, -1)[:outputs, :inputs].contiguous()


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads(rows: int) -> int:
    # A team of threads costs some microseconds: not for a handful of rows.
    return torch.get_num_threads() if rows >= 8 else 1
