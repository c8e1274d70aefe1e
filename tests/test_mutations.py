"""Plant each single mistake of the specification's table and see the parity check fail.

A test suite that passes with a wrong model proves nothing; this is the suite's own test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hf import Peer, Shape, hf_model, our_model
from naive import NaiveCache, denoise, encode
from torch import Tensor

from dgemma import kernels
from dgemma.config import LayerKind
from dgemma.kernels import reference
from dgemma.model import Attend, DiffusionGemma
from dgemma.model.attention import Attention
from dgemma.model.backbone import SelfConditioning
from dgemma.model.block import Block
from dgemma.model.layers import RMSNorm

SHAPE = Shape(layers="ssfsf", window=8, canvas=16, experts=8, top_k=3)
TEMPERATURE = 0.6
LIMIT = 1e-4
Patch = pytest.MonkeyPatch


class Reference:
    """The peer's answers to one fixed scenario: prompt of five windows, no signal, then a tempered signal."""

    def __init__(self) -> None:
        self.model = hf_model(SHAPE, seed=3)
        generator = torch.Generator().manual_seed(3)
        self.prompt = torch.randint(0, SHAPE.vocab, (40,), generator=generator)
        self.canvas = torch.randint(0, SHAPE.vocab, (SHAPE.canvas,), generator=generator)
        with torch.no_grad():
            peer = Peer(self.model)
            self.encoded = peer.head(peer.encode([self.prompt])[0])
            self.first = peer.denoise(self.canvas[None])[0]
            self.second = peer.denoise(self.canvas[None], self.first[None] / TEMPERATURE)[0]

    @torch.no_grad()
    def differences(
        self, cache: type[NaiveCache] = NaiveCache, temperature: float = TEMPERATURE
    ) -> tuple[float, float, float]:
        """Largest |difference| of our logits: encode, first step, step with a signal."""
        ours = our_model(self.model)
        memory = cache(ours.config)
        signal = ours.soft_embedding(self.first / temperature)
        logits = (
            ours.logits(encode(ours, memory, self.prompt)),
            ours.logits(denoise(ours, memory, self.canvas)),
            ours.logits(denoise(ours, memory, self.canvas, signal)),
        )
        wanted = (self.encoded, self.first, self.second)
        found = [(a - b).abs().max().item() for a, b in zip(logits, wanted, strict=True)]
        return found[0], found[1], found[2]


@pytest.fixture(scope="module")
def peer() -> Reference:
    return Reference()


def test_the_unharmed_model_passes(peer: Reference) -> None:
    assert max(peer.differences()) < LIMIT
    assert min(x.std().item() for x in (peer.encoded, peer.first, peer.second)) >= 1


# -- mistakes in the network ---------------------------------------------------------


def one_plus_weight(patch: Patch) -> None:
    patch.setattr(RMSNorm, "forward", lambda self, x: kernels.rms_norm(x, self.weight + 1, self.eps))


def scores_over_root_d(patch: Patch) -> None:
    attention = kernels.attention
    patch.setattr(kernels, "attention", lambda q, *rest: attention(q / math.sqrt(q.shape[-1]), *rest))


