"""Initial weights for training from scratch."""

from __future__ import annotations

import torch

from dgemma.config import ModelConfig
from dgemma.model import DiffusionGemma


def new_model(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> DiffusionGemma:
    """A fresh model: matrices N(0, 1/fan_in), embeddings N(0, 1/H), small closing norms (near the identity).

    The q/k norms start at D^-1/4: attention does not divide by sqrt(D), so they give first scores their unit scale.
    """
    generator = torch.Generator().manual_seed(seed)
    model = DiffusionGemma(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                param.fill_(param.shape[0] ** -0.25)
            elif name.endswith(("post_attention_norm.weight", "post_norm.weight")):
                param.fill_(0.5)
            elif param.ndim >= 2 and name != "canvas_embed":
                param.normal_(std=param.shape[-1] ** -0.5, generator=generator)
    return model.to(dtype)
