"""Who gets a place in the next pass: whoever waited longest, first come first served, within the batch
limits; and how the tokens of one request are cut into passes and parts of passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from dgemma.config import EngineConfig, ModelConfig
from dgemma.engine.request import State


def plan_encode(states: Iterable[State], config: EngineConfig) -> list[State]:
    """Requests whose next `chunk` of pending tokens (of prompt, canvas or answer) is encoded now."""
    ready = [state for state in states if state.pending and not state.denoises]
    return _fill(ready, lambda state: chunk(state, config), config)


def plan_denoise(states: Iterable[State], model: ModelConfig, config: EngineConfig) -> list[State]:
    """Requests whose canvas takes a step now."""
    ready = [state for state in states if state.denoises]
    return _fill(ready, lambda state: state.next_width(model), config)


def plan_shared(
    states: Iterable[State], encoding: Sequence[State], model: ModelConfig, config: EngineConfig
) -> list[State]:
    """Requests whose canvas takes a step in the very pass that encodes the next chunk of each of `encoding`.

    So do canvases whose prefix ends with that chunk. None where there must be two passes: because they are too long
    together, or because of another mode than diffusion, where the end of one pass may decide what the next one does.
    """
    complete = {state.id for state in encoding if chunk(state, config) == state.pending and not state.ending}
    ready = [state for state in states if state.denoises or state.id in complete]
    chosen = _fill(ready, lambda state: state.next_width(model), config)
    tokens = sum(chunk(state, config) for state in encoding) + sum(state.next_width(model) for state in chosen)
    apart = any(state.config.mode != "diffusion" for state in (*encoding, *chosen))
    return [] if apart or tokens > config.max_batch_tokens else chosen


def chunk(state: State, config: EngineConfig) -> int:
    """Tokens of a request that one pass encodes: its own matter, so that batching changes no bits. A draft is whole."""
    if state.drafted:
        return state.pending + len(state.drafted)
    return min(state.pending, whole_chunk(config))


def whole_chunk(config: EngineConfig) -> int:
    """Tokens of a request that a pass takes at most: `encode_chunk`, rounded down to end with a whole block."""
    return config.encode_chunk - config.encode_chunk % config.block


def parts(state: State, config: EngineConfig, invariant: bool) -> list[int]:
    """How attention cuts the next chunk: into blocks from position 0 on, as long as all before are whole blocks.

    So the keys and values of a whole block depend on the tokens up to its end and on nothing else: neither on
    `encode_chunk` nor on where an earlier request stopped. Attention alone mixes rows: a different number of
    queries or keys in one call may change last bits. Where products are not `invariant` that would be in vain.
    """
    count = chunk(state, config)
    whole = invariant and state.whole == state.cache.length and not state.drafted
    return cut(count, config.block) if whole else [count]


def cut(count: int, block: int) -> list[int]:
    """Whole blocks, then what is left."""
    whole, rest = divmod(count, block)
    return [block] * whole + [rest] * (rest > 0)


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
