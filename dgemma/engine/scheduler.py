"""Who gets a place in the next pass: whoever waited longest, first come first served, within the batch
limits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dgemma.config import EngineConfig, ModelConfig
from dgemma.engine.request import State, canvas_width


def plan_encode(states: Iterable[State], config: EngineConfig) -> list[State]:
    """Requests whose next `chunk` of pending tokens (of prompt, canvas or answer) is encoded now."""
    return _fill([state for state in states if state.pending], lambda state: chunk(state, config), config)


def plan_denoise(states: Iterable[State], model: ModelConfig, config: EngineConfig) -> list[State]:
    """Requests whose canvas takes a step now."""
    ready = [state for state in states if state.config.mode == "diffusion" and not state.pending]
    return _fill(ready, lambda state: canvas_width(state.config, model), config)


def chunk(state: State, config: EngineConfig) -> int:
    """Tokens of a request that one pass encodes: its own matter, so that batching changes no bits."""
    return min(state.pending, config.encode_chunk)


def _fill(states: list[State], size: Callable[[State], int], config: EngineConfig) -> list[State]:
    chosen: list[State] = []
    tokens = 0
    for state in sorted(states, key=lambda state: state.turn):
        tokens += size(state)
        # No skipping ahead: a wide canvas must not wait behind an endless row of narrow ones.
        if chosen and tokens > config.max_batch_tokens:
            break
        chosen.append(state)
    return chosen
