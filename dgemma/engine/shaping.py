"""What `logit_bias` and the penalties of a request add to the logits, given the tokens its answer has so far."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from dgemma.config import BAN, GenerationConfig


def biases(config: GenerationConfig, counts: Mapping[int, int]) -> dict[int, float]:
    """Token -> what is added to its logit; minus infinity for a ban. `counts` are of committed tokens."""
    added = {token: -math.inf if bias <= BAN else bias for token, bias in config.logit_bias}
    if config.presence_penalty or config.frequency_penalty:
        for token, count in counts.items():
            penalty = config.frequency_penalty * count + config.presence_penalty * (count > 0)
            added[token] = added.get(token, 0.0) - penalty
    return added


def bias_row(
    config: GenerationConfig,
    counts: Mapping[int, int],
    vocab: int,
    device: torch.device,
    banned: Collection[int] = (),
) -> Tensor | None:
    """The same as float32 `[V]`, with more `banned` tokens; None if there is nothing to add."""
    added = biases(config, counts) | dict.fromkeys(banned, -math.inf)
    if not added:
        return None
    row = torch.zeros(vocab)
    row[torch.tensor(list(added))] = torch.tensor(list(added.values()), dtype=torch.float32)
    return row.to(device)


def with_biases(logits: Tensor, configs: Sequence[GenerationConfig], counts: Sequence[Mapping[int, int]]) -> Tensor:
    """`logits [R, V]` of R requests, each with its own biases."""
    vocab = logits.shape[-1]
    rows = [bias_row(config, count, vocab, logits.device) for config, count in zip(configs, counts, strict=True)]
    if all(row is None for row in rows):
        return logits
    return torch.stack([own if row is None else own + row for own, row in zip(logits, rows, strict=True)])
