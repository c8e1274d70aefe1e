"""What a request demands of its answer beyond parameters: pinned tokens, a draft to start from, a constraint, a hook.

Places count from 0 at the answer's first token. Knows ids only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dgemma.config import GenerationConfig
from dgemma.control.protocol import Constraint
from dgemma.errors import RequestError

NOISE = -1
"""In a draft: nothing is proposed for this place."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """`pins` are pairs of a place and the token that stands there in every canvas that is read and in the answer.

    `draft` are tokens that canvases begin with instead of noise, from place 0 on; `NOISE` keeps the noise.
    Before the last pin no end token may stand, because the answer must reach it.
    """

    pins: tuple[tuple[int, int], ...] = ()
    draft: tuple[int, ...] = ()
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        places = [place for place, _ in self.pins]
        if len(set(places)) < len(places):
            twice = next(place for place in places if places.count(place) > 1)
            raise RequestError(f"place {twice} of the answer is pinned twice; a place holds one token")
        if places and min(places) < 0:
            raise RequestError(f"places of the answer count from 0; got a pin at {min(places)}")

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

    def check(self, config: GenerationConfig, vocab: int) -> None:
        """A `RequestError` for what this configuration and vocabulary cannot do."""
        if self == NOTHING:
            return
        asked = "pins" if self.pins else "a draft" if self.draft else "a constraint"
        if config.mode != "diffusion":
            raise RequestError(f'{asked} acts on a canvas and needs mode "diffusion", got mode "{config.mode}"')
        if self.constraint is not None and (self.pins or self.draft):
            raise RequestError("a constraint cannot be combined with pins or a draft; give one of them")
        if self.reach > config.max_new_tokens:
            raise RequestError(
                f"max_new_tokens is {config.max_new_tokens}, but the last pin stands at place {self.reach - 1}: "
                f"at least {self.reach} are needed"
            )
        for token in (*(token for _, token in self.pins), *(token for token in self.draft if token != NOISE)):
            if not 0 <= token < vocab:
                raise RequestError(f"token {token} is not in the vocabulary (ids 0..{vocab - 1})")


NOTHING = Control()
