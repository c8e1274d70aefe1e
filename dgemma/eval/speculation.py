"""Whether speculative sampling keeps the law: long simulations of `control.verify` on small chains, and of faults.

A chain of order 2 says what the encoder would: p of the next token after the last two. A canvas is a hidden number,
drawn anew for every draft, which with the last token makes q of every place; so drafted tokens depend on each other, as
those of a real canvas do. All sequences are simulated at once. Knows no network; `docs/verified.md` has the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma.control.verify import judge_draws, judge_points

GRAM = 3  # tokens of a sequence that are compared
_END = 0  # the token at which the last fault cuts drafts


@dataclass(frozen=True, eq=False)
class Chain:
    """`p [V + 1, V + 1, V]` after the last two tokens (V: none yet); `q [H, n, V + 1, V]` of a canvas's n places."""

    p: Tensor
    q: Tensor

    @staticmethod
    def random(vocab: int = 6, drafted: int = 3, hidden: int = 4, seed: int = 0) -> Chain:
        """Canvases that know something of p at their first place, and ever less behind it."""
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        p = torch.softmax(1.2 * noise(vocab + 1, vocab + 1, vocab), dim=-1)
        guess = p.log().mean(dim=0)  # [V + 1, V]
        fade = 0.7 ** torch.arange(drafted).view(1, -1, 1, 1)
        return Chain(p, torch.softmax(fade * guess + noise(hidden, drafted, vocab + 1, vocab), dim=-1))

    @property
    def vocab(self) -> int:
        return self.p.shape[-1]

    @property
    def drafted(self) -> int:
        return self.q.shape[1]

    def law(self) -> Tensor:
        """The joint law of the first `GRAM` tokens, `[V ** GRAM]`."""
        none = self.vocab
        first, second = self.p[none, none], self.p[none, :-1]
        return torch.einsum("a,ab,abc->abc", first, second, self.p[:-1, :-1]).flatten()

    def after(self, before: Tensor, draft: Tensor) -> Tensor:
        """p of each drafted place and of the one behind `[B, n + 1, V]`; `before [B, 2]` are the last tokens."""
        known = torch.cat([before, draft], dim=1)
        return self.p[known[:, :-1], known[:, 1:]]


Cycle = Callable[[Chain, Tensor, torch.Generator], tuple[Tensor, Tensor, Tensor]]
"""A draft and its test: (drafted tokens `[B, n]`, how many stand `[B]`, the token that follows `[B]`)."""


def drawn(chain: Chain, before: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh draws, tested with the law that they come from."""
    q = _canvas(chain, before, generator)
    return _tested(chain, before, q, _draw(q, generator), generator)


def point(chain: Chain, before: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest token of every place, tested as the point mass that it is: by a draw from p."""
    draft = _canvas(chain, before, generator).argmax(dim=-1)
    return draft, *judge_points(_draw(chain.after(before, draft), generator), draft)


def softmax_point(chain: Chain, before: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Fault: the likeliest tokens, tested as if they had been drawn."""
    q = _canvas(chain, before, generator)
    return _tested(chain, before, q, q.argmax(dim=-1), generator)


def stale(chain: Chain, before: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Fault: the first token was kept from an earlier step, whose prediction was another."""
    old, q = _canvas(chain, before, generator), _canvas(chain, before, generator)
    draft = torch.cat([_draw(old, generator)[:, :1], _draw(q, generator)[:, 1:]], dim=1)
    return _tested(chain, before, q, draft, generator)


def tempered(chain: Chain, before: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Fault: drawn at a temperature that the test does not know of."""
    q = _canvas(chain, before, generator)
    return _tested(chain, before, q, _draw(torch.softmax(q.log() / 0.7, dim=-1), generator), generator)


def trimmed(chain: Chain, before: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Fault: a draft ends before the end token that it has, and what follows comes from p."""
    q = _canvas(chain, before, generator)
    draft = _draw(q, generator)
    ends = torch.where(draft == _END, torch.arange(chain.drafted), chain.drafted).amin(dim=1)
    accepted, token = torch.zeros_like(ends), torch.zeros_like(ends)
    for length in range(chain.drafted + 1):
        rows = ends == length
        part = _tested(chain, before[rows], q[rows, :length], draft[rows, :length], generator)
        accepted[rows], token[rows] = part[1:]
    return draft, accepted, token


RULES: Mapping[str, Cycle] = {"drawn": drawn, "point": point}
FAULTS: Mapping[str, Cycle] = {
    "softmax_point": softmax_point, "stale": stale, "trimmed": trimmed, "tempered": tempered,
}  # fmt: skip


def simulate(chain: Chain, cycle: Cycle, sequences: int, seed: int = 0) -> tuple[Tensor, float]:
    """Counts `[V ** GRAM]` of what many sequences begin with, and the mean number of tokens that stand in a draft."""
    generator = torch.Generator().manual_seed(seed)
    known = torch.full((sequences, 2 + GRAM + chain.drafted), chain.vocab)
    length = torch.zeros(sequences, dtype=torch.int64)
    stands, drafts = 0, 0
    while bool((short := length < GRAM).any()):
        rows = short.nonzero().flatten()
        before = known[rows].gather(1, length[rows, None] + torch.arange(2))
        draft, accepted, token = cycle(chain, before, generator)
        place = torch.arange(chain.drafted + 1)
        new = torch.where(place == accepted[:, None], token[:, None], torch.nn.functional.pad(draft, (0, 1)))
        # What lies behind the token that follows is overwritten by the next draft.
        known[rows[:, None], 2 + length[rows, None] + place] = new
        length[rows] += accepted + 1
        stands, drafts = stands + int(accepted.sum()), drafts + len(rows)
    gram = known[:, 2 : 2 + GRAM]
    index = (gram * chain.vocab ** torch.arange(GRAM - 1, -1, -1)).sum(dim=1)
    return torch.bincount(index, minlength=chain.vocab**GRAM), stands / drafts


def chi_square(counts: Tensor, law: Tensor) -> tuple[float, int, float]:
    """Pearson's statistic, its degrees of freedom, and the probability of one as large if the law holds.

    Classes expected less than 5 times are taken together.
    """
    expected = law * counts.sum()
    rare = expected < 5
    seen = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    seen, expected = seen[expected > 0], expected[expected > 0]
    value, degrees = ((seen - expected) ** 2 / expected).sum(), len(seen) - 1
    return float(value), degrees, float(torch.special.gammaincc(torch.tensor(degrees / 2).double(), value / 2))


def _canvas(chain: Chain, before: Tensor, generator: torch.Generator) -> Tensor:
    """q `[B, n, V]` of a canvas for each sequence."""
    hidden = torch.randint(chain.q.shape[0], before.shape[:1], generator=generator)
    return chain.q[hidden[:, None], torch.arange(chain.drafted), before[:, 1:]]


def _draw(law: Tensor, generator: torch.Generator) -> Tensor:
    uniforms = torch.rand(law.shape[:-1], generator=generator, dtype=torch.float64)
    curve = law.cumsum(dim=-1)
    return (curve <= (uniforms * curve[..., -1])[..., None]).sum(dim=-1).clamp(max=law.shape[-1] - 1)


def _tested(
    chain: Chain, before: Tensor, q: Tensor, draft: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    accept = torch.rand(draft.shape, generator=generator, dtype=torch.float64)
    accepted, law = judge_draws(chain.after(before, draft), q, draft, accept)
    return draft, accepted, _draw(law, generator)
