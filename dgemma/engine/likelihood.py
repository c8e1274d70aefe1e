"""What the encoder, read as an ordinary language model, thinks of given tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dgemma.engine.loop import Engine

_ROWS = 128  # rows of full logits held at a time


@torch.inference_mode()
def token_logprobs(engine: Engine, ids: Sequence[int], given: int) -> list[float]:
    """Log-probability in nats of each of `ids[given:]`, given everything before it; `given` is at least 1.

    Uses a cache of its own and may run beside the engine's ticks.
    """
    assert 1 <= given < len(ids)
    runner, cache = engine.runner, engine.new_cache()
    size = engine.config.encode_chunk
    out: list[float] = []
    for start in range(0, len(ids) - 1, size):
        part = ids[start : min(start + size, len(ids) - 1)]
        (hidden,) = runner.encode([(cache, part)])
        # Row i of this chunk predicts token start + i + 1.
        for row in range(max(0, given - 1 - start), len(part), _ROWS):
            logp = torch.log_softmax(runner.logits(hidden[row : row + _ROWS]), dim=-1)
            targets = torch.tensor(ids[start + row + 1 : start + row + 1 + logp.shape[0]], device=logp.device)
            out += logp.gather(1, targets[:, None]).squeeze(1).tolist()
    return out
