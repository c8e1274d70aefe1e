"""The vocabulary op for rows with a bias or top-p: all logits of a few rows at a time.

The streamed op cannot serve them: what top-p keeps is known only after all logits are, and entropy and soft embedding
depend on it. Here is `reference.vocab` for so few rows at once that no tensor of all rows and the whole vocabulary
exists; only top-p takes a shorter way. Knows no requests: which rows need this is for its caller to say.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dgemma.kernels import reference
from dgemma.kernels.cpu_vocab import PackedHead
from dgemma.kernels.reference import Matmul, VocabStats, softcap

LOGITS_AT_ONCE = 16 * 262_144
_LIKELY = 512  # tokens among which the end of a nucleus is looked for first


def vocab(
    hidden: Tensor,
    embed: Tensor | PackedHead,
    cap: float,
    temperature: Tensor,
    uniforms: Tensor,
    draw_temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    matmul: Matmul = reference.linear,
    bias: Tensor | None = None,
    top_p: Tensor | None = None,
) -> VocabStats:
    """`reference.vocab`; a row's bits do not depend on the other rows if those of `matmul` do not."""
    plain = plain_of(embed)
    done = []
    for few, count, logits in few_logits(hidden, embed, cap, temperature, matmul, bias):

        def of(values: Tensor | None, few: Tensor = few) -> Tensor | None:
            return None if values is None else values[few]

        if top_p is not None:
            logits = nucleus(logits, top_p[few])
        stats = reference.prediction(
            logits, uniforms[few], of(draw_temperature), of(top_k), lambda p: matmul(p.to(plain.dtype), plain.t())
        )
        done.append({name: value[:count] for name, value in vars(stats).items()})
    return VocabStats(**{name: torch.cat([part[name] for part in done]) for name in done[0]})


def few_logits(
    hidden: Tensor,
    embed: Tensor | PackedHead,
    cap: float,
    temperature: Tensor,
    matmul: Matmul = reference.linear,
    bias: Tensor | None = None,
) -> Iterator[tuple[Tensor, int, Tensor]]:
    """A few rows at a time: which, how many of them count, and their biased and tempered logits `[few, V]`, float32."""
    for rows in torch.arange(len(hidden), device=hidden.device).split(max(2, LOGITS_AT_ONCE // len(plain_of(embed)))):
        few = rows if len(rows) > 1 else rows.expand(2)  # a lone row's sums take another way
        raw = embed.logits(hidden[few]) if isinstance(embed, PackedHead) else matmul(hidden[few], embed)
        logits = softcap(raw, cap)
        if bias is not None:
            logits += bias if bias.dim() == 1 else bias[few]
        yield few, len(rows), logits.div_(temperature[few, None])


def plain_of(embed: Tensor | PackedHead) -> Tensor:
    """The embedding itself `[V, H]`."""
    return embed.embed if isinstance(embed, PackedHead) else embed


def nucleus(logits: Tensor, top_p: Tensor) -> Tensor:
    """`reference.nucleus`, without sorting what is unlikely."""
    size = min(_LIKELY, logits.shape[-1])
    ranked, ids = logits.topk(size, dim=-1)
    mass = torch.softmax(logits.double(), dim=-1).gather(1, ids).cumsum(dim=-1)
    if bool((mass[:, -1] < top_p).any()) or bool((top_p >= 1).any()):
        return reference.nucleus(logits, top_p)
    counts = 1 + (mass[:, :-1] < top_p[:, None]).sum(dim=-1)
    return logits.masked_fill(~_highest(logits, ranked, counts), -torch.inf)


def highest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest of each row of `values [T, V]`, highest first, and their ids; ties by the lowest id."""
    rows, count = values.shape[0], min(count, values.shape[-1])
    ranked = values.topk(count, dim=-1).values
    kept = _highest(values, ranked, torch.full((rows,), count, device=values.device))
    ids = kept.nonzero()[:, 1].view(rows, count)
    best, order = values.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return best, ids.gather(1, order)


def _highest(values: Tensor, ranked: Tensor, counts: Tensor) -> Tensor:
    """Mask of the `counts [T]` highest of each row of `values`; `ranked` has at least so many of them in order.

    Of values alike at the end, which torch's top-k takes in any order, the ones with the lowest ids are in.
    """
    last = ranked.gather(1, counts[:, None] - 1)
    above, alike = values > last, values == last
    wanted = counts[:, None] - above.sum(dim=-1, keepdim=True)
    return above | (alike & (alike.cumsum(dim=-1) <= wanted))
