"""What the two passes are, shown without the peer's DiffusionGemma.

Encode then denoise is one masked pass; the encoder is Gemma 4; the dense variant is Gemma 4's dense block; and the
mistakes that a following norm hides from every output.
"""

from __future__ import annotations

import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from hf import Peer, Shape, hf_model, our_model, randomise
from naive import NaiveCache, denoise, encode
from torch import Tensor
from transformers import Gemma4ForCausalLM, Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextDecoderLayer

from dgemma import kernels
from dgemma.config import LayerKind, ModelConfig
from dgemma.kernels import reference
from dgemma.model import Attend, DiffusionGemma
from dgemma.model.backbone import SelfConditioning
from dgemma.model.layers import Embedding


def random_ours(shape: Shape, seed: int = 0, **changes: Any) -> DiffusionGemma:
    """Our model with random weights, in float64 so that nothing but structure decides."""
    theirs = hf_model(shape, seed)
    return our_model(theirs, replace(ModelConfig.from_hf(theirs.config.to_dict()), **changes)).double()


# -- encode then denoise is one masked pass ------------------------------------------


def block_mask(window: int, kind: LayerKind, clean: int, start: int, canvas: int) -> Tensor:
    """Over [clean tokens | canvas that follows `clean[:start]`]: true where the row may look.

    Clean rows are causal within their window and never see the canvas. Canvas rows see the whole canvas and the
    clean tokens before `start`: all, or in sliding layers the last window - 1, alike for every row.
    """
    row, column = torch.arange(clean + canvas)[:, None], torch.arange(clean + canvas)[None, :]
    causal = (column <= row) & (column < clean)
    prefix = column < start
    if kind == "sliding":
        causal &= column > row - window
        prefix &= column >= start - (window - 1)
    return torch.where(row < clean, causal, prefix | (column >= clean))


