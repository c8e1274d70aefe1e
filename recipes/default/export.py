"""Turn a training state into the checkpoint folder that dgemma and `transformers` load.

python recipes/default/export.py runs/default/state.pt dgemma/models/default
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from shape import generation_config, model_config

from dgemma.checkpoint.save import save_checkpoint
from dgemma.train.init import new_model

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("state", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=Path("build/default/tokenizer"))
    args = parser.parse_args()
    masters = torch.load(args.state, weights_only=True)["optimizer"]["masters"]
    model = new_model(model_config(), seed=0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(masters[name])
    files = {name: (args.tokenizer / name).read_bytes() for name in TOKENIZER_FILES}
    save_checkpoint(args.folder, model.bfloat16(), generation_config(), extra_files=files)
    print(f"{args.folder}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
