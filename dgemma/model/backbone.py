"""The text model: `encode` (causal, clean tokens) and `denoise` (bidirectional, a noisy canvas) on one set of weights.

It knows neither masks nor caches (both live in `attend`), nor steps and temperatures, nor text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from dgemma import kernels
from dgemma.config import LayerKind, ModelConfig
from dgemma.kernels.matrix import Matrix
from dgemma.model.attention import Attend
from dgemma.model.block import Block
from dgemma.model.layers import Embedding, GatedMLP, RMSNorm, Rotation


class Stack(Protocol):
    """Another way to run the layers (`fast` has one), for packed rows `[T, H]`.

    The first `clean` rows close each layer with `encoder_scalar`, whatever `scalar` is that of the others.
    """

    def __call__(self, x: Tensor, positions: Tensor, attend: Attend, scalar: str, clean: int = 0) -> Tensor: ...

    def condition(self, embedded: Tensor, soft: Tensor | None) -> Tensor: ...


class SelfConditioning(nn.Module):
    """Adds the previous step's soft embedding to the canvas embedding; the closing norm always applies."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.pre_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(self, embedded: Tensor, soft: Tensor | None) -> Tensor:
        # No signal is a zero vector, and the gated MLP of a zero vector is zero.
        signal = embedded if soft is None else embedded + self.mlp(self.pre_norm(soft))
        return kernels.rms_norm(signal, None, self.eps)


class DiffusionGemma(nn.Module):
    """Source: HF `DiffusionGemmaForBlockDiffusion` (text). Tokens may have any leading shape `[...]`.

    Returned hidden states `[..., H]` are after the final norm; `logits` turns them into float32 `[..., V]`.
    """

    canvas_embed: nn.Parameter | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_conditioning = SelfConditioning(config)
        positions = config.canvas_positions
        self.canvas_embed = nn.Parameter(torch.zeros(positions, config.hidden_size)) if positions else None
        dims: dict[LayerKind, int] = {layer.kind: layer.head_dim for layer in config.layers}
        self._rotations = {kind: Rotation(config.rope(kind), dim) for kind, dim in dims.items()}
        self.head: Sequence[Matrix] | None = None
        """Products with pieces of the vocabulary, where logits are not those of the plain embedding (`quant`)."""

    def encode(self, ids: Tensor, positions: Tensor, attend: Attend, stack: Stack | None = None) -> Tensor:
        """Causal half: clean `ids [...]` at `positions [...]` -> hidden `[..., H]`. `attend` stores K and V."""
        return (stack or self._stack)(self.embed(ids), positions, attend, "encoder_scalar")

    def denoise(
        self,
        ids: Tensor,
        positions: Tensor,
        attend: Attend,
        soft: Tensor | None = None,
        places: Tensor | None = None,
        stack: Stack | None = None,
    ) -> Tensor:
        """Bidirectional half: canvas `ids [...]` -> hidden `[..., H]`.

        `soft [..., H]` is the previous prediction's embedding as `soft_embedding` gives it; rows of zeros (or None)
        mean no signal. `places [...]` are positions inside the canvas; only a model with `canvas_embed` needs them.
        """
        x = self._canvas(ids, soft, places, stack)
        return (stack or self._stack)(x, positions, attend, "decoder_scalar")

    def both(
        self,
        clean: Tensor,
        ids: Tensor,
        positions: Tensor,
        attend: Attend,
        soft: Tensor | None = None,
        places: Tensor | None = None,
        stack: Stack | None = None,
    ) -> Tensor:
        """`encode` of `clean [N]` and `denoise` of canvases `ids [T]` in one pass -> hidden `[N + T, H]`.

        `positions [N + T]` and `attend` are of all rows, clean ones first; `soft` and `places` of the canvases.
        """
        x = torch.cat([self.embed(clean), self._canvas(ids, soft, places, stack)])
        return (stack or self._stack)(x, positions, attend, "decoder_scalar", len(clean))

    def logits(self, hidden: Tensor) -> Tensor:
        """Softcapped float32 logits `[..., V]` over the tied, unscaled embedding."""
        if self.head is None:
            raw = kernels.linear(hidden, self.embed.weight)
        else:
            raw = torch.cat([piece(hidden) for piece in self.head], dim=-1)
        return kernels.softcap(raw, self.config.softcap)

    def soft_embedding(self, logits: Tensor) -> Tensor:
        """Probability-weighted embedding `[..., H]` (unscaled) of `logits [..., V]`."""
        probs = torch.softmax(logits, dim=-1, dtype=torch.float32).to(self.embed.weight.dtype)
        return kernels.linear(probs, self.embed.weight.t())

    def _canvas(self, ids: Tensor, soft: Tensor | None, places: Tensor | None, stack: Stack | None) -> Tensor:
        """What the layers get for canvas `ids`; see `denoise`."""
        x = self.embed(ids)
        if self.canvas_embed is not None:
            assert places is not None
            x = x + self.canvas_embed[places]
        soft = None if soft is None else soft * self.embed.scale
        out: Tensor = self.self_conditioning(x, soft) if stack is None else stack.condition(x, soft)
        return out

    def _stack(self, x: Tensor, positions: Tensor, attend: Attend, scalar: str, clean: int = 0) -> Tensor:
        tables = {kind: rotation(positions, x.dtype) for kind, rotation in self._rotations.items()}
        for block, layer in zip(self.layers, self.config.layers, strict=True):
            cos, sin = tables[layer.kind]
            scale = getattr(block, scalar)
            if clean:
                halves = ("encoder_scalar", clean), (scalar, x.shape[0] - clean)
                scale = torch.cat([getattr(block, name).expand(rows) for name, rows in halves])[:, None]
            x = block(x, cos, sin, attend, scale)
        return self.norm(x)
