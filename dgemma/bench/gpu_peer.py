"""`transformers` on the very weights of a model that is loaded already: nothing is copied, nothing goes through files."""

from __future__ import annotations

import torch

from dgemma.bench.peer import Peer
from dgemma.checkpoint.names import hf_name
from dgemma.model import DiffusionGemma


def peer_of(model: DiffusionGemma) -> Peer:
    """The peer on this model's tensors (plain ones); what transformers keeps beside them, rotations say, it makes."""
    state = {hf_name(name): tensor for name, tensor in model.state_dict().items()}
    return Peer.around(model.config, state, model.embed.weight.dtype, model.embed.weight.device)
