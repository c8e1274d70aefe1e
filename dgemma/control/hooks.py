"""What a hook sees of a denoising step, and what it may demand: a `StepView`. Knows ids and statistics, no engine.

A hook is any callable that takes one. It is called after every step of every canvas of its request, in the engine's
thread, while all other requests wait. What it reads is a copy; what it demands is done after it returned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from dgemma.config import is_whole
from dgemma.errors import RequestError


@dataclass
class Demands:
    """What a hook asked for in one step, by place in the answer. An accepted token of None is the step's draw."""

    pins: dict[int, int] = field(default_factory=dict)
    bans: dict[tuple[int, int | None], None] = field(default_factory=dict)
    accepts: dict[int, int | None] = field(default_factory=dict)
    stop: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class StepTensors:
    """The tensors of a step, `[C]` each; `ids` are what the network read."""

    ids: Tensor
    argmax: Tensor
    entropy: Tensor
    top_logprob: Tensor
    draw: Tensor
    accepted: Tensor


class StepView:
    """One denoising step of one canvas.

    Tuples have an entry for every position of the canvas; `places` are the same positions counted from the answer's
    first token, as all methods count them. `step` counts up from 1. `mean_entropy` is over positions without a pin.
    """

    def __init__(
        self,
        tensors: StepTensors,
        *,
        request: int,
        canvas: int,
        step: int,
        max_steps: int,
        start: int,
        limit: int,
        vocab: int,
        pins: dict[int, int],
        bound: bool = False,
    ) -> None:
        """`start` is the place of position 0, `limit` the answer's length at most, `pins` are by place.

        `bound` tells that a constraint decides what may stand where.
        """
        self.request, self.canvas, self.step, self.max_steps = request, canvas, step, max_steps
        self.places = range(start, start + tensors.ids.shape[0])
        self.pins = dict(pins)
        self.demands = Demands()
        self._tensors, self._limit, self._vocab, self._bound = tensors, limit, vocab, bound
        self._open = True

    @cached_property
    def ids(self) -> tuple[int, ...]:
        """What the network read in this step."""
        return tuple(self._tensors.ids.tolist())

    @cached_property
    def argmax(self) -> tuple[int, ...]:
        """The prediction: what would be committed if the canvas ended now."""
        return tuple(self._tensors.argmax.tolist())

    @cached_property
    def entropy(self) -> tuple[float, ...]:
        """In nats, of each position's prediction at this step's temperature."""
        return tuple(self._tensors.entropy.tolist())

    @cached_property
    def top_logprob(self) -> tuple[float, ...]:
        """In nats, of the argmax, at this step's temperature."""
        return tuple(self._tensors.top_logprob.tolist())

    @cached_property
    def draw(self) -> tuple[int, ...]:
        """One token drawn from each position's prediction; where it is accepted, the next step reads it."""
        return tuple(self._tensors.draw.tolist())

    @cached_property
    def accepted(self) -> tuple[bool, ...]:
        """Where the next step reads the draw; elsewhere it reads noise, or a pin."""
        return tuple(self._tensors.accepted.tolist())

    @property
    def mean_entropy(self) -> float:
        """0 if every position has a pin."""
        free = [value for place, value in zip(self.places, self.entropy, strict=True) if place not in self.pins]
        return sum(free) / max(1, len(free))

    def pin(self, place: int, token: int) -> None:
        """From now on `token` stands at `place`: in this canvas, or in a later one. There is no way back."""
        self._unbound("pin")
        self._place(place, self._limit, f"the answer has at most {self._limit} tokens")
        self.demands.pins[place] = self._token(token)

    def ban(self, token: int, place: int | None = None) -> None:
        """From now on no prediction has `token`: anywhere, or at that place. A pin is no prediction."""
        self._unbound("ban")
        if place is not None:
            self._place(place, self._limit, f"the answer has at most {self._limit} tokens")
        self.demands.bans[self._token(token), place] = None

    def accept(self, place: int, token: int | None = None) -> None:
        """The next step reads `token` at `place` of this canvas, or the draw; the one after it is decided anew."""
        self._place(place, self.places.stop, f"this canvas ends at {self.places.stop - 1}")
        if place in self.pins or place in self.demands.pins:
            raise RequestError(f"place {place} is pinned; only a place without a pin can be accepted")
        self.demands.accepts[place] = None if token is None else self._token(token)

    def stop(self) -> None:
        """End this canvas with this step's prediction."""
        self._check_open()
        self.demands.stop = True

    def close(self) -> None:
        """The hook has returned: later demands would be lost, so they are refused."""
        self._open = False

    def _check_open(self) -> None:
        if not self._open:
            raise RequestError("a hook can demand something only while it runs; this step is over")

    def _unbound(self, what: str) -> None:
        if self._bound:
            raise RequestError(f"a hook cannot {what} where the request has a constraint; it may accept and stop")

    def _place(self, place: int, end: int, why: str) -> None:
        self._check_open()
        if not (is_whole(place) and self.places.start <= place < end):
            raise RequestError(
                f"place {place!r} is not one that can change; they are {self.places.start}..{end - 1} here ({why}, "
                f"and what is committed stays)"
            )

    def _token(self, token: int) -> int:
        self._check_open()
        if not is_whole(token, 0, self._vocab - 1):
            raise RequestError(f"token {token!r} is not in the vocabulary (ids 0..{self._vocab - 1})")
        return token


Hook = Callable[[StepView], object]
"""What it returns is not looked at."""
