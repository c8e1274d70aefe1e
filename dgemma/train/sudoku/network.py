"""The network for Sudoku: a small dense DiffusionGemma with a canvas position embedding, started with two hints."""

from __future__ import annotations

from typing import cast

import torch

from dgemma.config import LayerConfig, ModelConfig
from dgemma.errors import ConfigError
from dgemma.model import DiffusionGemma
from dgemma.model.attention import Attention
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
    """Fresh weights with the hints of `give_board_hints`."""
    model = new_model(config, seed)
    give_board_hints(model, seed)
    return model


@torch.no_grad()
def give_board_hints(model: DiffusionGemma, seed: int) -> None:
    """Two hints in fresh weights that cost nothing later and save most of the early training. In place.

    The canvas position embedding begins as row + column + box. One head of the first layer begins by looking 81
    tokens back, where the prompt has the given of the same cell: rotary positions alone take very long to find that.
    `ConfigError` for a model without 81 canvas positions.
    """
    config = model.config
    if model.canvas_embed is None or config.canvas_positions != 81:
        raise ConfigError(f"board hints need canvas_positions 81, got {config.canvas_positions}")
    generator = torch.Generator().manual_seed(seed + 1)
    common = torch.randn(config.hidden_size, generator=generator)
    common /= common.norm()
    model.embed.weight += 0.7 * common  # what every token has in common is what the head can rely on
    row, column, box = (torch.randn(9, config.hidden_size, generator=generator) for _ in range(3))
    model.canvas_embed.copy_(0.6 * (row[ROW] + column[COLUMN] + box[BOX]) / 3**0.5)
    attention = cast(Attention, model.layers[0].attention)
    angles = 81 * model._rotations[config.layers[0].kind].frequencies.float()
    fast = (torch.arange(len(angles)) < int(0.6 * len(angles))).float()
    query = torch.cat([fast * torch.cos(-angles), fast * torch.sin(-angles)])
    key = torch.cat([fast, torch.zeros_like(fast)])
    attention.q_proj.weight[: attention.head_dim] = 2 * query[:, None] * common
    attention.k_proj.weight[: attention.head_dim] = 2 * key[:, None] * common
    attention.q_norm.weight.mul_(2.0)
    attention.k_norm.weight.mul_(2.0)
