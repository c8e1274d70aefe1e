"""The vocabulary op for rows whose tokens fall into classes: first what each class has, then what weights make of it.

Like `shaped`, it sees all logits of a few rows at a time and no tensor of all rows and the whole vocabulary exists. The
logits are computed twice, because the weights depend on what all rows said. Knows no automaton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma.kernels import reference
from dgemma.kernels.cpu_vocab import PackedHead
from dgemma.kernels.reference import Matmul, VocabStats, draw_tokens, first_highest
from dgemma.kernels.shaped import few_logits, plain_of

_NEVER = -1e4  # stands for a log-probability of minus infinity where it is told


@dataclass(frozen=True, eq=False)
class Head:
    """Rows `hidden [T, H]` with all that makes tempered logits of them; `bias [V]` comes before the `temperature [T]`.

    `plain_soft` makes the soft embedding of the prediction as it is, without the weights.
    """

    hidden: Tensor
    embed: Tensor | PackedHead
    cap: float
    temperature: Tensor
    matmul: Matmul = reference.linear
    bias: Tensor | None = None
    plain_soft: bool = False

    @property
    def table(self) -> Tensor:
        return plain_of(self.embed)

    def logits(self, temperature: Tensor) -> Iterator[tuple[Tensor, int, Tensor]]:
        """See `shaped.few_logits`."""
        return few_logits(self.hidden, self.embed, self.cap, temperature, self.matmul, self.bias)


def class_stats(head: Head, of: Tensor, count: int, temperature: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Of each class, the log of its summed probability and that of its most likely token: `[T, K]` float64 each.

    `of [V]` is each token's class, `count` K. A class without tokens, or whose tokens are all banned, has minus
    infinity. `temperature [T]` instead of the head's own.
    """
    sums, tops = [], []
    for _, used, logits in head.logits(head.temperature if temperature is None else temperature):
        index = of.expand(len(logits), -1)
        empty = logits.new_full((len(logits), count), -torch.inf)
        top = empty.scatter_reduce(1, index, logits, "amax")
        known = top.masked_fill(top == -torch.inf, 0.0)
        mass = torch.exp(logits - known.gather(1, index)).double()
        # Each class from its own top, or all of an unlikely one would be lost.
        total = known.double() + torch.zeros_like(empty, dtype=torch.float64).scatter_add(1, index, mass).log()
        whole = total.logsumexp(dim=1, keepdim=True)
        sums.append((total - whole)[:used])
        tops.append((top.double() - whole)[:used])
    return torch.cat(sums), torch.cat(tops)


def weighted(
    head: Head,
    of: Tensor,
    weight: Tensor,
    emitted: Tensor,
    drawn: Tensor,
    uniforms: Tensor,
    draw_temperature: Tensor | None = None,
) -> VocabStats:
    """Statistics of p(t) proportional to p_model(t) exp(weight[class of t]), with `weight [T, K]`.

    `argmax` is the most likely token of class `emitted [T]` (ties by the lowest id) and `draw` one drawn from class
    `drawn [T]`, by `uniforms [T, blocks]` and `draw_temperature [T]` as in `reference.vocab`.
    """
    done: list[dict[str, Tensor]] = []
    table = head.table
    for rows, used, logits in head.logits(head.temperature):
        shaped = logits + weight[rows].to(logits.dtype)[:, of]
        logp = torch.log_softmax(shaped, dim=-1)
        probs = logp.exp()
        argmax = first_highest(_only(logits, of, emitted[rows]))
        inside = _only(logits, of, drawn[rows])
        own = None if draw_temperature is None else draw_temperature[rows]
        draw = draw_tokens(inside, first_highest(inside), uniforms[rows], own, None)
        told = logp.clamp(min=_NEVER)
        stats = {
            "entropy": -(probs * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(dim=-1),
            "argmax": argmax,
            "top_logprob": told.gather(1, argmax[:, None]).squeeze(1),
            "draw": draw,
            "draw_logprob": told.gather(1, draw[:, None]).squeeze(1),
            "soft": head.matmul((logits.softmax(dim=-1) if head.plain_soft else probs).to(table.dtype), table.t()),
        }
        done.append({name: value[:used] for name, value in stats.items()})
    return VocabStats(**{name: torch.cat([part[name] for part in done]) for name in done[0]})


def _only(logits: Tensor, of: Tensor, chosen: Tensor) -> Tensor:
    return logits.masked_fill(of != chosen[:, None], -torch.inf)
