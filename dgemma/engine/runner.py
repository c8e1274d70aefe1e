"""Forward passes over packed segments, and how many there were. Knows caches and tensors, no requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dgemma import kernels
from dgemma.cache import KVCache
from dgemma.engine.attend import DenoiseAttend, EncodeAttend, SharedAttend, spans
from dgemma.model import DiffusionGemma
from dgemma.model.attention import Attend
from dgemma.model.backbone import Stack
from dgemma.model.device import DeviceStack
from dgemma.model.fast import FastStack
from dgemma.model.moe import Experts

_FAST = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Counters:
    """Forward passes and the tokens that went through them, since the engine began.

    A shared pass is an encode pass and a denoise pass, too: there were `encode + denoise - shared` forward passes.
    """

    encode_passes: int = 0
    denoise_passes: int = 0
    shared_passes: int = 0
    encoded_tokens: int = 0
    denoised_tokens: int = 0

    def plus(self, other: Counters) -> Counters:
        return Counters(**{name: value + getattr(other, name) for name, value in vars(self).items()})


Predict = Callable[..., kernels.VocabStats]
"""Takes what `kernels.vocab` takes."""


@dataclass(frozen=True, eq=False)
class Shape:
    """What a request does to the prediction at some positions of its canvas, at all of them if `places` is None.

    `bias [V]`, top-p (1: nothing), and `predict` instead of the vocabulary op, for who needs to see them together.
    """

    bias: Tensor | None
    top_p: float
    places: Tensor | None = None
    predict: Predict | None = None


@dataclass(frozen=True)
class Draws:
    """How each of the T canvas positions of a batch draws; see `kernels.vocab` for shapes and meaning.

    `shapes` are of each canvas, with no position in two of them. `pins` are positions of the batch and the tokens that
    they hold, whatever the network thinks of them; `[P]` each.
    """

    temperature: Tensor
    uniforms: Tensor
    draw_temperature: Tensor
    top_k: Tensor | None
    shapes: Sequence[Sequence[Shape]] = ()
    pins: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Prediction(kernels.VocabStats):
    """What a step predicts, and the hidden states `[T, H]` that say so."""

    hidden: Tensor


class Runner:
    """The only caller of the network. Every pass takes any number of segments of any length."""

    def __init__(self, model: DiffusionGemma) -> None:
        self.model = model
        self.device, self.dtype = model.embed.weight.device, model.embed.weight.dtype
        self.counters = Counters()
        types = {tensor.dtype for tensor in (*model.parameters(), *model.buffers())}
        able = self.device.type == "cpu" and self.dtype in _FAST and types == {self.dtype}
        row = kernels.row_of(self.device.type)
        own = row is kernels.TABLE.get("cpu")  # not inside `kernels.use`
        native = kernels.native.load() if able and own else None
        fast = None if native is None else FastStack(model, native)
        # A row with fused ops has a stack of its own.
        self._stack: Stack | None = DeviceStack(model) if "middle" in row else fast
        embed = model.embed.weight
        plain = embed if model.head is None else kernels.PackedHead(embed, model.head)
        self._head = plain if fast is None else fast.head
        self.invariant = "middle" not in row
        """Whether a row's bits hang on nothing but itself; a product of a device may add in another order for more."""
        apart = any(isinstance(module, Experts) and not module.stacked for module in model.modules())
        self.records = self.device.type == "cuda" and not self.invariant and not apart
        """Whether a `step` is launches only, which a device can record."""

    @torch.inference_mode()
    def encode(self, jobs: Sequence[tuple[KVCache, Sequence[int]]]) -> list[Tensor]:
        """Append each job's ids (at most `cache.slack` of them) to its cache; hidden states `[n, H]` of each job."""
        ids, positions, attend, counts = self._clean(jobs)
        hidden = self.model.encode(ids, positions, attend, self._stack)
        return self._encoded(jobs, counts, hidden)

    @torch.inference_mode()
    def denoise(
        self, jobs: Sequence[tuple[KVCache, Tensor]], softs: Sequence[Tensor | None], draws: Draws
    ) -> Prediction:
        """One step of each job's canvas `ids [C]`; `softs` are its signals `[C, H]` or None. T rows, end to end."""
        counts = [ids.shape[0] for _, ids in jobs]
        return self._prediction(self._canvases(jobs, self._signal(softs, counts)), draws, counts)

    @torch.inference_mode()
    def both(
        self,
        encode: Sequence[tuple[KVCache, Sequence[int]]],
        canvases: Sequence[tuple[KVCache, Tensor]],
        softs: Sequence[Tensor | None],
        draws: Draws,
    ) -> tuple[list[Tensor], Prediction]:
        """`encode` and `denoise` in one pass, so that the weights are read once; the results of both.

        A canvas behind tokens of this very pass comes with its cache `ahead`: no row of it needs more of them than
        their keys and values of the same layer, and these are stored before it looks.
        """
        clean, before, store, counts = self._clean(encode)
        ids, after, places, read, widths = self._noisy(canvases)
        positions, attend = torch.cat([before, after]), SharedAttend(store, read, len(clean))
        signal = self._signal(softs, widths)
        hidden = self.model.both(clean, ids, positions, attend, signal, places, self._stack)
        self._count(denoise_passes=1, denoised_tokens=len(ids), shared_passes=1)
        rows = self._encoded(encode, counts, hidden[: len(clean)])
        return rows, self._prediction(hidden[len(clean) :], draws, widths)

    @torch.inference_mode()
    def look(self, jobs: Sequence[tuple[KVCache, Tensor]]) -> list[Tensor]:
        """Hidden states `[C, H]` of each job's canvas, read once without a signal; for who needs few of its logits."""
        return list(self._canvases(jobs, None).split([ids.shape[0] for _, ids in jobs]))

    @torch.inference_mode()
    def step(
        self,
        ids: Tensor,
        soft: Tensor | None,
        prefix: Tensor,
        attend: Attend,
        draws: Draws,
        clean: Tensor | None = None,
    ) -> Prediction:
        """`denoise` of R canvases `ids [R, C]` without a word to the host: the lengths of their prefixes `[R]` are on
        the device, and `soft [R * C, H]` is zero where there is no signal. Not counted: see `count_step`.

        With the last `clean [n]` tokens of the one prefix it is `both`.
        """
        rows, width = ids.shape
        places = torch.arange(width, device=self.device).repeat(rows)
        positions = places + prefix.repeat_interleave(width)
        if clean is None:
            hidden = self.model.denoise(ids.flatten(), positions, attend, soft, places, self._stack)
        else:
            before = prefix + torch.arange(-len(clean), 0, device=self.device)
            positions = torch.cat([before, positions])
            both = self.model.both(clean, ids.flatten(), positions, attend, soft, places, self._stack)
            hidden = both[len(clean) :]
        return Prediction(**self._vocab(hidden, draws, slice(None)), hidden=hidden)

    def count_step(self, tokens: int, clean: int = 0) -> None:
        """A `step` was taken."""
        self._count(denoise_passes=1, denoised_tokens=tokens)
        if clean:
            self._count(encode_passes=1, encoded_tokens=clean, shared_passes=1)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits `[T, V]` of hidden states `[T, H]`."""
        return self.model.logits(hidden)

    def _canvases(self, jobs: Sequence[tuple[KVCache, Tensor]], signal: Tensor | None) -> Tensor:
        """Hidden states of packed canvases `[T, H]`."""
        ids, positions, places, attend, _ = self._noisy(jobs)
        self._count(denoise_passes=1, denoised_tokens=len(ids))
        return self.model.denoise(ids, positions, attend, signal, places, self._stack)

    def _clean(
        self, jobs: Sequence[tuple[KVCache, Sequence[int]]]
    ) -> tuple[Tensor, Tensor, EncodeAttend, Sequence[int]]:
        """Ids and positions `[N]`, who stores them, and how many are of each job."""
        counts = [len(ids) for _, ids in jobs]
        ids = torch.tensor([token for _, part in jobs for token in part], device=self.device)
        attend = EncodeAttend(self.model.config, [cache for cache, _ in jobs], counts)
        return ids, self._positions(jobs, counts)[0], attend, counts

    def _noisy(
        self, jobs: Sequence[tuple[KVCache, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor, DenoiseAttend, Sequence[int]]:
        """Ids, positions and places `[T]` of canvases, who reads their prefixes, and how wide they are."""
        counts = [ids.shape[0] for _, ids in jobs]
        attend = DenoiseAttend([cache for cache, _ in jobs], counts)
        return torch.cat([ids for _, ids in jobs]), *self._positions(jobs, counts), attend, counts

    def _encoded(
        self, jobs: Sequence[tuple[KVCache, Sequence[int]]], counts: Sequence[int], hidden: Tensor
    ) -> list[Tensor]:
        """After a pass with `hidden [N, H]`: its tokens are part of the caches; the hidden states of each job."""
        for (cache, _), count in zip(jobs, counts, strict=True):
            cache.advance(count)
        self._count(encode_passes=1, encoded_tokens=len(hidden))
        return list(hidden.split(list(counts)))

    def _prediction(self, hidden: Tensor, draws: Draws, counts: Sequence[int]) -> Prediction:
        """What the hidden states `[T, H]` of canvases of `counts` positions predict."""
        stats = self._predict(hidden, draws, counts)
        if draws.pins is not None:
            self._pin(stats, *draws.pins)
        return Prediction(**stats, hidden=hidden)

    def _predict(self, hidden: Tensor, draws: Draws, counts: Sequence[int]) -> dict[str, Tensor]:
        """The statistics; positions with a shape apart, canvas by canvas, so that no row depends on who is there."""
        if not any(draws.shapes):
            return self._vocab(hidden, draws, slice(None))
        every = torch.arange(len(hidden), device=self.device)
        shaped = [
            (every[span] if shape.places is None else span.start + shape.places, shape)
            for span, shapes in zip(spans(counts), draws.shapes, strict=True)
            for shape in shapes
        ]
        plain = torch.ones_like(every, dtype=torch.bool)
        plain[torch.cat([rows for rows, _ in shaped])] = False
        groups: list[tuple[Tensor, Shape | None]] = [(every[plain], None)] if bool(plain.any()) else []
        groups += shaped
        parts = [self._vocab(hidden, draws, rows, shape) for rows, shape in groups]
        back = torch.cat([rows for rows, _ in groups]).argsort()
        return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}

    def _vocab(
        self, hidden: Tensor, draws: Draws, rows: Tensor | slice, shape: Shape | None = None
    ) -> dict[str, Tensor]:
        temperature = draws.temperature[rows]
        bias, top_p = (shape.bias, shape.top_p) if shape else (None, 1.0)
        predict = (shape.predict if shape else None) or kernels.vocab
        stats = predict(
            hidden[rows],
            self._head,
            self.model.config.softcap,
            temperature,
            draws.uniforms[rows],
            draws.draw_temperature[rows],
            None if draws.top_k is None else draws.top_k[rows],
            bias=bias,
            top_p=torch.full_like(temperature, top_p, dtype=torch.float64) if top_p < 1 else None,
        )
        return {field.name: getattr(stats, field.name) for field in fields(stats)}

    def _pin(self, stats: dict[str, Tensor], rows: Tensor, tokens: Tensor) -> None:
        """Make the prediction at `rows` a certain one, in place."""
        for name in ("entropy", "top_logprob", "draw_logprob"):
            stats[name][rows] = 0.0
        for name in ("argmax", "draw"):
            stats[name][rows] = tokens
        stats["soft"][rows] = self.model.embed.weight[tokens].to(stats["soft"].dtype)

    def _signal(self, softs: Sequence[Tensor | None], counts: Sequence[int]) -> Tensor | None:
        if all(soft is None for soft in softs):
            return None
        size = self.model.config.hidden_size
        # A zero vector is exactly "no signal": the conditioning MLP of zero is zero.
        rows = [
            torch.zeros(count, size, device=self.device, dtype=self.dtype) if soft is None else soft
            for soft, count in zip(softs, counts, strict=True)
        ]
        return torch.cat(rows)

    def _positions(self, jobs: Sequence[tuple[KVCache, object]], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Absolute positions, and positions inside the segment, `[T]` each."""
        places = torch.cat([torch.arange(count, device=self.device) for count in counts])
        starts = torch.tensor([cache.length for cache, _ in jobs], device=self.device)
        sizes = torch.tensor(counts, device=self.device)
        return places + starts.repeat_interleave(sizes, output_size=len(places)), places

    def _count(self, **added: int) -> None:
        now = vars(self.counters)
        self.counters = Counters(**{name: now[name] + added.get(name, 0) for name in now})
