"""The constrained posterior of a canvas: forward-backward, most likely path and a joint draw, over an automaton.

The programme runs over positions x arcs. An arc joins two states by a *set* of classes; a set's weight at a position
is summed once, however many arcs share it. All in logarithms, so that no way is lost that only the end makes necessary.
Knows classes and states, no tokens. Positions n, classes K, states S, sets G, members of all sets M.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dgemma.control.language.vocabulary import Ints

Floats = NDArray[np.float64]
_AT_ONCE = 1 << 22  # entries of a positions x members table


@dataclass(frozen=True, eq=False)
class Arcs:
    """Arcs sorted by `source`: those of state s are `begin[s]` to `begin[s + 1]`; at least one in all. Arc a takes any
    class of set `label[a]`; set g has the classes `members[first[g]]` to `members[first[g + 1]]`, ascending.
    """

    source: Ints
    target: Ints
    label: Ints
    begin: Ints
    members: Ints
    first: Ints
    by_class: Ints
    """The members sorted by class; `class_first` are where the classes `classes` begin in that order."""
    classes: Ints
    class_first: Ints

    @property
    def states(self) -> int:
        return len(self.begin) - 1

    @staticmethod
    def of(source: Ints, by: Ints, target: Ints, states: int) -> Arcs:
        """From edges of one class each."""
        order = np.lexsort((by, target, source))
        source, by, target = source[order], by[order], target[order]
        pair = source * states + target
        heads = np.flatnonzero(np.diff(pair, prepend=-1))
        sizes = np.diff(np.append(heads, len(pair)))
        sets: dict[bytes, int] = {}
        label = np.empty(len(heads), dtype=np.int64)
        for arc, (head, size) in enumerate(zip(heads.tolist(), sizes.tolist(), strict=True)):
            label[arc] = sets.setdefault(by[head : head + size].tobytes(), len(sets))
        lists = [np.frombuffer(raw, dtype=np.int64) for raw in sets]
        members = np.concatenate(lists)
        by_class = np.argsort(members, kind="stable")
        classes, class_first = np.unique(members[by_class], return_index=True)
        return Arcs(
            source=source[heads],
            target=target[heads],
            label=label,
            begin=np.searchsorted(source[heads], np.arange(states + 1)),
            members=members,
            first=np.cumsum([0, *(len(one) for one in lists)]),
            by_class=by_class,
            classes=classes,
            class_first=class_first,
        )


@dataclass(frozen=True, eq=False)
class Posterior:
    """`total` is the log of the summed probability of all allowed paths. `weight [n, K]`: log-factors, see
    `protocol.Solved`. `path`, `drawn [n]`: classes; `states [n + 1]` are what the most likely path goes through."""

    total: float
    weight: Floats
    path: Ints
    drawn: Ints
    states: Ints


def solve(arcs: Arcs, logsum: Floats, best: Floats, start: int, good: NDArray[np.bool_], uniforms: Floats) -> Posterior:
    """`good [S]` are the states in which the canvas may end; `uniforms [n]` in [0, 1) feed the draw.

    A `total` of minus infinity says that there is no allowed path; the rest then means nothing.
    """
    n, owner = len(logsum), np.repeat(np.arange(len(arcs.first) - 1), np.diff(arcs.first))
    set_sum, set_best = _per_set(arcs, logsum, owner), _set_best(arcs, best)
    after, onward = _backward(arcs, set_sum, set_best, good)
    total = float(after[0, start])
    classes = logsum.shape[1]
    mass = np.zeros((n, len(arcs.first) - 1))
    path, drawn = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
    states = np.full(n + 1, start, dtype=np.int64)
    if total == -np.inf:
        return Posterior(total, np.full((n, classes), -np.inf), path, drawn, states)
    here = np.zeros(arcs.states)
    here[start], at = 1.0, start
    for i in range(n):
        known = np.where(after[i] > -np.inf, after[i], 0.0)
        chance = np.exp(set_sum[i][arcs.label] + after[i + 1][arcs.target] - known[arcs.source])
        flow = here[arcs.source] * chance
        mass[i] = np.bincount(arcs.label, flow, mass.shape[1])
        here = np.bincount(arcs.target, flow, arcs.states).astype(np.float64)
        at, drawn[i] = _draw(arcs, chance, logsum[i], set_sum[i], at, float(uniforms[i]))
        states[i + 1], path[i] = _best(arcs, set_best[i], onward[i + 1], best[i], int(states[i]))
    return Posterior(total, _weights(arcs, mass, set_sum, owner, classes), path, drawn, states)


def _backward(arcs: Arcs, set_sum: Floats, set_best: Floats, good: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Of each position and state `[n + 1, S]`: log-sum and log-maximum over all ways from there to a good end."""
    n, counts = len(set_sum), np.diff(arcs.begin)
    going = np.flatnonzero(counts)  # states that some arc leaves
    heads, sizes = arcs.begin[going], counts[going]
    after = np.full((n + 1, arcs.states), -np.inf)
    after[n, good] = 0.0
    onward = after.copy()
    with np.errstate(divide="ignore"):
        for i in reversed(range(n)):
            way = set_sum[i][arcs.label] + after[i + 1][arcs.target]
            top = np.maximum.reduceat(way, heads)
            top[top == -np.inf] = 0.0
            way -= np.repeat(top, sizes)
            after[i, going] = top + np.log(np.add.reduceat(np.exp(way, out=way), heads))
            onward[i, going] = np.maximum.reduceat(set_best[i][arcs.label] + onward[i + 1][arcs.target], heads)
    return after, onward


