"""The network for Sudoku: a small dense DiffusionGemma with a canvas position embedding, started with two hints."""

from __future__ import annotations

import torch

from dgemma.config import LayerConfig, ModelConfig
from dgemma.model import DiffusionGemma
from dgemma.train.init import new_model
from dgemma.train.sudoku.board import BOX, COLUMN, ROW

VOCAB = 13  # pad, eos, bos, blank, 1-9


def sudoku_config(hidden: int = 192, layers: int = 6, heads: int = 4) -> ModelConfig:
    """About 3 M parameters. The canvas is the whole board, so every attention reaches everything."""
    size = hidden // heads
    sliding = LayerConfig(kind="sliding", num_kv_heads=heads, head_dim=size)
    full = LayerConfig(kind="full", num_kv_heads=heads, head_dim=size)
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_heads=heads,
        layers=(*[sliding] * (layers - 1), full),
        num_experts=0,
        top_k_experts=0,
        expert_size=0,
        sliding_window=256,
        canvas_length=81,
        canvas_positions=81,
        max_positions=1024,
        eos_tokens=(1,),
    )


def new_sudoku_model(config: ModelConfig, seed: int) -> DiffusionGemma:
    """Fresh weights with two hints that cost nothing later and save most of the early training.

    The canvas position embedding begins as row + column + box. One head of the first layer begins by looking 81
    tokens back, where the prompt has the given of the same cell: rotary positions alone take very long to find that.
    """
    model = new_model(config, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    size = config.hidden_size
    with torch.no_grad():
        common = torch.randn(size, generator=generator)
        common /= common.norm()
        model.embed.weight += 0.7 * common  # what every token has in common is what the head can rely on
        row, column, box = (torch.randn(9, size, generator=generator) for _ in range(3))
        assert model.canvas_embed is not None
        model.canvas_embed.copy_(0.6 * (row[ROW] + column[COLUMN] + box[BOX]) / 3**0.5)
        attention = model.layers[0].attention
        angles = 81 * model._rotations["sliding"].frequencies.float()
        fast = (torch.arange(len(angles)) < int(0.6 * len(angles))).float()
        query = torch.cat([fast * torch.cos(-angles), fast * torch.sin(-angles)])
        key = torch.cat([fast, torch.zeros_like(fast)])
        attention.q_proj.weight[: attention.head_dim] = 2 * query[:, None] * common
        attention.k_proj.weight[: attention.head_dim] = 2 * key[:, None] * common
        attention.q_norm.weight.mul_(2.0)
        attention.k_norm.weight.mul_(2.0)
    return model
