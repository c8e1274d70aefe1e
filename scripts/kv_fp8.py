"""What keys and values in FP8 change: the shipped model's numbers with `kv_cache_dtype="fp8"` beside those with "auto".

Held-out stories, as the encoder scores them, and the first denoising step behind the first half of each, on the same
noise.

    python scripts/kv_fp8.py [--stories 20] [--canvases 4]
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from dgemma.api import LLM  # noqa: E402
from dgemma.cache import kv_bytes  # noqa: E402
from dgemma.config import EngineConfig  # noqa: E402
from dgemma.config.engine import KV_CACHE_DTYPES  # noqa: E402
from dgemma.events import Draft  # noqa: E402
from dgemma.train.stories import make_story  # noqa: E402

HELD_OUT = 1_000_000_000  # the first held-out seed of recipes/default/build_data.py


def first_step(llm: LLM, prompt: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Entropies in nats and likeliest tokens of a canvas."""
    events = llm.stream(prompt, seed=seed, steps=1, max_new_tokens=llm.config.canvas_length)
    draft = next(event for event in events if isinstance(event, Draft))
    return np.array(draft.entropy), np.array(draft.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stories", type=int, default=20)
    parser.add_argument("--canvases", type=int, default=4, help="a story")
    arguments = parser.parse_args()
    logprobs, entropies, tokens = [], [], []
    for kind in KV_CACHE_DTYPES:
        llm = LLM.load("default", engine=EngineConfig(kv_cache_dtype=kind))
        texts = [make_story(HELD_OUT + number).text for number in range(arguments.stories)]
        logprobs.append(np.concatenate([llm.score(text).logprobs for text in texts]))
        steps = [first_step(llm, text[: len(text) // 2], seed) for text in texts for seed in range(arguments.canvases)]
        entropies.append(np.concatenate([entropy for entropy, _ in steps]))
        tokens.append(np.concatenate([token for _, token in steps]))
        size = kv_bytes(llm.config, llm.dtype, llm.config.canvas_length, 1, kind == "fp8")
        nats, entropy = -logprobs[-1].mean(), entropies[-1].mean()
        print(f"{kind}: {nats:.5f} nats a token, entropy {entropy:.4f}, {size} bytes of keys and values a token")
    (change,), (moved,) = ([b - a for a, b in pairwise(pair)] for pair in (logprobs, entropies))
    print(f"|change of log-probability|: mean {abs(change).mean():.5f}, 99 % {np.quantile(abs(change), 0.99):.5f} nats")
    print(f"  over {change.size} tokens; mean change {change.mean():+.5f}")
    print(f"|change of entropy|: mean {abs(moved).mean():.5f}, 99 % {np.quantile(abs(moved), 0.99):.5f} nats")
    print(f"  over {moved.size} positions; likeliest token the same at {(tokens[0] == tokens[1]).mean():.2%}")


if __name__ == "__main__":
    main()