def _draw(arcs: Arcs, chance: Floats, logsum: Floats, set_sum: Floats, at: int, uniform: float) -> tuple[int, int]:
    """One step of the posterior chain: the next state and a class that leads there, by one uniform."""
    begin, end = int(arcs.begin[at]), int(arcs.begin[at + 1])
    curve = chance[begin:end].cumsum()
    mark = uniform * curve[-1]
    arc = _pick(curve, mark)
    below = curve[arc - 1] if arc else 0.0
    inside = (mark - below) / (curve[arc] - below)
    label = arcs.label[begin + arc]
    members = arcs.members[arcs.first[label] : arcs.first[label + 1]]
    inner = np.exp(logsum[members] - set_sum[label]).cumsum()
    return int(arcs.target[begin + arc]), int(members[_pick(inner, inside * inner[-1])])


def _pick(curve: Floats, mark: float) -> int:
    """The first entry whose running sum exceeds the mark; none without mass, and never past the last one with mass."""
    place = int(np.searchsorted(curve, mark, side="right"))
    return min(place, int(np.searchsorted(curve, curve[-1], side="left")))


def _best(arcs: Arcs, set_best: Floats, onward: Floats, best: Floats, at: int) -> tuple[int, int]:
    """One step of the most likely path; ties go to the lowest state, then to the lowest class."""
    begin, end = int(arcs.begin[at]), int(arcs.begin[at + 1])
    arc = begin + int((set_best[arcs.label[begin:end]] + onward[arcs.target[begin:end]]).argmax())
    label = arcs.label[arc]
    members = arcs.members[arcs.first[label] : arcs.first[label + 1]]
    return int(arcs.target[arc]), int(members[best[members].argmax()])


def _per_set(arcs: Arcs, logsum: Floats, owner: Ints) -> Floats:
    """Log-sum of each set's members `[n, G]`."""
    out = np.empty((len(logsum), len(arcs.first) - 1))
    for rows in _few_rows(len(logsum), len(arcs.members)):
        each = logsum[rows][:, arcs.members]
        out[rows] = _logsum_runs(each, arcs.first[:-1], owner)
    return out


def _set_best(arcs: Arcs, best: Floats) -> Floats:
    out = np.empty((len(best), len(arcs.first) - 1))
    for rows in _few_rows(len(best), len(arcs.members)):
        out[rows] = np.maximum.reduceat(best[rows][:, arcs.members], arcs.first[:-1], axis=1)
    return out


def _weights(arcs: Arcs, mass: Floats, set_sum: Floats, owner: Ints, classes: int) -> Floats:
    """Log-factors of each class from the posterior `mass [n, G]` of each set: those of its sets, added up."""
    with np.errstate(divide="ignore"):
        factor = np.log(mass)
    np.subtract(factor, set_sum, out=factor, where=mass > 0)
    out = np.full((len(mass), classes), -np.inf)
    sets_by_class = owner[arcs.by_class]
    runs = np.repeat(np.arange(len(arcs.classes)), np.diff(np.append(arcs.class_first, len(arcs.members))))
    for rows in _few_rows(len(mass), len(arcs.members)):
        out[rows, arcs.classes] = _logsum_runs(factor[rows][:, sets_by_class], arcs.class_first, runs)
    return out


def _logsum_runs(values: Floats, first: Ints, run: Ints) -> Floats:
    """Log-sum-exp of the runs of each row that begin at `first`; `run` is the run of each entry."""
    top = np.maximum.reduceat(values, first, axis=1)
    top[top == -np.inf] = 0.0
    with np.errstate(divide="ignore"):
        sums: Floats = np.log(np.add.reduceat(np.exp(values - top[:, run]), first, axis=1))
    return top + sums


def _few_rows(rows: int, members: int) -> list[slice]:
    size = max(1, _AT_ONCE // max(1, members))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
