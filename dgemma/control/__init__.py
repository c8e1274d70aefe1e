"""What a caller may demand of a canvas. Knows ids, statistics and automata; no engine, no text model, no HTTP."""

from dgemma.control.control import NOISE, NOTHING, Control, Mask
from dgemma.control.hooks import Hook, StepView
from dgemma.control.protocol import Ask, Constraint, Solved, TokenClasses

__all__ = ["NOISE", "NOTHING", "Ask", "Constraint", "Control", "Hook", "Mask", "Solved", "StepView", "TokenClasses"]
