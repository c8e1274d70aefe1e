"""Compile every Triton kernel for an H100 without one, at the shapes of the released model; print what each needs.

Run by `test_triton_compile.py` in a process of its own (under the interpreter nothing can be compiled). Tensors have no
memory (device "meta"), launches are compiled and not run: the code path is that of a device, up to the launch.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dgemma.kernels import triton_attention, triton_experts, triton_norms, triton_rope, triton_route, triton_vocab
from dgemma.kernels.stacked import MatrixStack, Stacked

HIDDEN, VOCAB, EXPERTS, TOP_K, CANVAS, WINDOW = 2816, 262_144, 128, 8, 256, 1024
INNER, GROUP = 704, 64
SHAPES = {"sliding": (16, 8, 256), "full": (16, 2, 512)}


class Driver:
    """Stands for an H100."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def compile_instead_of_running(found: dict[str, dict[str, int]]) -> None:
    triton.runtime.driver.set_active(Driver())
    run = JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        entry = found.setdefault(name, {"shared": 0, "registers": 0, "stack": 0})
        for what, value in {"shared": kernel.metadata.shared, **resources(kernel.asm["cubin"])}.items():
            entry[what] = max(entry[what], value)
        return kernel

    JITFunction.run = compiled


@functools.cache
def resources(binary: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of memory a thread for what did not fit into them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+)", said), re.search(r"STACK:(\d+)", said)
    assert registers and stack, said
    return {"registers": int(registers[1]), "stack": int(stack[1])}


def like(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def rows_ops(rows: int, dtype: torch.dtype) -> None:
    x, weight = like(rows, HIDDEN, dtype=dtype), like(HIDDEN, dtype=dtype)
    triton_norms.rms_norm(x, weight, 1e-6)
    triton_norms.rms_norm(x, None, 1e-6)
    triton_norms.middle(x, x, weight, weight, 1e-6, weight, weight)
    triton_norms.close(x, x, x, (weight, weight, weight), like(1, dtype=dtype), weight, 1e-6)
    triton_norms.gelu(x)
    triton_norms.geglu(x)
    triton_route.choose(like(rows, EXPERTS, dtype=dtype), like(EXPERTS, dtype=dtype), TOP_K)


def attention(rows: int, dtype: torch.dtype) -> None:
    for kind, (heads, keys, dim) in SHAPES.items():
        has_v = kind == "sliding"
        packed = like(rows, (heads + (2 if has_v else 1) * keys) * dim, dtype=dtype)
        table, weight = like(rows, dim, dtype=dtype), like(dim, dtype=dtype)
        q, k, v = triton_rope.heads(packed, weight, weight, table, table, 1e-6, (heads, keys), has_v)
        triton_rope.rope(q, table, table)
        for stored in (1, 200, 4 * WINDOW):
            old = like(stored, keys, dim, dtype=dtype)
            triton_attention.canvas_attention(q, k, v, old, old, 0, stored)
            codes, scale = like(stored, keys, dim, dtype=torch.float8_e4m3fn), like(stored, keys, dtype=torch.float32)
            triton_attention.canvas_attention(q, k, v, codes, codes, 0, stored, (scale, scale))
            spans, where = like(rows, 2, dtype=torch.int64), like(2, dtype=torch.int64)
            triton_attention.attention(q, old, old, None, spans)
            triton_attention.stored_attention(q, codes, codes, 0, stored, spans, (scale, scale), where)


def experts(rows: int, dtype: torch.dtype) -> None:
    chosen = like(rows, TOP_K, dtype=torch.float32), like(rows, TOP_K, dtype=torch.int64)
    shapes = (EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)
    plain = [like(*shape, dtype=dtype) for shape in shapes]
    fp8 = [Stacked("fp8", s, like(*s, dtype=torch.float8_e4m3fn), like(*s[:2], dtype=torch.float32)) for s in shapes]
    int4 = [
        Stacked("int4", s, like(*s[:2], s[2] // 2, dtype=torch.uint8), *(like(*s[:2], s[2] // GROUP),) * 2, GROUP)
        for s in shapes
    ]
    for gate_up, down in (plain, *([MatrixStack([None] * EXPERTS, one) for one in kind] for kind in (fp8, int4))):
        triton_experts.experts(like(rows, HIDDEN, dtype=dtype), *chosen, gate_up, down)


def vocabulary(rows: int, dtype: torch.dtype) -> None:
    heat, noise = like(rows, dtype=torch.float32), like(rows, VOCAB // 1024, dtype=torch.float64)
    for own in (None, heat):
        triton_vocab.vocab(like(rows, HIDDEN, dtype=dtype), like(VOCAB, HIDDEN, dtype=dtype), 30.0, heat, noise, own)


def main(types: list[str]) -> None:
    found: dict[str, dict[str, int]] = {}
    compile_instead_of_running(found)
    for dtype in (getattr(torch, name) for name in types):
        for rows in (1, CANVAS):
            rows_ops(rows, dtype)
            attention(rows, dtype)
            experts(rows, dtype)
            vocabulary(rows, dtype)
    print(json.dumps(found))


if __name__ == "__main__":
    with torch.inference_mode():
        main(sys.argv[1:])
