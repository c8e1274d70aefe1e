"""`dgemma quantize` and what it writes: loads packed and strictly, runs everywhere, is refused where it must be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import text_kit
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgemma import kernels
from dgemma.api import LLM
from dgemma.checkpoint import hf_name, load_checkpoint, save_checkpoint
from dgemma.checkpoint.quantize import quantize_checkpoint
from dgemma.cli import main
from dgemma.errors import CheckpointError, ConfigError
from dgemma.eval.documents import Document
from dgemma.eval.quantisation import compare
from dgemma.model.layers import Linear
from dgemma.model.moe import Experts
from dgemma.quant import FORMATS, make_format
from dgemma.quant.sites import weight_sites
from dgemma.train.recipe import ModelSection
from dgemma.train.run import build_model

NAMES = tuple(FORMATS)
Capture = pytest.CaptureFixture[str]
WEIGHTS, CONFIG = "model.safetensors", "config.json"
LAYER = (
    "attention.q_proj.weight", "attention.k_proj.weight", "attention.o_proj.weight", "mlp.gate_proj.weight",
    "mlp.up_proj.weight", "mlp.down_proj.weight", "experts.gate_up_proj", "experts.down_proj",
)  # fmt: skip
SITES = {
    *(f"layers.{layer}.{name}" for layer in (0, 1) for name in LAYER),
    "layers.0.attention.v_proj.weight",
    *(f"self_conditioning.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_kit.save_model(tmp_path_factory.mktemp("quant") / "tiny")


@pytest.fixture(scope="module")
def folders(source: Path) -> dict[str, Path]:
    made = {name: source.parent / name for name in NAMES}
    for name, folder in made.items():
        quantize_checkpoint(source, folder, make_format(name))
    return made


def matrices(module: torch.nn.Module, leaf: str) -> list[Any]:
    if isinstance(module, Experts):
        assert module.matrices is not None
        return list(module.matrices[leaf == "down_proj"])
    assert isinstance(module, Linear)
    return [module.matrix]


def test_the_head_may_be_quantised_too(source: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """The file holds the same tensors; logits are products with codes, in a pass and in the vocabulary op alike."""
    quantize_checkpoint(source, tmp_path / "head", make_format("int8dyn", head=True))
    plain, loaded = load_checkpoint(folders["int8dyn"]), load_checkpoint(tmp_path / "head")
    assert loaded.format == make_format("int8dyn", head=True) != plain.format
    assert (tmp_path / "head" / WEIGHTS).read_bytes() == (folders["int8dyn"] / WEIGHTS).read_bytes()
    hidden = torch.randn(3, loaded.config.hidden_size, dtype=loaded.model.embed.weight.dtype)
    kind = make_format("int8dyn")
    embed = loaded.model.embed.weight
    want = kind.matrix(kind.quantize(embed), (embed.shape[0], embed.shape[1]))(hidden).float()
    cap = loaded.config.softcap
    assert torch.allclose(loaded.model.logits(hidden), torch.tanh(want / cap) * cap, atol=1e-6)
    assert not torch.allclose(loaded.model.logits(hidden), plain.model.logits(hidden), atol=1e-6)
    runner = LLM(loaded).engine.runner
    uniforms = torch.full((3, 1), 0.5, dtype=torch.float64)
    stats = kernels.vocab(hidden, runner._head, cap, torch.ones(3), uniforms)
    assert torch.allclose(stats.top_logprob, loaded.model.logits(hidden).log_softmax(-1).amax(-1), atol=1e-4)
    with pytest.raises(ConfigError, match="head"):
        make_format("int8wo", head=True)


# -- what is written and loaded -------------------------------------------------------------


def test_the_rule_of_what_is_quantised(source: Path) -> None:
    """Not the embedding (which is the head), routers, norms and scalars."""
    assert set(weight_sites(load_checkpoint(source).model)) == SITES


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_weight_is_the_format_of_the_plain_one(name: str, source: Path, folders: dict[str, Path]) -> None:
    plain, loaded = load_checkpoint(source).model, load_checkpoint(folders[name])
    assert loaded.format == make_format(name)
    state = plain.state_dict()
    for site in SITES:
        module, _, leaf = site.rpartition(".")
        found = matrices(loaded.model.get_submodule(module), leaf)
        weight = state[site] if state[site].dim() == 3 else state[site][None]
        assert len(found) == len(weight)
        for matrix, one in zip(found, weight, strict=True):
            want = make_format(name).matrix(make_format(name).quantize(one), (one.shape[0], one.shape[1]))
            assert torch.equal(matrix.dense(), want.dense()), site
    rest = loaded.model.state_dict()
    assert set(rest) == set(state) - SITES
    assert all(torch.equal(rest[key], state[key]) and rest[key].dtype is state[key].dtype for key in rest)


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_is_complete(name: str, source: Path, folders: dict[str, Path]) -> None:
    folder = folders[name]
    wanted = {CONFIG, "generation_config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == wanted | {"chat_template.jinja"}
    for file in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((folder / file).read_text()) == json.loads((source / file).read_text())
    config, before = (json.loads((one / CONFIG).read_text()) for one in (folder, source))
    assert config.pop("quantization_config")["format"] == name
    assert config == before
    # Tensors of parts that are not built travel along.
    kept = [key for key in load_file(source / WEIGHTS) if "vision" in key]
    assert kept and set(kept) <= set(load_file(folder / WEIGHTS))


@pytest.mark.parametrize("limit", [1, 9_000])
def test_shards_hold_the_same_tensors(limit: int, source: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    done = quantize_checkpoint(source, tmp_path / "q", make_format("int4wo"), max_shard_bytes=limit)
    shards = sorted((tmp_path / "q").glob("model-*.safetensors"))
    whole, split = load_file(folders["int4wo"] / WEIGHTS), {}
    for shard in shards:
        split |= load_file(shard)
    assert len(shards) > 2 and done.bytes_after == sum(path.stat().st_size for path in shards)
    assert set(split) == set(whole) and all(torch.equal(split[key], whole[key]) for key in whole)
    load_checkpoint(tmp_path / "q")


def test_progress_ends_at_the_total(source: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    quantize_checkpoint(
        source, tmp_path / "q", make_format("int8wo"), advance=lambda done, total: told.append((done, total))
    )
    assert told == sorted(told) and told[-1][0] == told[-1][1] > 0 and len(told) > len(SITES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_it_generates_and_scores(name: str, dtype: str, folders: dict[str, Path]) -> None:
    llm = LLM.load(folders[name], dtype=dtype)
    prompts = ["Once upon", "a b", "The river"]
    together = llm.generate(prompts, seed=3, max_new_tokens=20)
    alone = [llm.generate(prompt, seed=3, max_new_tokens=20) for prompt in prompts]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert llm.score("there was a girl", prompt="Once").total < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_the_type_of_the_rest(dtype: torch.dtype, folders: dict[str, Path]) -> None:
    model = load_checkpoint(folders["int8wo"], dtype=dtype).model
    assert {weight.dtype for weight in model.parameters()} == {dtype}


def test_a_dtype_may_be_chosen_when_quantising(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "q", make_format("int4wo"), dtype=torch.bfloat16)
    assert load_checkpoint(tmp_path / "q").model.embed.weight.dtype is torch.bfloat16
    assert json.loads((tmp_path / "q" / CONFIG).read_text())["dtype"] == "bfloat16"


# -- the report -----------------------------------------------------------------------------


def document(vocab: int, length: int = 50) -> Document:
    drawn = np.random.default_rng(0).integers(7, vocab, length)
    return Document(drawn, np.ones(length, dtype=np.int64))


def test_a_model_does_not_differ_from_itself(source: Path) -> None:
    model = load_checkpoint(source).model
    for one in compare(model, model, [document(model.config.vocab_size)]):
        assert (one.kl, one.argmax_agreement, one.entropy_difference) == (0.0, 1.0, 0.0)
        assert one.bits_per_byte_original == one.bits_per_byte_quantised > 0


def test_the_report_tells_formats_apart(source: Path, folders: dict[str, Path]) -> None:
    model = load_checkpoint(source).model
    text = [document(model.config.vocab_size)]
    reports = {name: compare(model, load_checkpoint(folders[name]).model, text) for name in NAMES}
    for which, positions in ((0, 49), (1, 4 * 49)):
        assert 0 < reports["int8wo"][which].kl < 0.3 * reports["int4wo"][which].kl
        assert all(report[which].tokens == positions for report in reports.values())


def test_encode_bits_are_the_score(source: Path) -> None:
    """The same bits per byte as `LLM.score` gives (within one window, all of whose context it sees)."""
    llm, text = LLM.load(source, dtype="float32"), "Once upon a time there"
    ids = np.array(llm.encode_prompt(text), dtype=np.int64)
    sizes = np.full(len(ids), len(text.encode()) / (len(ids) - 1))
    model = load_checkpoint(source, dtype=torch.float32).model
    (encode, _) = compare(model, model, [Document(ids, sizes)])
    assert encode.bits_per_byte_original == pytest.approx(llm.score(text).bits_per_byte, rel=1e-4)


# -- the command ----------------------------------------------------------------------------


def test_the_command_reports_as_json(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "q"
    text.write_text("Once upon a time there was a little girl.")
    arguments = ["quantize", str(source), str(out), "--format", "int4wo", "--group", "32"]
    assert main([*arguments, "--report", "--text", str(text), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["format"], facts["group"], facts["quantised_weights"]) == ("int4wo", 32, len(SITES))
    assert facts["bytes_after"] == (out / WEIGHTS).stat().st_size < facts["bytes_before"]
    assert [one["text"] for one in facts["report"]] == ["encode", "denoise"] and facts["report"][0]["kl"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_info_tells_the_format(name: str, source: Path, folders: dict[str, Path], capsys: Capture) -> None:
    """Its bytes are those of the tensors in the file; a plain checkpoint has none of it."""
    assert main(["info", str(folders[name]), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["weights"]
    packs = {f"{hf_name(site)}.{part}" for site in SITES for part in make_format(name).layout((64, 64))}
    stored = {key: tensor.nbytes for key, tensor in load_file(folders[name] / WEIGHTS).items()}
    packed = sum(size for key, size in stored.items() if key in packs)
    assert (told["format"], told["group"]) == (name, make_format(name).group)
    assert (told["quantised_weights"], told["quantised_bytes"]) == (len(SITES), packed)
    assert told["plain_bytes"] == sum(stored.values()) - packed
    assert main(["info", str(folders[name])]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert f" format {name} group {make_format(name).group or 'a row'} quantised weights {len(SITES)} " in words
    assert main(["info", str(source), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)["weights"]
    assert plain["format"] == "plain" and "group" not in plain


def test_the_command_in_a_pipe(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(source), str(tmp_path / "q"), "--format", "int8dyn", "--report"]) == 0
    summary, blank, head, *rows = capsys.readouterr().out.splitlines()
    assert "int8dyn" in summary and f"{len(SITES)} weights" in summary and blank == ""
    assert "argmax" in head and [row.split()[0] for row in rows] == ["encode", "denoise"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--format", "int3"), "unknown weight format 'int3'; known: int8wo, int4wo, int8dyn, fp8"),
        (("--format", "int4wo", "--group", "7"), "got 7"),
        (("--format", "int8wo", "--dtype", "float16"), "float32 or bfloat16, got 'float16'"),
        (("--format", "int8wo", "--text", "x"), "--report"),
        (("--format", "int8wo", "--report", "--text", "/nowhere/x"), "/nowhere/x"),
    ],
)
def test_wrong_arguments_write_nothing(
    arguments: tuple[str, ...], words: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(source), str(tmp_path / "q"), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


# -- refusals -------------------------------------------------------------------------------


def test_quantising_twice_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"quantised already \(int8wo\)"):
        quantize_checkpoint(folders["int8wo"], tmp_path / "q", make_format("int4wo"))


def test_a_folder_in_use_is_kept(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    for place in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(CheckpointError, match="not an empty folder"):
            quantize_checkpoint(source, place, make_format("int4wo"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_weights_that_are_not_finite_leave_no_folder(source: Path, tmp_path: Path) -> None:
    broken = text_kit.save_model(tmp_path / "broken")
    name = hf_name("layers.1.mlp.up_proj.weight")
    edit(broken, lambda tensors: tensors[name].view(-1)[5:6].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=name):
        quantize_checkpoint(broken, tmp_path / "q", make_format("int8wo"))
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_types_of_activations_are_refused(dtype: str, folders: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=f"float32 or bfloat16, not in {dtype}"):
        LLM.load(folders["int8wo"], dtype=dtype)


def test_a_quantised_model_is_not_saved(folders: dict[str, Path], tmp_path: Path) -> None:
    loaded = load_checkpoint(folders["int8wo"])
    with pytest.raises(CheckpointError, match=r"layers\.0\.attention\.q_proj is quantised"):
        save_checkpoint(tmp_path / "x", loaded.model, loaded.generation)
    assert not (tmp_path / "x").exists()


def test_a_quantised_model_is_not_trained(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"quantised \(int4wo\)"):
        build_model(ModelSection(init=str(folders["int4wo"])), seed=0)


def test_transformers_refuses_it(folders: dict[str, Path]) -> None:
    from transformers import DiffusionGemmaForBlockDiffusion

    with pytest.raises(ValueError, match="quant_method"):
        DiffusionGemmaForBlockDiffusion.from_pretrained(folders["int8wo"])


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def resection(folder: Path, section: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"quantization_config": section}))


UP = hf_name("layers.0.mlp.up_proj.weight")
STACK = hf_name("layers.0.experts.down_proj")
FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "part missing": (lambda t: t.pop(f"{UP}.scale"), "up_proj.weight' is stored as codes"),
    "part unknown": (lambda t: t.update({f"{UP}.zero": t[f"{UP}.scale"].clone()}), "has the parts codes, scale"),
    "codes of another type": (lambda t: t.update({f"{UP}.codes": t[f"{UP}.codes"].view(torch.uint8)}), "torch.int8"),
    "codes cut": (lambda t: t.update({f"{UP}.codes": t[f"{UP}.codes"][:, :8].clone()}), "asks for torch.int8"),
    "weight missing": (lambda t: [t.pop(f"{UP}.{part}") for part in ("codes", "scale")], f"{UP}' missing"),
    "half of the experts": (
        lambda t: [t.pop(f"{STACK}.{part}") for part in ("codes", "scale")] and t.update(
            {STACK: torch.zeros(4, 32, 16)}
        ),
        "only one is quantised",
    ),
    "bare codes": (lambda t: t.update({hf_name("norm.weight"): torch.zeros(32, dtype=torch.int8)}), "stored as I8"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_files_are_named(fault: str, source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "q", make_format("int8wo"))
    change, words = FAULTS[fault]
    edit(tmp_path / "q", change)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "q")
    assert words in str(caught.value)


def test_one_plain_matrix_among_quantised_ones_loads(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "q", make_format("int8wo"))
    plain = load_file(source / WEIGHTS)[UP]
    edit(tmp_path / "q", lambda t: [t.pop(f"{UP}.{part}") for part in ("codes", "scale")] and t.update({UP: plain}))
    assert torch.equal(load_checkpoint(tmp_path / "q").model.get_submodule("layers.0.mlp.up_proj").weight, plain)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised by 'gptq'"),
        ({"made_by": "dgemma", "format": "int9"}, "unknown weight format 'int9'"),
        ({"made_by": "dgemma", "format": "int4wo", "group": 5}, "got 5"),
        ("int8", "quantised by 'int8'"),
    ],
)
def test_other_sections_are_refused(section: object, words: str, source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "q", make_format("int8wo"))
    resection(tmp_path / "q", section)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(tmp_path / "q")
