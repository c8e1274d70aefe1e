"""Turn a training state of the Sudoku run into the checkpoint folder that dgemma loads, with its tokenizer.

python recipes/sudoku/export.py runs/sudoku/state/step-00002600 dgemma/models/sudoku
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dgemma.checkpoint.save import save_checkpoint  # noqa: E402
from dgemma.train import state  # noqa: E402
from dgemma.train.recipe import load_recipe  # noqa: E402
from dgemma.train.run import Start, build_model  # noqa: E402
from dgemma.train.sudoku.examples import BLANK, BOS, EOS, PAD  # noqa: E402

SPECIAL = {"<pad>": PAD, "<eos>": EOS, "<bos>": BOS}


def make_tokenizer() -> Tokenizer:
    """One character a token: `.` and the digits. White space is dropped and `0` is another way to write `.`."""
    symbols = {symbol: BLANK + digit for digit, symbol in enumerate(".123456789")}
    tokenizer = Tokenizer(models.BPE(vocab=SPECIAL | symbols, merges=[]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("0", "."), normalizers.Replace(Regex(r"\s+"), "")])
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return tokenizer


def tokenizer_files() -> dict[str, bytes]:
    """File name -> content, as Hugging Face lays a tokenizer out."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "add_eos_token": False,
        "clean_up_tokenization_spaces": False, "model_max_length": 1024,
        "pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>",
    }  # fmt: skip
    return {
        "tokenizer.json": make_tokenizer().to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }


def weights_of(path: Path, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The float32 weights by name: of a training state (a folder), or of a file that holds them alone."""
    if path.is_dir():
        weights = {name: torch.empty_like(tensor) for name, tensor in like.items()}
        state.load(path, {"masters": weights})
        return weights
    data: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return data["optimizer"]["masters"] if "optimizer" in data else data


def untrained() -> Start:
    """The network and the sampler settings of `recipes/sudoku.yaml`."""
    return build_model(
        load_recipe(ROOT / "recipes/sudoku.yaml", [f"model.tokenizer={ROOT}/dgemma/models/sudoku"]).model, 0
    )


def export(source: Path, folder: Path) -> int:
    """Write `folder` (an existing README.md stays); the number of parameters. Weights are stored in bfloat16."""
    start = untrained()
    named = dict(start.model.named_parameters())
    weights = weights_of(source, named)
    if named.keys() != weights.keys():
        raise SystemExit(f"{source} is of another network: {', '.join(sorted(named.keys() ^ weights.keys()))}")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name])
    save_checkpoint(folder, start.model.eval().bfloat16(), start.generation, extra_files=tokenizer_files())
    return sum(parameter.numel() for parameter in named.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    print(f"{args.folder}: {export(args.source, args.folder):,} parameters")


if __name__ == "__main__":
    main()
