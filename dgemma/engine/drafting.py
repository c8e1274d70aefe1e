"""Where a request in mode "verified" stands between its passes: the draft that is made, and the one under test.

The last committed token has no keys and values yet: it stands pinned at the beginning of the canvas and is the first
row of the pass that verifies. A model that knows places of the canvas keeps its canvases where they are in mode
"diffusion", with all tokens of them pinned that are committed by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dgemma.config import GenerationConfig, ModelConfig
from dgemma.engine.pace import Option, Pace, Plan, Tallies

_PATIENCE = 8  # plain tokens between two questions whether a draft would pay


@dataclass(frozen=True, eq=False)
class Proposal:
    """A finished draft. `hidden [n, H]` and `bias` made the laws that it was drawn from, if it was drawn."""

    tokens: tuple[int, ...]
    steps: int
    stop: str
    hidden: Tensor | None = None
    bias: Tensor | None = None


@dataclass
class Drafting:
    """`plan` is the draft that is next, being made or under test; None: the next token is written without."""

    pace: Pace
    own: Tallies = field(default_factory=Tallies)
    plan: Plan | None = None
    proposal: Proposal | None = None
    accepted: list[int] = field(default_factory=list)
    """Of every draft so far."""
    wait: int = 0
    """Tokens to write without, before drafts are thought of again."""

    @property
    def due(self) -> bool:
        """Whether a canvas is to be denoised before the next token can be known."""
        return self.plan is not None and self.proposal is None

    @property
    def lead(self) -> int:
        return self.plan.option.lead if self.plan else 0

    def judged(self, accepted: int, tested: int, company: int) -> None:
        """An encode pass made tokens of the proposal, or one without."""
        steps = self.proposal.steps if self.proposal else 0
        if self.proposal is not None:
            self.accepted.append(accepted)
        self.pace.learn(self.plan, self.own, tested, accepted, steps, company)
        self.plan = self.proposal = None

    def think(
        self, config: GenerationConfig, model: ModelConfig, length: int, answered: int, room: int, company: int
    ) -> None:
        """Plan what comes after `length` tokens, of which the last `answered` are the answer's; `room` may follow."""
        if self.wait:
            self.wait -= 1
            return
        found = options(config, model, length, answered, room)
        if config.verify_pace == "fixed":
            widest = max(found, key=lambda option: option.width, default=None)
            self.plan = None if widest is None else Plan(widest, config)
        else:
            self.plan = self.pace.choose(found, config, self.own, company)
            self.wait = 0 if self.plan else _PATIENCE


def options(config: GenerationConfig, model: ModelConfig, length: int, answered: int, room: int) -> Sequence[Option]:
    """The canvases that could be drafted there, the narrowest first."""
    found = []
    for width in widths(config, model):
        lead = answered % width if model.canvas_positions else 1
        # At a border between placed canvases nothing is pinned, so the last token would be unknown to the canvas.
        tokens = min(width - lead, room - 1) if lead else 0
        if tokens > 0 and length - lead + width <= model.max_positions:
            found.append(Option(width, lead, tokens))
    return found


def widths(config: GenerationConfig, model: ModelConfig) -> list[int]:
    """Widths of canvases to draft on, ascending: the one asked for, or the checkpoint's own and all of its training."""
    usual = config.canvas_length or model.canvas_length
    fixed = config.canvas_length or config.narrow == "never" or config.verify_pace == "fixed" or model.canvas_positions
    return [usual] if fixed else model.trained_widths
