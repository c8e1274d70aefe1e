"""The network for Sudoku (its shape is in `recipes/sudoku.yaml`): two hints that it starts with."""

from __future__ import annotations

from typing import cast

import torch

from dgemma.errors import ConfigError
from dgemma.model import DiffusionGemma
from dgemma.model.attention import Attention
from dgemma.train.sudoku.board import BOX, COLUMN, ROW


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
