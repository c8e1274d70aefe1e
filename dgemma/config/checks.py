"""What values that a user gives are looked at for."""

from __future__ import annotations

from typing import TypeGuard


def is_whole(value: object, low: int | None = None, high: int | None = None) -> TypeGuard[int]:
    """Whether `value` is a whole number (a bool is none) in `low`..`high`; None is no bound."""
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    return (low is None or value >= low) and (high is None or value <= high)
