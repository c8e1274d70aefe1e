"""From an automaton over bytes and a vocabulary to one over tokens, with explicit states and token classes.

Two tokens are of one class when they move every state alike. A token's move is a partial map of states; the maps grow
along the vocabulary's tree of bytes, and equal maps are kept once, so the work does not grow with states x vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dgemma.control.language.regex import ByteAutomaton
from dgemma.control.language.vocabulary import Ints, Vocabulary
from dgemma.errors import RequestError

MOST_STATES = 20_000
MOST_CLASSES = 20_000
MOST_EDGES = 2_000_000
_MOST_ROUNDS = 300
_MOST_PAIRS = 40_000_000  # of maps, while they grow
UNREACHABLE = np.iinfo(np.int64).max // 2


@dataclass(frozen=True, eq=False)
class TokenEdges:
    """State 0 is the start, from every state the end can be reached. Edge e leads from `source[e]` by a token of class
    `by[e]` to `target[e]`; `of [V]` is each token's class (0: no state allows it), `count` how many classes there are.
    """

    source: Ints
    by: Ints
    target: Ints
    accepting: NDArray[np.bool_]
    of: Ints
    count: int

    @property
    def states(self) -> int:
        return len(self.accepting)

    @property
    def distance(self) -> Ints:
        """Of each state, how many tokens the shortest way to an accepting one takes."""
        return _distances(self.target, self.source, self.states, np.flatnonzero(self.accepting))


def compile_tokens(text: ByteAutomaton, vocabulary: Vocabulary) -> TokenEdges:
    """The token automaton of the same texts; `RequestError` if the vocabulary can spell none, or it is too large."""
    token_map, begin, source, target = _maps(text, vocabulary)
    used = np.unique(token_map[token_map >= 0])
    counts = begin[used + 1] - begin[used]
    places = _ranges(begin[used], counts)
    edges = TokenEdges(
        source[places], np.repeat(used, counts), target[places], text.accepting, token_map, len(begin) - 1
    )
    return trim(merged(trim(edges)))


def merged(edges: TokenEdges) -> TokenEdges:
    """With states that nothing tells apart made one (Moore's refinement, by hashes); as it is where that takes long."""
    first = np.flatnonzero(np.diff(edges.source, prepend=-1))
    going = edges.source[first]
    colour = edges.accepting.astype(np.int64)
    count = 0
    for _ in range(_MOST_ROUNDS):
        key = _mixed(colour, np.zeros_like(colour))
        key[going] += _sums(_mixed(edges.by, colour[edges.target]), first)
        kinds, colour = np.unique(key, return_inverse=True)
        if len(kinds) == count:
            break
        count = len(kinds)
    else:
        return edges
    # The start keeps number 0.
    rank = np.arange(count)
    rank[[0, colour[0]]] = rank[[colour[0], 0]]
    colour = rank[colour]
    accepting = np.zeros(count, dtype=np.bool_)
    accepting[colour] = edges.accepting
    once = np.unique(np.stack([colour[edges.source], colour[edges.target], edges.by]), axis=1)
    return TokenEdges(once[0], once[2], once[1], accepting, edges.of, edges.count)


def trim(edges: TokenEdges) -> TokenEdges:
    """Without states that are not on a way from the start to the end; equal classes become one, in order of their
    lowest token."""
    forward = _distances(edges.source, edges.target, edges.states, np.zeros(1, dtype=np.int64))
    live = (forward < UNREACHABLE) & (edges.distance < UNREACHABLE)
    if not live[0]:
        raise RequestError("the constraint allows no answer that this vocabulary can spell")
    number = np.cumsum(live) - 1
    kept = live[edges.source] & live[edges.target]
    source, by, target = number[edges.source[kept]], edges.by[kept], number[edges.target[kept]]
    order = np.argsort(by, kind="stable")
    source, by, target = source[order], by[order], target[order]
    olds, first = np.unique(by, return_index=True)
    sums = _sums(_mixed(source, target), first)
    lowest = _lowest_tokens(edges.of, edges.count)[olds]
    _, same = np.unique(sums, return_inverse=True)
    least = np.full(same.max(initial=-1) + 1, UNREACHABLE)
    np.minimum.at(least, same, lowest)
    rank = np.argsort(np.argsort(least))
    renamed = np.zeros(edges.count + 1, dtype=np.int64)  # the last is for tokens without a class (-1)
    renamed[olds] = 1 + rank[same]
    of = renamed[edges.of]
    one = np.zeros(len(olds), dtype=np.bool_)
    one[np.unique(same, return_index=True)[1]] = True
    first_only = np.repeat(one, np.diff(np.append(first, len(by))))
    source, by, target = source[first_only], renamed[by[first_only]], target[first_only]
    order = np.lexsort((by, target, source))
    made = TokenEdges(source[order], by[order], target[order], edges.accepting[live], of, 1 + len(least))
    for what, count, most in (
        ("states", made.states, MOST_STATES),
        ("token classes", made.count, MOST_CLASSES),
        ("edges", len(made.source), MOST_EDGES),
    ):
        if count > most:
            raise RequestError(f"the constraint's automaton has {count} {what}, at most {most} are allowed")
    return made


def _maps(text: ByteAutomaton, vocabulary: Vocabulary) -> tuple[Ints, Ints, Ints, Ints]:
    """Each token's map (-1: empty), and the maps: pairs from `begin[m]` to `begin[m + 1]` of source and target."""
    columns, byte_class = np.unique(text.next, axis=1, return_inverse=True)
    columns = columns.astype(np.int64)
    states = np.arange(len(text.next), dtype=np.int64)
    begin, source, target = [0, len(states)], [states], [states]
    known: dict[int, int] = {}
    token_map = np.full(vocabulary.size, -1, dtype=np.int64)
    above = np.zeros(1, dtype=np.int64)
    width = columns.shape[1]
    for level in vocabulary.levels:
        old = above[level.parent]
        alive = np.flatnonzero(old >= 0)
        keys, key_of = np.unique(old[alive] * width + byte_class.ravel()[level.byte[alive]], return_inverse=True)
        maps, letters = keys // width, keys % width
        starts = np.array(begin, dtype=np.int64)
        counts = starts[maps + 1] - starts[maps]
        if int(counts.sum()) + begin[-1] > _MOST_PAIRS:
            raise RequestError("the constraint's automaton is too large for this vocabulary; use smaller repeats")
        places = _ranges(starts[maps], counts)
        whole_source, whole_target = np.concatenate(source), np.concatenate(target)
        come, go = whole_source[places], columns[whole_target[places], np.repeat(letters, counts)]
        owner = np.repeat(np.arange(len(keys)), counts)[go >= 0]
        come, go = come[go >= 0], go[go >= 0]
        sizes = np.bincount(owner, minlength=len(keys))
        filled = np.flatnonzero(sizes)
        ends = np.cumsum(sizes)
        named = np.full(len(keys), -1, dtype=np.int64)
        if len(filled):
            sums = _sums(_mixed(come, go), (ends - sizes)[filled])
            fresh: list[int] = []
            for place, total in zip(filled.tolist(), sums.tolist(), strict=True):
                if total not in known:
                    known[total] = len(begin) - 1
                    begin.append(begin[-1] + int(sizes[place]))
                    fresh.append(place)
                named[place] = known[total]
            chosen = np.array(fresh, dtype=np.int64)
            new = _ranges((ends - sizes)[chosen], sizes[chosen])
            source, target = [whole_source, come[new]], [whole_target, go[new]]
        now = np.full(len(level.byte), -1, dtype=np.int64)
        now[alive] = named[key_of]
        token_map[level.tokens] = now[level.at]
        above = now
    return token_map, np.array(begin, dtype=np.int64), np.concatenate(source), np.concatenate(target)


def _distances(source: Ints, target: Ints, states: int, start: Ints) -> Ints:
    """Of each state, the fewest edges from any of `start` to it."""
    pairs = np.unique(source * states + target)
    source, target = pairs // states, pairs % states
    begin = np.searchsorted(source, np.arange(states + 1))
    found = np.full(states, UNREACHABLE, dtype=np.int64)
    found[start] = 0
    front, steps = start, 0
    while len(front):
        steps += 1
        after = np.unique(target[_ranges(begin[front], begin[front + 1] - begin[front])])
        front = after[found[after] == UNREACHABLE]
        found[front] = steps
    return found


def _ranges(starts: Ints, counts: Ints) -> Ints:
    """`start, start + 1, ..` of each range, end to end."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - counts), counts)


def _mixed(source: Ints, target: Ints) -> NDArray[np.uint64]:
    """64 mixed bits of each pair (SplitMix64's finaliser), to be added up."""
    x = source.astype(np.uint64) << np.uint64(32) | target.astype(np.uint64)
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def _sums(values: NDArray[np.uint64], first: Ints) -> NDArray[np.uint64]:
    """Sums (modulo 2^64) of the runs of `values` that begin at `first`."""
    return np.add.reduceat(values, first) if len(first) else values[:0]


def _lowest_tokens(of: Ints, count: int) -> Ints:
    lowest = np.full(count + 1, UNREACHABLE, dtype=np.int64)
    np.minimum.at(lowest, of, np.arange(len(of)))
    return lowest[:-1]
