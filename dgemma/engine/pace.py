"""How far mode "verified" drafts: which canvas, how many steps, or none. Knows costs and acceptance, no tensors.

A draft of n tokens is worth 1 + a + a^2 + .. + a^n tokens, if each is accepted with probability a where those before it
were; it costs its steps and one encode pass. A plain autoregressive step is worth 1 and costs 1. What a is, the engine
learns for each width and number of steps, from this request and from all; what passes cost, from its own passes.
None of this can change the law of an answer, only its price.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from dgemma.config import GenerationConfig

_LEAST = 0.97  # of the speed of plain autoregression, which trying drafts may not fall below
_GRACE, _MOST = 16.0, 96.0  # what may be lost at first, and be saved up for later, in autoregressive tokens
_HOPE = 0.9  # acceptance, before any draft was tried
_BETTER = 0.75  # as often as drafts are refused on the whole, an untried kind is hoped to be
_FADE = 0.995  # what an observation weighs, one autoregressive token later
_OWN, _ALL = 12.0, 1.0  # tested tokens that the belief from all requests, and that hope, count for


@dataclass(frozen=True)
class Option:
    """A canvas that could be drafted: `width` positions, of which the first `lead` hold committed tokens; `tokens` of
    the others would be tested."""

    width: int
    lead: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """The canvas to draft, and the request's settings with the number of steps for it."""

    option: Option
    config: GenerationConfig

    @property
    def key(self) -> tuple[int, int]:
        return self.option.width, self.config.max_denoising_steps


@dataclass(frozen=True)
class Tally:
    """Fading counts of one width and number of steps, as of `clock`."""

    clock: float = 0.0
    tested: float = 0.0
    accepted: float = 0.0
    drafts: float = 0.0
    steps: float = 0.0

    def at(self, clock: float) -> Tally:
        share = _FADE ** (clock - self.clock)
        return Tally(clock, self.tested * share, self.accepted * share, self.drafts * share, self.steps * share)

    def plus(self, tested: int, accepted: int, steps: int) -> Tally:
        return Tally(self.clock, self.tested + tested, self.accepted + accepted, self.drafts + 1.0, self.steps + steps)


class Tallies:
    """The tallies of one request, or of all; `clock` counts what was spent, in autoregressive tokens."""

    def __init__(self) -> None:
        self.clock = 0.0
        self._kept: dict[tuple[int, int], Tally] = {}

    def get(self, key: tuple[int, int]) -> Tally:
        return self._kept.get(key, Tally()).at(self.clock)

    def add(self, key: tuple[int, int], tested: int, accepted: int, steps: int) -> None:
        self._kept[key] = self.get(key).plus(tested, accepted, steps)

    def whole(self) -> tuple[float, float]:
        """Tested and accepted tokens of all keys."""
        now = [self.get(key) for key in self._kept]
        return sum(tally.tested for tally in now), sum(tally.accepted for tally in now)


@dataclass
class Line:
    """Seconds of a pass as a + b * rows, fitted to relative errors; old passes fade."""

    sums: list[float] = field(default_factory=lambda: [0.0] * 5)
    _fit: tuple[float, float] | None = None

    def saw(self, rows: int, seconds: float) -> None:
        # A pass that was held up by something else says little of the next one.
        usual = self.seconds(rows)
        seconds = min(seconds, 4 * usual) if usual else seconds
        weight = 1 / seconds**2
        terms = (weight, weight * rows, weight * rows**2, weight * seconds, weight * rows * seconds)
        self.sums = [0.98 * old + new for old, new in zip(self.sums, terms, strict=True)]
        self._fit = None

    def seconds(self, rows: float) -> float:
        """0 before anything was seen."""
        if self._fit is None:
            self._fit = self._solve()
        return self._fit[0] + self._fit[1] * rows

    def _solve(self) -> tuple[float, float]:
        one, x, xx, t, xt = self.sums
        if not one:
            return 0.0, 0.0
        # As if a weak observer said that 16 rows cost twice what none does: two unknowns, maybe one kind of pass.
        weak = 0.01 * one
        one, xx, x = one + weak, xx + 256 * weak, x - 16 * weak
        a, b = (t * xx - x * xt) / (one * xx - x * x), (one * xt - x * t) / (one * xx - x * x)
        if b < 0:
            return t / one, 0.0
        return (a, b) if a > 0 else (0.0, xt / xx)


