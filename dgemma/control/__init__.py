"""What a caller may demand of a canvas. Knows ids, statistics and automata; no engine, no text model, no HTTP."""

from dgemma.control.control import NOISE, NOTHING, Control
from dgemma.control.protocol import Ask, Constraint, Solved, TokenClasses

__all__ = ["NOISE", "NOTHING", "Ask", "Constraint", "Control", "Solved", "TokenClasses"]