def one_pass(
    model: DiffusionGemma, clean: Tensor, start: int, canvas: Tensor, soft: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both halves at once: two token groups in one `Attend` call per layer, each with its own input and scalar."""
    config, (n, c) = model.config, (len(clean), len(canvas))
    masks = {kind: block_mask(config.sliding_window, kind, n, start, c) for kind in ("sliding", "full")}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.attention(q, k, v, masks[config.layers[layer].kind])

    scaled = None if soft is None else soft * model.embed.scale
    x = torch.cat([model.embed(clean), model.self_conditioning(model.embed(canvas), scaled)])
    positions = torch.cat([torch.arange(n), torch.arange(c) + start])
    # The halves differ by one number per layer: clean rows get the encoder's, canvas rows the decoder's.
    for block in model.layers:
        block.row_scalar = torch.cat([block.encoder_scalar.expand(n), block.decoder_scalar.expand(c)])[:, None]
    hidden = model._stack(x, positions, attend, "row_scalar")
    return hidden[:n], hidden[n:]


@pytest.mark.parametrize("signal", [False, True])
@pytest.mark.parametrize("clean, start", [(1, 1), (7, 7), (8, 8), (9, 9), (30, 30), (30, 14), (30, 3), (30, 0)])
@torch.no_grad()
def test_encode_then_denoise_is_one_masked_pass(clean: int, start: int, signal: bool) -> None:
    """With start < clean this is the training layout: the canvas stands at `start` and must not see what follows."""
    shape = Shape(layers="ssfsf", window=8, canvas=12)
    model = random_ours(shape, seed=clean + start)
    assert all(block.encoder_scalar != block.decoder_scalar for block in model.layers)
    generator = torch.Generator().manual_seed(start)
    ids = torch.randint(0, shape.vocab, (clean,), generator=generator)
    canvas = torch.randint(0, shape.vocab, (shape.canvas,), generator=generator)
    soft = torch.randn(shape.canvas, shape.hidden, generator=generator).double() if signal else None

    whole, prefix = NaiveCache(model.config), NaiveCache(model.config)
    encoded = encode(model, whole, ids)
    if start:
        encode(model, prefix, ids[:start])
    denoised = denoise(model, prefix, canvas, soft)
    both = one_pass(model, ids, start, canvas, soft)
    assert (both[0] - encoded).abs().max() < 1e-6
    assert (both[1] - denoised).abs().max() < 1e-6


@torch.no_grad()
def test_encode_in_pieces_is_encode_at_once() -> None:
    model = random_ours(Shape(layers="ssfsf", window=6))
    ids = torch.arange(29) * 11 % 256
    at_once = encode(model, NaiveCache(model.config), ids)
    cache = NaiveCache(model.config)
    pieces = [encode(model, cache, part) for part in ids.split([1, 5, 6, 7, 10])]
    assert (torch.cat(pieces) - at_once).abs().max() < 1e-6


@torch.no_grad()
def test_denoise_leaves_the_cache_alone() -> None:
    model = random_ours(Shape())
    cache = NaiveCache(model.config)
    encode(model, cache, torch.arange(10))
    before = {layer: keys.clone() for layer, keys in cache.keys.items()}
    first = denoise(model, cache, torch.arange(16))
    assert torch.equal(first, denoise(model, cache, torch.arange(16)))
    assert all(torch.equal(before[layer], keys) for layer, keys in cache.keys.items())


# -- the encoder is Gemma 4 ----------------------------------------------------------


def gemma4(shape: Shape, seed: int) -> Gemma4ForCausalLM:
    moe = shape.experts > 0
    text = shape.text() | {
        "num_experts": shape.experts or None,
        "enable_moe_block": moe,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 30.0,
    }
    config = Gemma4TextConfig(**text)
    config._attn_implementation, config._experts_implementation = "sdpa", "eager"
    model = Gemma4ForCausalLM(config).eval().requires_grad_(False)
    # The names differ only by a prefix; `randomise` and the name table know ours.
    rename = {"model." + name: tensor for name, tensor in model.model.state_dict(keep_vars=True).items()}
    holder = Renamed({name.replace("model.", "model.decoder.", 1): t for name, t in rename.items()})
    randomise(holder, seed)
    return model


class Renamed(torch.nn.Module):
    """Tensors under other names, for `randomise` and `our_model`."""

    dtype = torch.float32

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return self.tensors


def from_gemma4(model: Gemma4ForCausalLM, shape: Shape) -> DiffusionGemma:
    theirs = {f"model.decoder.{name}": t for name, t in model.model.state_dict().items()}
    theirs |= {
        f"model.encoder.language_model.{name}": tensor
        for name, tensor in model.model.state_dict().items()
        if name.endswith("layer_scalar")
    }
    config = ModelConfig.from_hf({"model_type": "diffusion_gemma", "text_config": shape.text()})
    size, inner = shape.hidden, shape.dense
    part = "model.decoder.self_conditioning."
    theirs |= {
        part + "pre_norm.weight": torch.ones(size),
        part + "down_proj.weight": torch.zeros(size, inner),
    }
    theirs |= {part + name: torch.zeros(inner, size) for name in ("gate_proj.weight", "up_proj.weight")}
    return our_model(Renamed(theirs), config)


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("prompt", [3, 8, 41])
@torch.no_grad()
def test_encoder_is_gemma_4(experts: int, prompt: int) -> None:
    """Through the tied head: the encoder predicts as `Gemma4ForCausalLM` with the same weights, MoE and dense."""
    shape = Shape(layers="ssfsf", experts=experts, top_k=2)
    theirs = gemma4(shape, seed=prompt)
    ours = from_gemma4(theirs, shape)
    ids = torch.arange(prompt) * 13 % shape.vocab
    expected = theirs(ids[None]).logits[0]
    logits = ours.logits(encode(ours, NaiveCache(ours.config), ids))
    assert expected.std() >= 1
    assert (logits - expected).abs().max() < 1e-4


@torch.no_grad()
def test_dense_variant_is_gemma_4s_dense_block_in_both_halves() -> None:
    """HF cannot build a dense DiffusionGemma, so Gemma 4's own layer code runs in place inside it."""
    shape = Shape(layers="ssfsf")
    theirs = hf_model(shape, 5)
    for half in (theirs.model.encoder.language_model, theirs.model.decoder):
        for layer in half.layers:
            layer.enable_moe_block, layer.hidden_size_per_layer_input = False, 0
            layer.gradient_checkpointing = False
            layer.forward = types.MethodType(Gemma4TextDecoderLayer.forward, layer)
    config = replace(ModelConfig.from_hf(theirs.config.to_dict()), num_experts=0, top_k_experts=0, expert_size=0)
    ours = DiffusionGemma(config)
    ours.load_state_dict({k: v for k, v in our_model(theirs).state_dict().items() if k in ours.state_dict()})
    ids, canvas = torch.arange(21) * 5 % 256, torch.arange(16) * 31 % 256
    peer, cache = Peer(theirs), NaiveCache(config)
    expected = peer.head(peer.encode([ids])[0])
    assert (ours.logits(encode(ours, cache, ids)) - expected).abs().max() < 1e-4
    signal = peer.denoise(canvas[None])[0]
    assert signal.std() >= 1
    assert (ours.logits(denoise(ours, cache, canvas)) - signal).abs().max() < 1e-4
    second = peer.denoise(canvas[None], signal[None])[0]
    again = ours.logits(denoise(ours, cache, canvas, ours.soft_embedding(signal)))
    assert (again - second).abs().max() < 1e-4


# -- mistakes hidden behind a following norm -----------------------------------------


def test_router_weights_sum_to_one_before_the_expert_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    x, proj = torch.randn(9, 32, generator=generator), torch.randn(8, 32, generator=generator)
    ones = torch.ones(8)
    weights, ids = reference.route(x, proj, torch.ones(32), ones, 3, 1e-6)
    assert torch.allclose(weights.sum(-1), torch.ones(9), atol=1e-6)
    probs = torch.softmax(reference.rms_norm(x, None, 1e-6) * 32**-0.5 @ proj.t(), -1)
    expected = probs.gather(1, ids) / probs.topk(3).values.sum(-1, keepdim=True)
    assert torch.allclose(weights, expected, atol=1e-6)
    assert torch.equal(ids.sort(-1).values, probs.topk(3).indices.sort(-1).values)


def test_router_scales_each_expert_after_renormalising() -> None:
    generator = torch.Generator().manual_seed(1)
    x, proj = torch.randn(9, 32, generator=generator), torch.randn(8, 32, generator=generator)
    plain, ids = reference.route(x, proj, torch.ones(32), torch.ones(8), 3, 1e-6)
    scale = torch.linspace(0.5, 3.0, 8)
    weights, same = reference.route(x, proj, torch.ones(32), scale, 3, 1e-6)
    assert torch.equal(ids, same)
    assert torch.allclose(weights, plain * scale[ids], atol=1e-6)


@torch.no_grad()
def test_self_conditioning_signal_carries_the_embedding_scale() -> None:
    """`pre_norm` cancels any factor, so catch what enters it."""
    model = our_model(hf_model(Shape()))
    seen: list[Tensor] = []
    hook = model.self_conditioning.pre_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits = torch.randn(16, 256)
    soft = model.soft_embedding(logits)
    denoise(model, NaiveCache(model.config), torch.arange(16), soft)
    hook.remove()
    expected = logits.softmax(-1) @ model.embed.weight
    assert torch.allclose(soft, expected, atol=1e-5)
    assert torch.allclose(seen[0], expected * 64**0.5, atol=1e-4)


@torch.no_grad()
def test_signal_scale_and_renormalisation_show_where_eps_rules() -> None:
    """With tiny embeddings and experts the norms' eps no longer cancels factors; `transformers` still agrees."""
    theirs = hf_model(Shape(), 2)
    for name, tensor in theirs.state_dict(keep_vars=True).items():
        if name == "model.decoder.embed_tokens.weight":
            tensor.mul_(2e-3)
        elif name.startswith("model.decoder.") and name.endswith("experts.down_proj"):
            tensor.mul_(1e-3)
    ours = our_model(theirs)
    # A head of its own, so that logits still spread.
    head = theirs.model.decoder.embed_tokens.weight / 2e-3
    theirs.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    ids, canvas = torch.arange(21) * 5 % 256, torch.arange(16) * 31 % 256
    peer, cache = Peer(theirs), NaiveCache(ours.config)
    peer.encode([ids])
    encode(ours, cache, ids)
    signal = peer.denoise(canvas[None])[0]
    expected = peer.denoise(canvas[None], signal[None])[0]
    soft = ours.soft_embedding(signal)

    def difference(soft: Tensor) -> float:
        hidden = denoise(ours, cache, canvas, soft)
        return (kernels.softcap(hidden @ head.t(), 30.0) - expected).abs().max().item()

    assert difference(soft) < 1e-4
    assert difference(soft / 8) > 1e-2, "a missing sqrt(H) must show here"
    route = reference.route

    def unnormalised(x: Tensor, proj: Tensor, scale: Tensor, own: Tensor, top_k: int, eps: float) -> Any:
        weights, ids = route(x, proj, scale, own, top_k, eps)
        probs = torch.softmax(reference.rms_norm(x, None, eps) * scale * x.shape[-1] ** -0.5 @ proj.t(), -1)
        return probs.gather(1, ids) * own[ids], ids

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "route", unnormalised)
        assert difference(soft) > 1e-3, "a missing renormalisation must show here"


