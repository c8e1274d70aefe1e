"""What a checkpoint is: shape, size, generation settings, tokenizer, card, files. Reads no weights."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgemma.cli.arguments import settings_of
from dgemma.cli.output import write, write_json
from dgemma.config import GenerationConfig, ModelConfig
from dgemma.errors import CheckpointError

if TYPE_CHECKING:
    from dgemma.checkpoint.files import Entry
    from dgemma.quant import WeightFormat

NAME = "info"
HELP = "what a model is: shape, size, settings, files"
_CARD_LINES = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default=argparse.SUPPRESS, help="a shipped name, a folder or a hub id (default)"
    )
    parser.add_argument("--plan", action="store_true", help="bytes on a GPU by weight format, and which cards hold it")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(arguments: argparse.Namespace) -> int:
    facts = describe(settings_of(arguments).model, plan=arguments.plan)
    if arguments.json:
        write_json(facts)
    elif sys.stdout.isatty():
        _show(facts)
    else:
        for title, rows in _sections(facts):
            write(f"{title}\n" + "".join(f"  {name:<24} {value}".rstrip() + "\n" for name, value in rows))
    return 0


def describe(model: str, plan: bool = False) -> dict[str, Any]:
    """Everything `info` knows of a checkpoint, as JSON has it."""
    from dgemma.checkpoint.files import CONFIG, GENERATION, find_folder, read_json

    folder, name = find_folder(model, weights=False)
    config = ModelConfig.from_hf(read_json(folder / CONFIG))
    path = folder / GENERATION
    generation = GenerationConfig.from_hf(read_json(path) if path.is_file() else {}, config)
    facts = {
        "name": name,
        "folder": str(folder),
        "shape": _shape(config),
        "parameters": _parameters(config),
        "weights": _weights(folder, config),
        "generation": _generation(generation, config),
        "tokenizer": _tokenizer(folder),
        "card": _card(folder / "README.md"),
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()},
    }
    if plan:
        from dgemma.bench.plan import memory_plan

        facts["plan"] = memory_plan(config).json()
    return facts


def _shape(config: ModelConfig) -> dict[str, Any]:
    kinds = {kind: [layer for layer in config.layers if layer.kind == kind] for kind in ("sliding", "full")}
    shape: dict[str, Any] = {
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.num_heads,
    }
    for kind, layers in kinds.items():
        if layers:
            first = layers[0]
            shape[f"{kind}_layers"] = f"{len(layers)} (KV heads {first.num_kv_heads}, head width {first.head_dim})"
    if kinds["sliding"]:
        shape["sliding_window"] = config.sliding_window
    if config.num_experts:
        shape["experts"] = f"{config.num_experts} (active {config.top_k_experts}, width {config.expert_size})"
    else:
        shape["experts"] = "none (dense)"
    shape |= {
        "vocabulary": config.vocab_size,
        "canvas_length": config.canvas_length,
        "trained_canvas_widths": ", ".join(map(str, config.canvas_widths)) or "not named",
        "context": config.max_positions,
        "softcap": config.softcap,
    }
    return shape


def _generation(generation: GenerationConfig, config: ModelConfig) -> dict[str, Any]:
    values = asdict(generation) | {"canvas_length": generation.canvas_length or config.canvas_length}
    return {name: value for name, value in values.items() if name != "choice"}


def _parameters(config: ModelConfig) -> dict[str, int]:
    """Counts of the text model. `active` is what one token touches: of the experts, those it is sent to."""
    from dgemma.checkpoint.load import empty_model

    model = empty_model(config)
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    total = sum(sizes.values())
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    idle = experts * (config.num_experts - config.top_k_experts) // max(config.num_experts, 1)
    embedding = sizes["embed.weight"]
    return {
        "total": total,
        "active": total - idle,
        "active_without_embedding": total - idle - embedding,
        "embedding": embedding,
        "experts": experts,
    }


def _weights(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """Of tensors as they are stored; `bytes` are those of the files, headers included."""
    from dgemma.checkpoint.files import CONFIG, read_headers, read_json
    from dgemma.checkpoint.quantized import format_of

    try:
        entries = read_headers(folder)
        weight_format = format_of(read_json(folder / CONFIG), folder)
        packed = {} if weight_format is None else _packed(entries, config, weight_format)
    except CheckpointError as error:
        return {"problem": str(error)}
    types = sorted({str(entry.dtype).removeprefix("torch.") for entry in entries.values()})
    size = sum(path.stat().st_size for path in {entry.file for entry in entries.values()})
    name = "plain" if weight_format is None else weight_format.name
    return {"tensors": len(entries), "dtype": ", ".join(types), "bytes": size, "format": name} | packed


def _packed(entries: Mapping[str, Entry], config: ModelConfig, weight_format: WeightFormat) -> dict[str, Any]:
    """`group` columns share a scale (None: a whole row); what is quantised, and the bytes of it and of the rest."""
    from dgemma.checkpoint.load import empty_model
    from dgemma.checkpoint.names import our_name
    from dgemma.checkpoint.quantized import split_packs

    packs, plain = split_packs(entries, empty_model(config), weight_format, our_name)
    parts = [entry for pack in packs.values() for _, entry in pack.parts.values()]
    return {
        "group": weight_format.group,
        "quantised_weights": len(packs),
        "quantised_bytes": sum(map(_nbytes, parts)),
        "plain_bytes": sum(map(_nbytes, plain.values())),
    }


def _nbytes(entry: Entry) -> int:
    return entry.dtype.itemsize * math.prod(entry.shape)


def _tokenizer(folder: Path) -> dict[str, Any]:
    from dgemma.text.chat import ChatTemplate
    from dgemma.text.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.load(folder)
        template = ChatTemplate.load(folder)
    except CheckpointError as error:
        return {"problem": str(error)}
    return {
        "vocabulary": tokenizer.vocab_size,
        "special_tokens": len(tokenizer.special_ids),
        "bos": tokenizer.bos,
        "chat_template": template is not None,
    }


def _card(path: Path) -> str:
    """The beginning of the model card: its first heading and what follows, without the YAML header."""
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL).strip()
    lines = text.splitlines()
    nearest = next((i for i, line in enumerate(lines) if i and line.startswith("#")), len(lines))
    return "\n".join(lines[: min(nearest, _CARD_LINES)]).strip()


def _sections(facts: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    files = [(name, human_bytes(size)) for name, size in facts["files"].items()]
    weights = {name: human_bytes(v) if name.endswith("bytes") else v for name, v in facts["weights"].items()}
    if "group" in weights:
        weights["group"] = weights["group"] or "a row"
    parameters = {name: f"{value:,} ({human_count(value)})" for name, value in facts["parameters"].items()}
    sections = [
        (f"{facts['name']} ({facts['folder']})", [(line, "") for line in facts["card"].splitlines()]),
        ("shape", _rows(facts["shape"])),
        ("parameters", _rows(parameters)),
        ("weights", _rows(weights)),
        ("generation", _rows(facts["generation"])),
        ("tokenizer", _rows(facts["tokenizer"])),
        ("files", files),
        *(_plan_sections(facts["plan"]) if "plan" in facts else []),
    ]
    return [(title, rows) for title, rows in sections if rows or title.startswith(facts["name"])]


def _plan_sections(plan: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    sizes = {f"weights, {name}": size for name, size in plan["weights"].items()}
    sizes |= {
        "KV, sliding layers": plan["ring"],
        "KV, 1,000 tokens": plan["kv_per_1000"],
        "copy of a layer's, 1,000": plan["copy_per_1000"],
        "KV, sliding layers, fp8": plan["ring_fp8"],
        "KV, 1,000 tokens, fp8": plan["kv_per_1000_fp8"],
        "copy, 1,000, fp8": plan["copy_per_1000_fp8"],
        "workspace": sum(plan["workspace"].values()),
        "reserve (assumed)": plan["reserve"],
    }
    fits = [(f"{fit['card_gib']} GiB, {fit['format']}", _reach(fit)) for fit in plan["fits"]]
    title = "memory plan (one request, keys and values (KV) in bfloat16 or fp8; computed, not measured)"
    return [(title, [(name, human_bytes(size)) for name, size in sizes.items()]), ("cards", fits)]


def _reach(fit: Mapping[str, Any]) -> str:
    if not fit["fits"]:
        return "no"
    more = "" if fit["context_fp8"] == fit["context"] else f" (KV in fp8: {fit['context_fp8']:,})"
    return f"fits, up to {fit['context']:,} tokens{more}"


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), _word(value)) for name, value in values.items()]


def _word(value: Any) -> str:
    match value:
        case True | False:
            return "yes" if value else "no"
        case None:
            return "none"
        case int():
            return f"{value:,}"
        case tuple() | list():
            return ", ".join(map(str, value)) or "none"
    return str(value)


def _show(facts: Mapping[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from dgemma.cli.terminal import console, plain, printable

    screen = console()

    def line(text: str, style: str = "") -> Text:
        return Text(plain(screen, printable(text)), style)

    (title, card), *sections = _sections(facts)
    screen.print(line(title, "bold"), soft_wrap=True)
    for text, _ in card:
        screen.print(line(text))
    for title, rows in sections:
        table = Table(box=None, show_header=False, padding=(0, 2))
        table.add_column(style="dim", min_width=24)
        table.add_column()
        for name, value in rows:
            table.add_row(line(name), line(value))
        screen.print()
        screen.print(line(title, "bold"))
        screen.print(table)


def human_bytes(size: float) -> str:
    """`12.3 MB`, in powers of ten."""
    return _human(size, ("B", "kB", "MB", "GB", "TB"))


def human_count(count: float) -> str:
    """`25.3 G`, in powers of ten."""
    return _human(count, ("", "k", "M", "G", "T")).strip()


def _human(value: float, units: tuple[str, ...]) -> str:
    index = 0
    while value >= 999.5 and index < len(units) - 1:
        value, index = value / 1000, index + 1
    return f"{value:.{min(index, 1)}f} {units[index]}"
