"""One layer: attention, then a dense and an expert branch in parallel (or Gemma 4's dense-only form)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dgemma.config import ModelConfig
from dgemma.model.attention import Attend, Attention
from dgemma.model.layers import GatedMLP, RMSNorm
from dgemma.model.moe import Experts, Router


class Block(nn.Module):
    """Source: HF `DiffusionGemma{Encoder,Decoder}TextLayer`; the halves differ only in the closing layer scalar."""

    encoder_scalar: Tensor
    decoder_scalar: Tensor

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.attention = Attention(config, index)
        self.mlp = GatedMLP(size, config.intermediate_size)
        self.input_norm = RMSNorm(size, eps)
        self.post_attention_norm = RMSNorm(size, eps)
        self.pre_mlp_norm = RMSNorm(size, eps)
        self.post_norm = RMSNorm(size, eps)
        self.moe = config.num_experts > 0
        if self.moe:
            self.router = Router(config)
            self.experts = Experts(config)
            self.post_mlp_norm = RMSNorm(size, eps)
            self.pre_experts_norm = RMSNorm(size, eps)
            self.post_experts_norm = RMSNorm(size, eps)
        self.register_buffer("encoder_scalar", torch.ones(1))
        self.register_buffer("decoder_scalar", torch.ones(1))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, scalar: Tensor) -> Tensor:
        x = x + self.post_attention_norm(self.attention(self.input_norm(x), cos, sin, attend))
        return (x + self.post_norm(self._feed_forward(x))) * scalar

    def _feed_forward(self, x: Tensor) -> Tensor:
        dense = self.mlp(self.pre_mlp_norm(x))
        if not self.moe:
            return dense
        flat = x.reshape(-1, x.shape[-1])
        weights, ids = self.router(flat)
        mixed = self.experts(self.pre_experts_norm(flat), weights, ids).view_as(x)
        return self.post_mlp_norm(dense) + self.post_experts_norm(mixed)
