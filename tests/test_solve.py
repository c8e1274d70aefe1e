"""The programme over positions, states and classes, against every path written out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from chance import SURE, fits

from dgemma.control.language.automaton import TokenEdges, trim
from dgemma.control.language.solve import Arcs, Posterior, solve
from dgemma.errors import RequestError

TOKENS = 5


class Small:
    """A random automaton of at most 4 states over 5 tokens, a model's probabilities at n positions, and an end."""

    def __init__(self, seed: int, positions: int | None = None) -> None:
        random = np.random.default_rng(seed)
        self.n = int(random.integers(1, 7)) if positions is None else positions
        states = int(random.integers(1, 5))
        density = random.choice([0.25, 0.5, 0.9])
        self.next = np.where(
            random.random((states, TOKENS)) < density, random.integers(0, states, (states, TOKENS)), -1
        )
        self.good = random.random(states) < 0.5
        self.good[random.integers(states)] = True
        source, token = np.nonzero(self.next >= 0)
        self.edges = trim(TokenEdges(source, token, self.next[source, token], self.good, np.arange(TOKENS), TOKENS))
        scale = random.choice([1.0, 4.0])
        logits = random.normal(size=(self.n, TOKENS)) * scale
        self.logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        self.of = self.edges.of
        self.uniforms = random.random(self.n)

    def per_class(self) -> tuple[np.ndarray, np.ndarray]:
        logsum = np.full((self.n, self.edges.count), -math.inf)
        best = logsum.copy()
        for kind in range(self.edges.count):
            mine = self.logp[:, self.of == kind]
            if mine.size:
                logsum[:, kind], best[:, kind] = np.log(np.exp(mine).sum(axis=1)), mine.max(axis=1)
        return logsum, best

    def solve(self, uniforms: np.ndarray | None = None) -> Posterior:
        arcs = Arcs.of(self.edges.source, self.edges.by, self.edges.target, self.edges.states)
        draws = self.uniforms if uniforms is None else uniforms
        return solve(arcs, *self.per_class(), 0, self.edges.accepting, draws)

    def paths(self) -> list[tuple[tuple[int, ...], float]]:
        """Every allowed token sequence and its log-probability, by walking the table that it was made of."""
        found = []
        for tokens in itertools.product(range(TOKENS), repeat=self.n):
            state = 0
            for token in tokens:
                state = self.next[state, token] if state >= 0 else -1
            if state >= 0 and self.good[state]:
                found.append((tokens, float(sum(self.logp[i, t] for i, t in enumerate(tokens)))))
        return found


def smalls(count: int) -> list[Small]:
    found, seed = [], 0
    while len(found) < count:
        seed += 1
        try:
            small = Small(seed)
        except RequestError:  # the end cannot be reached at all
            continue
        if len(small.edges.source):
            found.append(small)
    return found


def test_equal_to_every_path_written_out() -> None:
    empty = done = 0
    for small in smalls(300):
        paths, got = small.paths(), small.solve()
        if not paths:
            assert got.total == -math.inf
            empty += 1
            continue
        total = math.log(sum(math.exp(p) for _, p in paths))
        assert got.total == pytest.approx(total, abs=1e-9)
        marginal = np.zeros((small.n, TOKENS))
        for tokens, logp in paths:
            marginal[np.arange(small.n), list(tokens)] += math.exp(logp - total)
        told = np.exp(small.logp + got.weight[:, small.of])
        told /= told.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(told, marginal, atol=1e-9)
        best = max(logp for _, logp in paths)
        _, per_token = small.per_class()
        assert per_token[np.arange(small.n), got.path].sum() == pytest.approx(best, abs=1e-9)
        classes = {tuple(small.of[list(tokens)]) for tokens, _ in paths}
        assert tuple(got.path) in classes and tuple(got.drawn) in classes
        done += 1
    assert done > 200 and empty > 5


def test_every_automaton_of_two_states_and_two_tokens() -> None:
    random = np.random.default_rng(5)
    seen = 0
    for table in itertools.product((-1, 0, 1), repeat=4):
        for good in ((True, False), (False, True), (True, True)):
            small = Small.__new__(Small)
            small.n, small.next, small.good = 4, np.array(table).reshape(2, 2), np.array(good)
            small.logp = np.log(random.dirichlet(np.ones(2), 4))
            small.uniforms = random.random(4)
            source, token = np.nonzero(small.next >= 0)
            edges = TokenEdges(source, token, small.next[source, token], small.good, np.arange(2), 2)
            paths = [
                (tokens, sum(small.logp[i, t] for i, t in enumerate(tokens)))
                for tokens in itertools.product(range(2), repeat=4)
                if _ends_well(small, tokens)
            ]
            try:
                small.edges = trim(edges)
            except RequestError:
                assert not paths
                continue
            small.of = small.edges.of
            if not len(small.edges.source):
                assert not paths
                continue
            got = small.solve()
            assert math.exp(got.total) == pytest.approx(sum(math.exp(p) for _, p in paths), abs=1e-12)
            seen += bool(paths)
    assert seen > 100


def _ends_well(small: Small, tokens: tuple[int, ...]) -> bool:
    state = 0
    for token in tokens:
        state = small.next[state, token] if state >= 0 else -1
    return bool(state >= 0 and small.good[state])


def test_joint_draws_follow_the_posterior() -> None:
    tested = 0
    for small in smalls(400):
        paths = small.paths()
        kinds: dict[tuple[int, ...], float] = {}
        for tokens, logp in paths:
            key = tuple(small.of[list(tokens)])
            kinds[key] = kinds.get(key, 0.0) + math.exp(logp)
        if not 3 <= len(kinds) <= 60 or min(kinds.values()) / sum(kinds.values()) < 1e-3:
            continue
        random = np.random.default_rng(1)
        counts = dict.fromkeys(kinds, 0)
        for _ in range(4000):
            counts[tuple(small.solve(random.random(small.n)).drawn)] += 1
        law = torch.tensor(list(kinds.values()), dtype=torch.float64)
        assert fits(torch.tensor(list(counts.values())), law / law.sum()) > SURE
        tested += 1
        if tested == 4:
            return
    raise AssertionError(f"only {tested} automata had draws to test")


def test_a_way_that_only_the_end_makes_necessary_is_not_lost() -> None:
    """A thousand nats against it at every position, for 256 positions: far below what a float64 can hold."""
    source, by, target = np.array([0, 0, 1]), np.array([1, 2, 2]), np.array([0, 1, 1])
    arcs = Arcs.of(source, by, target, 2)
    logsum = np.tile([-np.inf, 0.0, -1000.0], (256, 1))
    logsum[-1, 1] = -np.inf
    got = solve(arcs, logsum, logsum, 0, np.array([False, True]), np.full(256, 0.5))
    assert got.path.tolist() == [1] * 255 + [2] and got.drawn.tolist() == got.path.tolist()
    assert got.total == pytest.approx(-1000.0)
    first = np.tile([-np.inf, -1000.0, 0.0], (256, 1))
    stay = solve(arcs, first, first, 0, np.array([True, False]), np.full(256, 0.5))
    assert stay.total == pytest.approx(-256_000.0) and set(stay.path) == {1}


def test_a_tie_goes_to_the_lowest_class() -> None:
    arcs = Arcs.of(np.array([0, 0]), np.array([1, 2]), np.array([0, 0]), 1)
    same = np.log(np.tile([0.0, 0.5, 0.5], (3, 1)) + 1e-300)
    assert solve(arcs, same, same, 0, np.array([True]), np.zeros(3)).path.tolist() == [1, 1, 1]
