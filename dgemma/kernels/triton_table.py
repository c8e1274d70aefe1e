"""The GPU's row of the kernel table: our kernels, and torch's product (cuBLAS) where that is as good.

`dgemma.kernels` imports this on the first tensor of a device of type "cuda", or in `use(...)`: triton is optional.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from dgemma.kernels import (
    reference,
    triton_attention,
    triton_experts,
    triton_norms,
    triton_rope,
    triton_route,
    triton_vocab,
)

ROW: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "rms_norm": triton_norms.rms_norm,
        "linear": reference.linear,
        "rope": triton_rope.rope,
        "heads": triton_rope.heads,
        "attention": triton_attention.attention,
        "canvas_attention": triton_attention.canvas_attention,
        "stored_attention": triton_attention.stored_attention,
        "gelu": triton_norms.gelu,
        "geglu": triton_norms.geglu,
        "middle": triton_norms.middle,
        "close": triton_norms.close,
        "route": triton_route.route,
        "choose": triton_route.choose,
        "experts": triton_experts.experts,
        "softcap": reference.softcap,
        "vocab": triton_vocab.vocab,
    }
)
