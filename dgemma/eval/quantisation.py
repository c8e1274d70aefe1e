"""What quantising changed: two models of one shape side by side on the same text and the same noise.

Knows token documents and two networks; which of them is quantised, and how, is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgemma.diffusion.noise import corrupt
from dgemma.errors import DataError
from dgemma.eval.documents import Document, Window, byte_lengths, cut
from dgemma.model import DiffusionGemma
from dgemma.text.tokenizer import Tokenizer
from dgemma.train.attend import BlockAttend, Layout
from dgemma.train.head import soft_signal

LEVELS = (0.25, 0.5, 0.75, 1.0)
_ROWS = 64  # rows of full logits held at a time, of each model

PASSAGES = (
    "Once upon a time a small brown fox lived at the edge of a wide green forest. Every morning she walked down to the "
    "river to drink, and every morning an old turtle was sitting there on the same flat stone.",
    "The train left the station at noon. Rain ran down the windows, and the fields outside were grey and empty. A boy "
    "with a red cap asked his mother how far it was to the sea, and she said that they would see it before dark.",
    "To make the bread, mix flour, water, salt and a little yeast in a bowl. Let the dough rest until it has doubled, "
    "fold it twice, and bake it in a hot oven until the crust is brown and sounds hollow when you knock on it.",
    "Water boils at a lower temperature on a high mountain, because the air presses on it less. That is why an egg "
    "takes longer to cook there, although the pot seems to boil as hard as it does at home.",
)
"""What is compared on when the user gives no text."""


@dataclass(frozen=True)
class Difference:
    """Over `tokens` positions: mean KL(original || quantised) in nats, the share of positions whose most likely token
    is the same, the mean |difference| of the entropies in nats, and bits per byte of the true text under either.

    `text` is what was predicted: "encode" the next token, "denoise" the tokens of canvases at the noise `LEVELS`,
    after a first pass over the same noise has given each model its own self-conditioning signal. Denoise bits per
    byte are the cross-entropy, averaged over the levels; no likelihood.
    """

    text: str
    tokens: int
    kl: float
    argmax_agreement: float
    entropy_difference: float
    bits_per_byte_original: float
    bits_per_byte_quantised: float

    def json(self) -> dict[str, Any]:
        return asdict(self)


class _Sums:
    """Running sums of one pass."""

    def __init__(self) -> None:
        self.tokens = self.bytes = 0
        self.kl = self.same = self.entropy = self.original = self.quantised = 0.0

    def add(self, models: Sequence[DiffusionGemma], hidden: Sequence[Tensor], targets: Tensor, size: int) -> None:
        """Hidden states `[T, H]` of either model for `targets [T]`, which write `size` bytes."""
        for rows in torch.arange(len(targets)).split(_ROWS):
            first, second = (
                torch.log_softmax(model.logits(states[rows]).double(), dim=-1)
                for model, states in zip(models, hidden, strict=True)
            )
            self.kl += float((first.exp() * (first - second)).sum())
            self.same += int((first.argmax(-1) == second.argmax(-1)).sum())
            self.entropy += float((_entropy(first) - _entropy(second)).abs().sum())
            at = targets[rows, None]
            self.original -= float(first.gather(1, at).sum())
            self.quantised -= float(second.gather(1, at).sum())
        self.tokens += len(targets)
        self.bytes += size

    def difference(self, text: str) -> Difference:
        bits = math.log(2) * max(1, self.bytes)
        return Difference(
            text=text,
            tokens=self.tokens,
            kl=max(0.0, self.kl / self.tokens),
            argmax_agreement=self.same / self.tokens,
            entropy_difference=self.entropy / self.tokens,
            bits_per_byte_original=self.original / bits,
            bits_per_byte_quantised=self.quantised / bits,
        )


def _entropy(logp: Tensor) -> Tensor:
    return -(logp.exp() * logp).sum(-1)


@torch.inference_mode()
def compare(
    original: DiffusionGemma,
    quantised: DiffusionGemma,
    documents: Sequence[Document],
    *,
    width: int | None = None,
    context: int = 256,
    levels: Sequence[float] = LEVELS,
    seed: int = 0,
    advance: Callable[[int, int], object] = lambda done, total: None,
) -> list[Difference]:
    """The differences of the encode and of the denoise pass, in this order.

    Documents are read canvas by canvas (`width` None: as wide as the model's), each after at most `context` tokens;
    the last one is filled with padding, which is seen and not counted. Both models must live on the CPU.
    """
    config = original.config
    width = width or config.canvas_length
    windows = cut(documents, region=width, context=context, block=width, fill=config.pad_token)
    if not windows:
        raise DataError("nothing to compare on: the text needs at least one token")
    models, generator = (original, quantised), torch.Generator().manual_seed(seed)
    encode, denoise = _Sums(), _Sums()
    for number, window in enumerate(windows):
        ids, layout = torch.from_numpy(window.ids)[None], _layout(window, width)
        passes = [BlockAttend(config, layout, model.embed.weight.dtype) for model in models]
        positions = torch.arange(ids.shape[1])[None]
        hidden = [
            model.encode(ids, positions, attend.encode)[0, window.start - 1 : window.start - 1 + window.tokens]
            for model, attend in zip(models, passes, strict=True)
        ]
        clean = ids[:, window.start :]
        targets = clean[0, : window.tokens]
        encode.add(models, hidden, targets, window.bytes)
        for level in levels:
            noisy, _ = corrupt(clean, level, config.vocab_size, generator)
            states = [_denoise(model, noisy, layout, attend) for model, attend in zip(models, passes, strict=True)]
            denoise.add(models, [state[0, : window.tokens] for state in states], targets, window.bytes)
        advance(number + 1, len(windows))
    return [encode.difference("encode"), denoise.difference("denoise")]


def documents_of(texts: Sequence[str], tokenizer: Tokenizer, vocab_size: int) -> list[Document]:
    """Each text as a document after the begin-of-sequence token, with the bytes that its tokens write."""
    lengths = byte_lengths(tokenizer.decode_after, vocab_size)
    many = [np.array([tokenizer.bos, *tokenizer.encode(text)], dtype=np.int64) for text in texts]
    return [Document(ids, lengths[ids]) for ids in many if len(ids) > 1]


def _layout(window: Window, width: int) -> Layout:
    return Layout(torch.tensor([window.start]), len(window.ids), width, width)


def _denoise(model: DiffusionGemma, noisy: Tensor, layout: Layout, attend: BlockAttend) -> Tensor:
    where, places = layout.canvas_positions(), torch.arange(layout.width)[None]
    soft = soft_signal(model, model.denoise(noisy, where, attend.denoise, None, places))
    return model.denoise(noisy, where, attend.denoise, soft, places)