def test_no_signal_is_not_zero_logits() -> None:
    """Zero logits are the mean embedding; no signal is a zero vector, and the closing norm applies to both."""
    model = our_model(hf_model(Shape()))
    canvas, cache = torch.arange(16), NaiveCache(model.config)
    none = denoise(model, cache, canvas)
    zeros = denoise(model, cache, canvas, torch.zeros(16, 64))
    mean = denoise(model, cache, canvas, model.soft_embedding(torch.zeros(16, 256)))
    assert torch.equal(none, zeros)
    assert (none - mean).abs().max() > 0.1
    part: SelfConditioning = model.self_conditioning
    unit = part(model.embed(canvas), None)
    assert torch.allclose(unit.pow(2).mean(-1), torch.ones(16), atol=1e-4)


# -- roundings -----------------------------------------------------------------------


def test_embedding_scale_is_rounded_to_the_weights_type() -> None:
    """sqrt(2816) = 53.0660 is 53.0 in bfloat16 and stays 53.066 in float32."""
    embed = Embedding(3, 2816)
    assert embed.scale.item() == pytest.approx(2816**0.5, rel=1e-7)
    half = Embedding(3, 2816).to(torch.bfloat16)
    assert half.scale.item() == 53.0
    assert torch.equal(half(torch.tensor([1])), half.weight[1:2] * 53.0)


