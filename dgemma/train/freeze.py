"""Which parameters train when: phases by readable names. Knows parameter names, no optimizer and no loop.

A frozen parameter gets no gradient, and an optimizer that skips what has none leaves its value and state alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from dgemma.config import is_whole
from dgemma.errors import ConfigError

EVERYTHING = "all"
# The first group of which a part occurs in a parameter's name owns it, so the order matters: q_norm is a norm.
_PARTS: dict[str, tuple[str, ...]] = {
    "self_conditioning": ("self_conditioning",),
    "canvas_embed": ("canvas_embed",),
    "norms": ("norm",),
    "router": ("router",),
    "experts": ("experts",),
    "attention": ("attention",),
    "mlp": ("mlp",),
    "embedding": ("embed",),
}
GROUPS = (*_PARTS, EVERYTHING)
"""The allowed names. Every parameter is in one group beside `all`; layer scalars are buffers and never train."""


@dataclass(frozen=True, kw_only=True)
class FreezePhase:
    """From `first_step` on only the groups in `train` (names of `GROUPS`) train, until the next phase begins."""

    first_step: int
    train: tuple[str, ...]

    def __post_init__(self) -> None:
        if not is_whole(self.first_step, 0):
            raise ConfigError(f"freeze: first_step must be a whole number of at least 0, got {self.first_step!r}")
        allowed = ", ".join(GROUPS)
        for name in self.train:
            if name not in GROUPS:
                raise ConfigError(f"freeze: unknown group {name!r}; allowed: {allowed}")
        if not self.train:
            raise ConfigError(f"freeze: the phase at step {self.first_step} trains nothing; allowed: {allowed}")


def group_of(name: str) -> str:
    """The group of a parameter of `DiffusionGemma` by its name; a `ConfigError` if it belongs to none."""
    parts = {piece for part in name.split(".") for piece in (part, part.rpartition("_")[2])}
    for group, keys in _PARTS.items():
        if not parts.isdisjoint(keys):
            return group
    raise ConfigError(f"parameter {name!r} belongs to no group of {', '.join(_PARTS)}")


def phase_at(phases: Sequence[FreezePhase], step: int) -> FreezePhase:
    """The phase that `step` belongs to. Phases must begin at step 0 and come in order (`ConfigError`)."""
    starts = [phase.first_step for phase in phases]
    if not starts or starts[0] != 0 or any(later <= earlier for earlier, later in pairwise(starts)):
        raise ConfigError(f"freeze: phases must begin at step 0 and come in rising order, got first steps {starts}")
    return max((phase for phase in phases if phase.first_step <= step), key=lambda phase: phase.first_step)


def apply_freeze(model: nn.Module, phases: Sequence[FreezePhase], step: int) -> None:
    """Set `requires_grad` of every parameter as the phase of `step` says; without phases nothing is touched.

    Depends on the step alone, so a resumed run continues in the right phase. Call it before the step's forward pass.
    Gradients left on what is frozen now are dropped. A phase that would train no parameter of this model (`router` of
    a dense one) is a `ConfigError`.
    """
    if not phases:
        return
    chosen, trained = phase_at(phases, step).train, 0
    for name, parameter in model.named_parameters():
        wanted = EVERYTHING in chosen or group_of(name) in chosen
        parameter.requires_grad_(wanted)
        trained += wanted
        if not wanted:
            parameter.grad = None
    if not trained:
        raise ConfigError(f"freeze: this model has no parameters in {', '.join(chosen)}")
