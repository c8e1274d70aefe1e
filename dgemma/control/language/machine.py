"""`Machine`: the constraint that an automaton over tokens makes of a request's answer, its end included.

Behind an accepting state comes an end token, behind that end and pad tokens only. Knows no text: see `languages`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from dgemma.config import GenerationConfig
from dgemma.control.language.automaton import TokenEdges, trim
from dgemma.control.language.solve import Arcs, solve
from dgemma.control.language.vocabulary import Ints
from dgemma.control.protocol import Ask, Solved, TokenClasses
from dgemma.errors import RequestError


@dataclass(frozen=True, eq=False)
class Machine:
    """`edges` with the end in it. State 0 is the start; `ended` the state behind the end token, which is never left.

    `distance [S]`: how many tokens, the end token included, the shortest way to `ended` takes.
    """

    edges: TokenEdges
    arcs: Arcs
    distance: Ints
    ended: int
    stop_tokens: frozenset[int]
    pad_token: int
    banned: frozenset[int]
    raw_signal: bool = False
    reader: Callable[[str], Any] | None = None
    """What makes a value of a finished answer's text."""

    @staticmethod
    def of(edges: TokenEdges, stop_tokens: Collection[int], pad_token: int, banned: Collection[int] = ()) -> Machine:
        """Of the automaton of the text alone. `banned` tokens are in no answer; `RequestError` if none is left."""
        stops, bans = frozenset(stop_tokens), frozenset(banned)
        if not stops:
            raise RequestError("a constraint needs an end token; this checkpoint's generation settings name none")
        if stops <= bans:
            raise RequestError(f"logit_bias bans all end tokens ({_listed(stops)}): no constrained answer can end")
        ended, end, pad = edges.states, edges.count, edges.count + 1
        of = edges.of.copy()
        for token, kind in ((pad_token, pad), *((stop, end) for stop in stops), *((ban, 0) for ban in bans)):
            if token < len(of):
                of[token] = kind
        accepting = np.flatnonzero(edges.accepting)
        source = np.concatenate([edges.source, accepting, [ended, ended]])
        by = np.concatenate([edges.by, np.full(len(accepting), end), [end, pad]])
        target = np.concatenate([edges.target, np.full(len(accepting) + 2, ended)])
        # A class of which every token is gone, by bans or by being an end token, opens no way.
        open_ = np.bincount(of, minlength=pad + 1)[by] > 0
        final = np.zeros(ended + 1, dtype=np.bool_)
        final[ended] = True
        whole = TokenEdges(source[open_], by[open_], target[open_], final, of, pad + 1)
        try:
            edges = trim(whole)
        except RequestError:
            reason = f"the {len(bans)} tokens that logit_bias bans leave it none" if bans else "it is empty"
            raise RequestError(f"the constraint allows no answer: {reason}") from None
        arcs = Arcs.of(edges.source, edges.by, edges.target, edges.states)
        last = int(np.flatnonzero(edges.accepting)[0])
        return Machine(edges, arcs, edges.distance, last, stops, pad_token, bans)

    @cached_property
    def classes(self) -> TokenClasses:
        return TokenClasses(torch.from_numpy(self.edges.of), self.edges.count)

    @property
    def start(self) -> int:
        return 0

    @property
    def least(self) -> int:
        """Tokens of the shortest answer, its end token included."""
        return int(self.distance[0])

    def check(self, config: GenerationConfig) -> None:
        """`RequestError` if no answer fits these settings, or they are not those that this was made for."""
        if config.max_new_tokens < self.least:
            raise RequestError(
                f"the shortest answer that the constraint allows has {self.least} tokens, its end token included; "
                f"max_new_tokens is {config.max_new_tokens}"
            )
        if config.convention != "hf":
            raise RequestError(
                f'a constraint needs convention "hf"; "{config.convention}" commits fresh noise, which fits none'
            )
        for name, off in (("top_k", 0), ("top_p", 1.0)):
            if getattr(config, name) != off:
                raise RequestError(
                    f"{name} cannot be combined with a constraint: it looks at one position, a constraint at all; "
                    f"got {getattr(config, name)}, leave it at {off}"
                )
        made = (self.stop_tokens, self.pad_token, self.banned)
        asked = (frozenset(config.stop_tokens), config.pad_token, config.banned)
        for name, mine, own in zip(("end tokens", "pad token", "banned tokens"), made, asked, strict=True):
            if mine != own:
                raise RequestError(f"the constraint was made for other {name} than the request's: {mine}, not {own}")

    def advance(self, state: int, tokens: Sequence[int]) -> int:
        """The state after more tokens of an answer; `ValueError` for a token that the state does not allow."""
        for token in tokens:
            begin, end = self._begin[state], self._begin[state + 1]
            place = np.flatnonzero(self.edges.by[begin:end] == self.edges.of[token])
            if not len(place):
                raise ValueError(f"token {token} cannot follow state {state}")
            state = int(self.edges.target[begin + place[0]])
        return state

    def parse(self, text: str) -> Any:
        if self.reader is None:
            return None
        try:
            return self.reader(text)
        except ValueError as error:  # a model may check more than its schema says
            raise RequestError(f"the answer fits the schema, but the model refuses it: {error}") from None

    def solve(self, ask: Ask) -> Solved:
        posterior = solve(
            self.arcs,
            ask.logsum.numpy(),
            ask.best.numpy(),
            ask.state,
            self.distance <= ask.rest,
            ask.uniforms.numpy(),
        )
        if posterior.total == -np.inf:
            raise RequestError(
                f"the constraint cannot be met from state {ask.state} in {len(ask.logsum)} positions and {ask.rest} "
                f"later ones; the shortest way takes {int(self.distance[ask.state])}"
            )
        return Solved(
            torch.from_numpy(posterior.weight),
            torch.from_numpy(posterior.path),
            torch.from_numpy(posterior.drawn),
            tuple(posterior.states.tolist()),
        )

    @cached_property
    def _begin(self) -> Ints:
        return np.searchsorted(self.edges.source, np.arange(self.edges.states + 1))


def _listed(tokens: Collection[int]) -> str:
    return ", ".join(str(token) for token in sorted(tokens))