def test_rotation_exponent_runs_over_the_whole_head() -> None:
    live = reference.rope_frequencies(512, 1e6, 0.25, 1.0)
    assert live.shape == (256,)
    expected = torch.tensor([1e6 ** (-2 * i / 512) for i in range(64)])
    assert torch.allclose(live[:64], expected, rtol=1e-5)
    assert not live[64:].any()
    assert torch.allclose(reference.rope_frequencies(512, 1e6, 0.25, 8.0), live / 8)


def test_full_layers_have_no_v_projection_and_pair_halves() -> None:
    model = random_ours(Shape(layers="sf"))
    assert model.layers[0].attention.v_proj is not None
    assert model.layers[1].attention.v_proj is None
    cos, sin = reference.rope_tables(torch.tensor([3]), torch.tensor([0.5, 0.0]), torch.float32)
    turned = reference.rope(torch.tensor([[[1.0, 2.0, 0.0, 5.0]]]), cos, sin)
    expected = torch.tensor([torch.cos(torch.tensor(1.5)), 2.0, torch.sin(torch.tensor(1.5)), 5.0])
    assert torch.allclose(turned[0, 0], expected)


def test_canvas_position_embedding_is_used_only_by_denoise() -> None:
    """Ours; absent from released checkpoints. Zero changes nothing, and the encoder never reads it."""
    config = replace(ModelConfig.from_hf(hf_model(Shape()).config.to_dict()), canvas_positions=16)
    plain = our_model(hf_model(Shape()))
    model = DiffusionGemma(config).requires_grad_(False)
    missing = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["canvas_embed"]
    ids, canvas = torch.arange(9), torch.arange(16)
    caches = [NaiveCache(config) for _ in range(3)]
    base = encode(plain, caches[0], ids), denoise(plain, caches[0], canvas)
    same = encode(model, caches[1], ids), denoise(model, caches[1], canvas)
    assert all(torch.equal(a, b) for a, b in zip(base, same, strict=True))
    model.canvas_embed.normal_()
    encoded, moved = encode(model, caches[2], ids), denoise(model, caches[2], canvas)
    assert torch.equal(encoded, base[0])
    assert (moved - base[1]).abs().max() > 0.1


def test_attend_is_the_only_door_to_other_positions() -> None:
    """With an `Attend` that returns v, every position is a function of its own token alone."""
    model = random_ours(Shape())

    def own(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v.repeat_interleave(q.shape[-2] // v.shape[-2], dim=-2)

    attend: Attend = own
    ids = torch.arange(12)
    together = model.encode(ids, torch.arange(12), attend)
    alone = [model.encode(ids[i : i + 1], torch.tensor([i]), attend) for i in range(12)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)
