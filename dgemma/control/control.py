"""What a request demands of its answer beyond parameters: pinned tokens, a draft to start from, a constraint, a hook.

Places count from 0 at the answer's first token. Knows ids only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dgemma.config import GenerationConfig
from dgemma.control.hooks import Hook
from dgemma.control.protocol import Constraint
from dgemma.errors import RequestError

NOISE = -1
"""In a draft: nothing is proposed for this place."""


@dataclass(frozen=True, eq=False)
class Mask:
    """Tokens that no prediction may have: true in `tokens [V]` bool. For more of them than `bans` should list."""

    tokens: Tensor


@dataclass(frozen=True, kw_only=True)
class Control:
    """`pins` are pairs of a place and the token that stands there in every canvas that is read and in the answer.

    `draft` are tokens that canvases begin with instead of noise, from place 0 on; `NOISE` keeps the noise.
    Before the last pin no end token may stand, because the answer must reach it. `bans` are pairs of a token and the
    place where no prediction may have it (None: everywhere), `masks` of a place and many such tokens. `hook` is called
    after every step (see `hooks.StepView`).
    """

    pins: tuple[tuple[int, int], ...] = ()
    draft: tuple[int, ...] = ()
    constraint: Constraint | None = None
    bans: tuple[tuple[int, int | None], ...] = ()
    masks: tuple[tuple[int, Mask], ...] = ()
    hook: Hook | None = None

    def __post_init__(self) -> None:
        places = [place for place, _ in self.pins]
        if len(set(places)) < len(places):
            twice = next(place for place in places if places.count(place) > 1)
            raise RequestError(f"place {twice} of the answer is pinned twice; a place holds one token")
        if places and min(places) < 0:
            raise RequestError(f"places of the answer count from 0; got a pin at {min(places)}")

    def parse(self, text: str) -> Any:
        """The value that a finished answer spells; see `Constraint.parse`."""
        return None if self.constraint is None else self.constraint.parse(text)

    @property
    def reach(self) -> int:
        """Places up to and including the last pin: the least length of the answer."""
        return 1 + max((place for place, _ in self.pins), default=-1)

    def pins_of(self, start: int, width: int) -> dict[int, int]:
        """The pins of the canvas that begins at place `start`, by position inside it."""
        return {place - start: token for place, token in self.pins if start <= place < start + width}

    def draft_of(self, start: int, width: int) -> Sequence[int]:
        """The same of the draft; may be shorter than the canvas."""
        return self.draft[start : start + width]

    @property
    def banned(self) -> tuple[int, ...]:
        """The tokens banned everywhere."""
        return tuple(token for token, place in self.bans if place is None)

    def bans_of(self, start: int, width: int) -> dict[int, set[int]]:
        """The tokens banned at single positions of the canvas that begins at place `start`, by position inside it."""
        found: dict[int, set[int]] = {}
        for token, place in self.bans:
            if place is not None and start <= place < start + width:
                found.setdefault(place - start, set()).add(token)
        return found

    def masks_of(self, start: int, width: int) -> dict[int, Mask]:
        """The masks of the canvas that begins at place `start`, by position inside it."""
        return {place - start: mask for place, mask in self.masks if start <= place < start + width}

    def check(self, config: GenerationConfig, vocab: int) -> None:
        """A `RequestError` for what this configuration and vocabulary cannot do."""
        if self == NOTHING:
            return
        given = {
            "pins": self.pins,
            "a draft": self.draft,
            "a constraint": self.constraint,
            "bans of places": self.bans or self.masks,
        }
        asked = next((name for name, value in given.items() if value), "a hook")
        if config.mode != "diffusion":
            raise RequestError(f'{asked} acts on a canvas and needs mode "diffusion", got mode "{config.mode}"')
        if self.constraint is not None and (self.pins or self.draft or self.bans or self.masks):
            raise RequestError("a constraint cannot be combined with pins, bans or a draft; give one of them")
        if self.constraint is not None:
            self.constraint.check(config)
        if self.reach > config.max_new_tokens:
            raise RequestError(
                f"max_new_tokens is {config.max_new_tokens}, but the last pin stands at place {self.reach - 1}: "
                f"at least {self.reach} are needed"
            )
        named = (*(token for _, token in self.pins), *(token for token in self.draft if token != NOISE))
        for token in (*named, *(token for token, _ in self.bans)):
            if not 0 <= token < vocab:
                raise RequestError(f"token {token} is not in the vocabulary (ids 0..{vocab - 1})")
        self._check_bans(config, vocab)

    def _check_bans(self, config: GenerationConfig, vocab: int) -> None:
        everywhere = {*self.banned, *config.banned, *(config.stop_tokens if self.pins else ())}
        at = self.bans_of(0, config.max_new_tokens) if self.bans else {}
        for place, tokens in [(None, set[int]()), *at.items()]:
            if self.bans and len(everywhere | tokens) >= vocab:
                where = "everywhere" if place is None else f"at place {place}"
                raise RequestError(f"bans leave none of the {vocab} tokens of the vocabulary {where}")
        for place, mask in self.masks:
            if mask.tokens.shape != (vocab,):
                raise RequestError(f"a mask has an entry for each of {vocab} tokens; got shape {[*mask.tokens.shape]}")
            free = ~mask.tokens
            free[list(everywhere | at.get(place, set()))] = False
            if not free.any():
                raise RequestError(f"bans leave none of the {vocab} tokens of the vocabulary at place {place}")


NOTHING = Control()