@dataclass
class Costs:
    """What passes cost a request, in autoregressive tokens. `canvas` is a fixed price of any pass over more than one
    token; None goes by what was measured."""

    canvas: float | None
    lines: dict[str, Line] = field(default_factory=lambda: {"encode": Line(), "denoise": Line()})

    def saw(self, kind: str, rows: int, seconds: float) -> None:
        if rows and self.canvas is None:
            self.lines[kind].saw(rows, max(seconds, 1e-9))

    def of(self, kind: str, rows: int, company: int) -> float:
        """A pass over `rows` tokens of one request, beside as many of each of `company` requests in all."""
        if self.canvas is not None:
            return self.canvas if rows > 1 or kind == "denoise" else 1.0
        token = self.lines["encode"].seconds(company)
        if not token:
            return 3.0 if rows > 1 else 1.0
        return (self.lines[kind].seconds(rows * company) or 1.5 * self.lines["encode"].seconds(rows * company)) / token


class Pace:
    """One for an engine, or for one request whose drafts must depend on nobody else."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self._all = Tallies()
        self._balance = _GRACE

    def choose(self, options: Iterable[Option], config: GenerationConfig, own: Tallies, company: int) -> Plan | None:
        """The draft that pays most; None if plain autoregression does, or if too much was lost on drafts of late."""
        best, rate = None, 1.0
        tested, accepted = self._all.whole()
        hope = 1 - _BETTER * (1 - (accepted + _HOPE) / (tested + 1)) if tested else _HOPE
        for option in options:
            for steps in levels(config.max_denoising_steps):
                key = option.width, steps
                cost = self._cost(option, self._steps(key), company)
                worst = self._cost(option, steps, company) - 1 / _LEAST
                worth = expected(self._acceptance(key, own, hope), option.tokens)
                if worst <= self._balance and worth / cost > rate:
                    best, rate = (option, steps), worth / cost
        return None if best is None else Plan(best[0], config.with_(max_denoising_steps=best[1]))

    def learn(self, plan: Plan | None, own: Tallies, tested: int, accepted: int, steps: int, company: int) -> None:
        """What came of a draft, or (None) that one token was written without. Whoever wants a draft at any price (pace
        "fixed") runs up no debt."""
        cost = 1.0 if plan is None else self._cost(plan.option, steps, company)
        self._all.clock += cost / company
        own.clock += cost
        if plan is not None:
            self._all.add(plan.key, tested, accepted, steps)
            own.add(plan.key, tested, accepted, steps)
        if plan is None or plan.config.verify_pace == "adaptive":
            self._balance = min(_MOST, self._balance + (accepted + 1) / _LEAST - cost)

    def _acceptance(self, key: tuple[int, int], own: Tallies, hope: float) -> float:
        """Of a token whose predecessors in the draft were accepted; `hope` where nothing was tried lately."""
        every, mine = self._all.get(key), own.get(key)
        belief = (every.accepted + _ALL * hope) / (every.tested + _ALL)
        return (mine.accepted + _OWN * belief) / (mine.tested + _OWN)

    def _steps(self, key: tuple[int, int]) -> float:
        """Steps that a draft of at most so many takes: the stop rule may end it early."""
        seen = self._all.get(key)
        return (seen.steps + 0.5 * key[1]) / (seen.drafts + 0.5)

    def _cost(self, option: Option, steps: float, company: int) -> float:
        return steps * self.costs.of("denoise", option.width, company) + self.costs.of(
            "encode", option.tokens + 1, company
        )


def levels(most: int) -> list[int]:
    """Numbers of steps that are tried: powers of two, and the most there may be."""
    return [*(1 << power for power in range(most.bit_length()) if 1 << power < most), most]


def expected(acceptance: float, tokens: int) -> float:
    """Tokens that come of a draft, the one that follows the accepted ones included."""
    a = min(acceptance, 1.0)
    return tokens + 1.0 if a > 1 - 1e-9 else (1 - a ** (tokens + 1)) / (1 - a)