def attention_with(value: Callable[[Attention, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """`Attention.forward` with another V, made from the raw K projection and the raw V."""

    def forward(self: Attention, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q, raw = self._heads(self.q_proj(x)), self._heads(self.k_proj(x))
        v = raw if self.v_proj is None else self._heads(self.v_proj(x))
        q = kernels.rope(self.q_norm(q), cos, sin)
        k = kernels.rope(self.k_norm(raw), cos, sin)
        return self.o_proj(attend(self.index, q, k, value(self, raw, v)).flatten(-2))

    return forward


def v_from_normed_k(patch: Patch) -> None:
    def value(self: Attention, raw: Tensor, v: Tensor) -> Tensor:
        return kernels.rms_norm(self.k_norm(raw) if self.v_proj is None else v, None, self.eps)

    patch.setattr(Attention, "forward", attention_with(value))


def no_v_norm(patch: Patch) -> None:
    patch.setattr(Attention, "forward", attention_with(lambda self, raw, v: v))


def exponent_over_rotated_width(patch: Patch) -> None:
    def frequencies(head_dim: int, theta: float, partial: float, factor: float) -> Tensor:
        live = int(partial * head_dim // 2)
        turning = 1.0 / theta ** (torch.arange(0, 2 * live, 2).float() / (2 * live))
        return torch.cat([turning, torch.zeros(head_dim // 2 - live)]) / factor

    patch.setattr(kernels, "rope_frequencies", frequencies)


def router_on_normed_input(patch: Patch) -> None:
    def feed_forward(self: Block, x: Tensor) -> Tensor:
        normed = self.pre_experts_norm(x)
        mixed = self.experts(normed, *self.router(normed))
        return self.post_mlp_norm(self.mlp(self.pre_mlp_norm(x))) + self.post_experts_norm(mixed)

    patch.setattr(Block, "_feed_forward", feed_forward)


def route_with(**wrong: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def route(x: Tensor, proj: Tensor, scale: Tensor, own: Tensor, top_k: int, eps: float) -> Any:
        root = 1.0 if wrong.get("no_root") else x.shape[-1] ** -0.5
        scores = reference.rms_norm(x, None, eps) * scale * root
        weights, ids = torch.softmax(scores @ proj.t(), dim=-1).topk(top_k)
        if not wrong.get("no_renormalisation"):
            weights = weights / weights.sum(-1, keepdim=True)
        return (weights if wrong.get("no_expert_scale") else weights * own[ids]), ids

    return route


def router_without_root(patch: Patch) -> None:
    patch.setattr(kernels, "route", route_with(no_root=True))


def no_expert_scale(patch: Patch) -> None:
    patch.setattr(kernels, "route", route_with(no_expert_scale=True))


def up_rows_first(patch: Patch) -> None:
    experts = kernels.experts

    def swapped(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return experts(x, weights, ids, gate_up.roll(gate_up.shape[1] // 2, dims=1), down)

    patch.setattr(kernels, "experts", swapped)


def silu(patch: Patch) -> None:
    patch.setattr(kernels, "gelu", torch.nn.functional.silu)
    patch.setattr(reference, "gelu", torch.nn.functional.silu)


def decoder_scalars_in_the_encoder(patch: Patch) -> None:
    def encode_wrong(self: DiffusionGemma, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        return self._stack(self.embed(ids), positions, attend, "decoder_scalar")

    patch.setattr(DiffusionGemma, "encode", encode_wrong)


def scalar_on_the_branch_only(patch: Patch) -> None:
    def forward(self: Block, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, scalar: Tensor) -> Tensor:
        x = x + self.post_attention_norm(self.attention(self.input_norm(x), cos, sin, attend))
        return x + self.post_norm(self._feed_forward(x)) * scalar

    patch.setattr(Block, "forward", forward)


def module_skipped_without_signal(patch: Patch) -> None:
    forward = SelfConditioning.forward

    def lazy(self: SelfConditioning, embedded: Tensor, soft: Tensor | None) -> Tensor:
        return embedded if soft is None else forward(self, embedded, soft)

    patch.setattr(SelfConditioning, "forward", lazy)


def logits_without_softcap(patch: Patch) -> None:
    patch.setattr(kernels, "softcap", lambda logits, cap: logits.float())


def branches_crossed(patch: Patch) -> None:
    def feed_forward(self: Block, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        mixed = self.experts(self.pre_experts_norm(flat), *self.router(flat))
        return self.post_experts_norm(self.mlp(self.pre_mlp_norm(x))) + self.post_mlp_norm(mixed)

    patch.setattr(Block, "_feed_forward", feed_forward)


NETWORK = [
    one_plus_weight,
    scores_over_root_d,
    v_from_normed_k,
    no_v_norm,
    exponent_over_rotated_width,
    router_on_normed_input,
    router_without_root,
    no_expert_scale,
    up_rows_first,
    silu,
    decoder_scalars_in_the_encoder,
    scalar_on_the_branch_only,
    module_skipped_without_signal,
    logits_without_softcap,
    branches_crossed,
]


@pytest.mark.parametrize("mistake", NETWORK, ids=lambda mistake: mistake.__name__)
def test_a_mistake_in_the_network_is_caught(
    mistake: Callable[[Patch], None], peer: Reference, monkeypatch: Patch
) -> None:
    mistake(monkeypatch)
    encoded, first, second = peer.differences()
    print(f"{mistake.__name__}: encode {encoded:.2g}, first step {first:.2g}, with signal {second:.2g}")
    assert max(encoded, first, second) > 100 * LIMIT
    assert first > 100 * LIMIT, "every one of these reaches the first denoising step"


def test_the_rewritten_parts_are_right_without_the_mistake(peer: Reference, monkeypatch: Patch) -> None:
    """So that a failure above is due to the mistake and not to the rewriting."""

    def value(self: Attention, raw: Tensor, v: Tensor) -> Tensor:
        return kernels.rms_norm(v, None, self.eps)

    monkeypatch.setattr(kernels, "route", route_with())
    monkeypatch.setattr(Attention, "forward", attention_with(value))
    assert max(peer.differences()) < LIMIT


def test_decoder_mistakes_leave_the_encoder_right(peer: Reference, monkeypatch: Patch) -> None:
    """The parity check tells the halves apart."""
    module_skipped_without_signal(monkeypatch)
    encoded, first, second = peer.differences()
    assert max(encoded, second) < LIMIT < first


def test_a_raw_signal_is_caught(peer: Reference) -> None:
    """The next step reads the tempered logits, not the raw ones."""
    encoded, first, second = peer.differences(temperature=1.0)
    assert max(encoded, first) < LIMIT
    assert second > 100 * LIMIT


# -- mistakes in the masks -----------------------------------------------------------


class PerQueryWindow(NaiveCache):
    def canvas_mask(self, kind: LayerKind, query: Tensor, key: Tensor, prefix: int) -> Tensor | None:
        near = (query - key).abs() < self.config.sliding_window
        return None if kind == "full" else near


class PerQueryWindowOnThePrefix(NaiveCache):
    def canvas_mask(self, kind: LayerKind, query: Tensor, key: Tensor, prefix: int) -> Tensor | None:
        near = (key >= prefix) | (key > query - self.config.sliding_window)
        return None if kind == "full" else near


class CausalCanvas(NaiveCache):
    def canvas_mask(self, kind: LayerKind, query: Tensor, key: Tensor, prefix: int) -> Tensor | None:
        return key <= query


class OneTokenMore(NaiveCache):
    def prefix_start(self, kind: LayerKind, length: int) -> int:
        return max(0, super().prefix_start(kind, length) - 1)


class OneTokenLess(NaiveCache):
    def prefix_start(self, kind: LayerKind, length: int) -> int:
        return super().prefix_start(kind, length) + (kind == "sliding")


class NoCanvasWindow(NaiveCache):
    def prefix_start(self, kind: LayerKind, length: int) -> int:
        return 0


class NoPrefix(NaiveCache):
    def prefix_start(self, kind: LayerKind, length: int) -> int:
        return length


class EncoderOneTokenMore(NaiveCache):
    def sees(self, kind: LayerKind, query: Tensor, key: Tensor) -> Tensor:
        near = key >= query - self.config.sliding_window
        return (key <= query) & (near | (torch.tensor(kind == "full")))


class EncoderOneTokenLess(NaiveCache):
    def sees(self, kind: LayerKind, query: Tensor, key: Tensor) -> Tensor:
        near = key > query - self.config.sliding_window + 1
        return (key <= query) & (near | (torch.tensor(kind == "full")))


class EncoderWithoutWindow(NaiveCache):
    def sees(self, kind: LayerKind, query: Tensor, key: Tensor) -> Tensor:
        return key <= query


class EncoderNotCausal(NaiveCache):
    def sees(self, kind: LayerKind, query: Tensor, key: Tensor) -> Tensor:
        return torch.ones_like(key <= query)


CANVAS_MASKS = [
    PerQueryWindow,
    PerQueryWindowOnThePrefix,
    CausalCanvas,
    OneTokenMore,
    OneTokenLess,
    NoCanvasWindow,
    NoPrefix,
]
ENCODER_MASKS = [EncoderOneTokenMore, EncoderOneTokenLess, EncoderWithoutWindow, EncoderNotCausal]


@pytest.mark.parametrize("cache", CANVAS_MASKS)
def test_a_wrong_canvas_mask_is_caught(cache: type[NaiveCache], peer: Reference) -> None:
    encoded, first, second = peer.differences(cache)
    print(f"{cache.__name__}: first step {first:.2g}, with signal {second:.2g}")
    assert encoded < LIMIT
    assert min(first, second) > 100 * LIMIT


@pytest.mark.parametrize("cache", ENCODER_MASKS)
def test_a_wrong_encoder_mask_is_caught(cache: type[NaiveCache], peer: Reference) -> None:
    encoded, first, second = peer.differences(cache)
    print(f"{cache.__name__}: encode {encoded:.2g}, first step {first:.2g}")
    assert min(encoded, first, second) > 100 * LIMIT


# -- mistakes that a following norm hides --------------------------------------------


@contextmanager
def signals(model: DiffusionGemma) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    hook = model.self_conditioning.pre_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    yield seen
    hook.remove()


@torch.no_grad()
def test_an_unscaled_signal_is_invisible_in_logits_but_caught_before_the_norm(peer: Reference) -> None:
    ours = our_model(peer.model)
    memory = NaiveCache(ours.config)
    encode(ours, memory, peer.prompt)
    soft = ours.soft_embedding(peer.first / TEMPERATURE)
    with signals(ours) as seen:
        right = ours.logits(denoise(ours, memory, peer.canvas, soft))
        wrong = ours.logits(denoise(ours, memory, peer.canvas, soft / ours.embed.scale))
    assert (right - wrong).abs().max() < 1e-2
    assert torch.allclose(seen[0], soft * SHAPE.hidden**0.5)
    assert not torch.allclose(seen[1], soft * SHAPE.hidden**0.5, rtol=0.1)


def test_missing_renormalisation_is_nearly_invisible_but_caught_in_the_router(peer: Reference) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "route", route_with(no_renormalisation=True))
        assert max(peer.differences()) < 1e-2
    generator = torch.Generator().manual_seed(0)
    x, proj = torch.randn(5, 16, generator=generator), torch.randn(4, 16, generator=generator)
    args = (x, proj, torch.ones(16), torch.ones(4), 2, 1e-6)
    right, wrong = kernels.route(*args)[0], route_with(no_renormalisation=True)(*args)[0]
    assert torch.allclose(right.sum(-1), torch.ones(5), atol=1e-6)
    assert (wrong.sum(-1) < 0.999).any()
