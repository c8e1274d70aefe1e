"""What it saves to encode a canvas in the pass of the next one's first step (`EngineConfig.fuse`).

    python scripts/fused.py --model default --prompt 128 --canvases 4 --steps 16

Both ways take turns on one engine and one thread; seconds are of the process, which other programs disturb least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace

from dgemma import LLM
from dgemma.config import EngineConfig
from dgemma.engine import Engine, Request


def seconds(engine: Engine, request: Request, fuse: bool) -> tuple[float, int]:
    """Process seconds of an answer, and forward passes."""
    engine.config, before = replace(engine.config, fuse=fuse), engine.counters
    engine.add(request)
    begun = time.process_time()
    while engine.has_work:
        engine.tick()
    taken, after = time.process_time() - begun, engine.counters
    done = {name: value - getattr(before, name) for name, value in vars(after).items()}
    return taken, done["encode_passes"] + done["denoise_passes"] - done["shared_passes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--canvases", type=int, default=4)
    parser.add_argument("--steps", type=int, default=16, help="of each canvas")
    parser.add_argument("--canvas-length", type=int)
    parser.add_argument("--rounds", type=int, default=11)
    given = parser.parse_args()
    llm = LLM.load(given.model, threads=1, engine=EngineConfig(prefix_cache_tokens=0))
    width = given.canvas_length or llm.config.canvas_length
    opening = llm.encode_prompt("Once upon a time there was a little fox who lived by the river. " * given.prompt)
    config = llm.generation.with_(
        max_denoising_steps=given.steps, confidence_threshold=None, stop_tokens=(), canvas_length=width,
        max_new_tokens=given.canvases * width, temperature=0.8,
    )  # fmt: skip
    taken: dict[bool, list[float]] = {True: [], False: []}
    passes: dict[bool, int] = {}
    for count in range(given.rounds + 1):  # the first one warms up
        request = Request(prompt=tuple(opening[: given.prompt]), config=config.with_(seed=count), reuse=False)
        for fuse in (True, False) if count % 2 else (False, True):
            spent, passes[fuse] = seconds(llm.engine, request, fuse)
            if count:
                taken[fuse].append(spent)
    ratios = [one / two for one, two in zip(taken[True], taken[False], strict=True)]
    print(json.dumps({
        "width": width, "passes": [passes[True], passes[False]],
        "ms": [round(1000 * statistics.median(taken[fuse]), 1) for fuse in (True, False)],
        "ratio": round(statistics.median(ratios), 3), "lowest": round(min(ratios), 3), "highest": round(max(ratios), 3),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
