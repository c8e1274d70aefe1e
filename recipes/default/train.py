"""Train the model that dgemma ships as `default`. Needs `build/default` (see build_data.py). Resumes by itself.

python recipes/default/train.py --steps 850        # the shipped run; interrupt and rerun as you like
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# A canvas of logits is a large, short-lived allocation: keep such blocks instead of returning them to the kernel.
_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000", "MALLOC_TOP_PAD_": "1000000000"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/default"))
    parser.add_argument("--out", type=Path, default=Path("runs/default"))
    parser.add_argument("--steps", type=int, default=850)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    import torch
    from shape import EOS, PAD, TURN_END, model_config

    from dgemma.train.data import Mixture, Phase, Source
    from dgemma.train.init import new_model
    from dgemma.train.loop import LoopConfig, train

    torch.set_num_threads(args.threads)
    mixture = Mixture(
        sources=(
            Source.load(args.data / "train_stories.npz", whole=True, end_token=EOS),
            Source.load(args.data / "train_chat.npz", whole=True, end_token=TURN_END),
            Source.load(args.data / "train_prose.npz", whole=False, end_token=EOS),
        ),
        phases=(
            # All widths, much prose; then, once the encoder has learnt the language, narrow canvases of stories.
            Phase(first_step=0, weights=(0.68, 0.14, 0.18), width_weights=(0, 0.2, 0.4, 0.25, 0.15)),
            Phase(first_step=225, weights=(0.78, 0.14, 0.08), width_weights=(0.3, 0.3, 0.25, 0.1, 0.05)),
        ),
        widths=(16, 32, 64, 128, 256),
        tokens=6144,
        max_prefix=32,
        eos=EOS,
        pad=PAD,
        seed=args.seed,
    )
    model = new_model(model_config(), args.seed, torch.bfloat16)
    done = train(model, mixture, LoopConfig(steps=args.steps, seed=args.seed), args.out)
    print("finished" if done else f"interrupted; run again to go on ({args.out})")


if __name__ == "__main__":
    if any(name not in os.environ for name in _MALLOC):
        import sys

        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_MALLOC})
    main()
