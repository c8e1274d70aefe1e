"""Log-probabilities of committed tokens, for who asked: the encoder's while canvases are encoded, the denoiser's at the
deciding step. All logits are those of the model: no temperature, no bias, nothing that shapes a draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgemma import kernels
from dgemma.engine.runner import Runner
from dgemma.events import Scored

MOST = 20
"""The most alternatives a request may ask for."""
_ROWS = 16  # rows of full logits held at a time

Tops = list[tuple[tuple[int, float], ...]]


@torch.inference_mode()
def score(logits: Tensor, tokens: Sequence[int], top: int) -> tuple[list[float], Tops]:
    """Of float32 `logits [R, V]`: the log-probability of each row's token, and the `top` most likely ones of each."""
    logp = torch.log_softmax(logits, dim=-1)
    chosen = logp.gather(1, torch.tensor(tokens, device=logits.device)[:, None]).squeeze(1).tolist()
    if not top:
        return chosen, [()] * len(chosen)
    ids = kernels.highest(logits, top)[1]  # of logits, because log-probabilities merge near ones
    pairs = zip(ids.tolist(), logp.gather(1, ids).tolist(), strict=True)
    return chosen, [tuple(zip(*pair, strict=True)) for pair in pairs]


def score_rows(runner: Runner, hidden: Tensor, tokens: Sequence[int], top: int) -> tuple[list[float], Tops]:
    """`score` of the hidden states `[R, H]` that predict the tokens, a few rows at a time."""
    logprobs: list[float] = []
    tops: Tops = []
    for start in range(0, len(tokens), _ROWS):
        part = slice(start, start + _ROWS)
        few = score(runner.logits(hidden[part]), tokens[part], top)
        logprobs += few[0]
        tops += few[1]
    return logprobs, tops


class Scoring:
    """What one request in mode diffusion has of the log-probabilities of the canvas that is being encoded.

    A token is predicted by the hidden state before it, so the last one of each pass is kept for the next.
    """

    def __init__(self, top: int, prompt: int) -> None:
        """`top` alternatives a token; the first `prompt` tokens are given, not scored."""
        self._top, self._prompt = top, prompt
        self._last: Tensor | None = None
        self._logprobs: list[float] = []
        self._tops: Tops = []
        self._waiting: tuple[int, tuple[float, ...]] | None = None

    @property
    def owed(self) -> bool:
        """Whether a canvas is committed and its event not yet given."""
        return self._waiting is not None

    def commit(self, runner: Runner, canvas: int, tokens: Sequence[int], hidden: Tensor) -> None:
        """A canvas was committed; `hidden [C, H]` are the states of its last step, of which `tokens` may be fewer."""
        self._waiting = canvas, tuple(score_rows(runner, hidden, tokens, 0)[0])

    def encode(self, runner: Runner, ids: Sequence[int], start: int, hidden: Tensor) -> None:
        """A pass encoded `ids[start : start + n]` into `hidden [n, H]`: some of the prompt, or some of a canvas."""
        if start >= self._prompt:
            assert self._last is not None
            before = torch.cat([self._last, hidden[:-1]])
            logprobs, tops = score_rows(runner, before, ids[start : start + len(hidden)], self._top)
            self._logprobs += logprobs
            self._tops += tops
        self._last = hidden[-1:].clone()

    def take(self, request: int) -> Scored:
        """The event of the canvas that is now encoded."""
        assert self._waiting is not None
        canvas, marginals = self._waiting
        event = Scored(request, canvas, tuple(self._logprobs), tuple(self._tops), marginals)
        self._waiting, self._logprobs, self._tops = None, [], []
        return event
