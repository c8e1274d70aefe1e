"""`transformers` on the very tensors of a loaded model: nothing is copied, nothing goes through files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dgemma.bench.parts import replaced
from dgemma.bench.peer import Peer, peer_library
from dgemma.checkpoint.names import hf_name
from dgemma.checkpoint.save import config_json
from dgemma.model import DiffusionGemma


def peer_of(model: DiffusionGemma) -> Peer:
    """The peer on this model's plain weights; what transformers has beside them (rotations, a vision part) it makes."""
    library, weight = peer_library(model.config), model.embed.weight
    with _without_storage():
        config = library.DiffusionGemmaConfig(**config_json(model.config, weight.dtype))
        theirs = library.DiffusionGemmaForBlockDiffusion(config)
    state = {hf_name(name): tensor for name, tensor in model.state_dict().items()}
    unknown = theirs.load_state_dict(state, strict=False, assign=True).unexpected_keys
    assert not unknown, unknown
    theirs.tie_weights()
    for module in theirs.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:  # of the vision part: never used here
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=weight.device)))
    return Peer(theirs, model.config, weight.dtype, weight.device, model.config.canvas_length)


@contextmanager
def _without_storage() -> Iterator[None]:
    """Modules that are built meanwhile have parameters without storage, and buffers with."""
    register = nn.Module.register_parameter

    def empty(module: nn.Module, name: str, parameter: Any) -> None:
        register(module, name, None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False))

    with replaced(nn.Module, "register_parameter", empty):
        yield
