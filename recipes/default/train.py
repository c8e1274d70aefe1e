"""Train the model that dgemma ships as `default`. Needs `build/default` (see build_data.py). Resumes by itself.

python recipes/default/train.py --steps 1100        # the shipped run; interrupt and rerun as you like
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# A canvas of logits is a large, short-lived allocation: keep such blocks instead of returning them to the kernel.
_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000", "MALLOC_TOP_PAD_": "1000000000"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("build/default"))
    parser.add_argument("--out", type=Path, default=Path("runs/default"))
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    import torch

    from dgemma.config import LayerConfig, ModelConfig
    from dgemma.train.data import Mixture, Source
    from dgemma.train.init import new_model
    from dgemma.train.loop import LoopConfig, train

    torch.set_num_threads(args.threads)
    sliding = LayerConfig(kind="sliding", num_kv_heads=2, head_dim=64)
    full = LayerConfig(kind="full", num_kv_heads=1, head_dim=128)
    config = ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_heads=4,
        layers=(sliding, sliding, full, sliding, sliding, full),
        num_experts=8,
        top_k_experts=2,
        expert_size=128,
        sliding_window=128,
        canvas_length=256,
        max_positions=2048,
        eos_tokens=(1, 6),
    )
    eos, turn_end = 1, 6
    mixture = Mixture(
        sources=(
            Source.load(args.data / "train_stories.npz", whole=True, end_token=eos),
            Source.load(args.data / "train_chat.npz", whole=True, end_token=turn_end),
            Source.load(args.data / "train_prose.npz", whole=False, end_token=eos),
        ),
        weights=(0.68, 0.14, 0.18),
        widths=(32, 64, 128, 256),
        width_weights=(0.2, 0.4, 0.25, 0.15),
        tokens=6144,
        max_prefix=32,
        eos=eos,
        pad=0,
        seed=args.seed,
    )
    model = new_model(config, args.seed, torch.bfloat16)
    done = train(model, mixture, LoopConfig(steps=args.steps, seed=args.seed), args.out)
    print("finished" if done else f"interrupted; run again to go on ({args.out})")


if __name__ == "__main__":
    if any(name not in os.environ for name in _MALLOC):
        import sys

        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_MALLOC})
    main()
