"""What a constraint on a whole canvas is: token classes for the vocabulary op, and a solver over its answer.

A constraint knows token ids and automaton states; it sees neither the network nor other positions' logits. Source of
the programme: DINGO (arXiv 2505.23061), and `docs/constraints.md` for what we do otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from dgemma.config import GenerationConfig


@dataclass(frozen=True, eq=False)
class TokenClasses:
    """`of [V]` int64: the class of each token. Tokens of a class make the same transition in every state; class 0 are
    those that no state allows. `count` is K, class 0 included."""

    of: Tensor
    count: int


@dataclass(frozen=True, eq=False)
class Ask:
    """What the model says of n positions, and where they stand.

    `logsum [n, K]` float64: log-probability of each class; `best [n, K]`: of its most likely token. `state` is the
    automaton's before the first position, `rest` how many tokens may follow the last one in later canvases, and
    `uniforms [n]` float64 in [0, 1) feed the joint draw.
    """

    logsum: Tensor
    best: Tensor
    state: int
    rest: int
    uniforms: Tensor


@dataclass(frozen=True, eq=False)
class Solved:
    """The constrained posterior: `weight [n, K]` are log-factors g, with which a position's marginal is
    p(t) proportional to p_model(t) exp(g[class of t]); `path [n]` the classes of the most likely path, `drawn [n]`
    those of one path drawn from the posterior. `states` are the n + 1 states that the most likely path goes through."""

    weight: Tensor
    path: Tensor
    drawn: Tensor
    states: tuple[int, ...]


class Constraint(Protocol):
    """Frozen; what an answer remembers of it is the state after its committed tokens."""

    @property
    def classes(self) -> TokenClasses: ...

    @property
    def start(self) -> int: ...

    @property
    def raw_signal(self) -> bool:
        """Whether self-conditioning gets the soft embedding of the unconstrained prediction; only to be compared."""

    def check(self, config: GenerationConfig) -> None:
        """`RequestError` if no answer can be had with these settings."""

    def advance(self, state: int, tokens: Sequence[int]) -> int:
        """The state after more committed tokens."""

    def parse(self, text: str) -> Any:
        """The value that a finished answer spells, None if it is a text and nothing else."""

    def solve(self, ask: Ask) -> Solved: ...
