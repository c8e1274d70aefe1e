"""What the encoder, read as an ordinary language model, thinks of given tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dgemma.engine.loop import Engine
from dgemma.engine.scheduler import cut, whole_chunk

_ROWS = 128  # rows of full logits held at a time


@torch.inference_mode()
def token_logprobs(engine: Engine, ids: Sequence[int], given: int) -> list[float]:
    """Log-probability in nats of each of `ids[given:]`, given everything before it; `given` is at least 1.

    Uses a cache of its own and may run beside the engine's ticks. Tokens are cut into passes and blocks as the engine
    cuts a prompt, so these are the numbers of the states that it would have.
    """
    assert 1 <= given < len(ids)
    runner, cache, last = engine.runner, engine.new_cache(), len(ids) - 1
    out: list[float] = []
    for start in range(0, last, whole_chunk(engine.config)):
        counts = cut(min(whole_chunk(engine.config), last - start), engine.config.block)
        views = zip(cache.segments(counts), counts, strict=True)
        hidden = torch.cat(runner.encode([(view, ids[view.length : view.length + count]) for view, count in views]))
        cache.advance(sum(counts))
        # Row i of this chunk predicts token start + i + 1.
        for row in range(max(0, given - 1 - start), len(hidden), _ROWS):
            logp = torch.log_softmax(runner.logits(hidden[row : row + _ROWS]), dim=-1)
            targets = torch.tensor(ids[start + row + 1 : start + row + 1 + logp.shape[0]], device=logp.device)
            out += logp.gather(1, targets[:, None]).squeeze(1).tolist()
    return out
