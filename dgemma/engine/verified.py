"""`mode="verified"`: a canvas drafts, the encoder judges the draft in the pass that would commit it anyway.

Where there is no draft, this is a step of `mode="ar"`, which is judged here, too: no drafted token, one that follows.
The same ops make the laws of both, row by row; where they keep their bits for any number of rows
(`docs/verified.md`), so do the laws. The rule itself is `dgemma.control.verify`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dgemma.config import GenerationConfig, ModelConfig
from dgemma.control.verify import judge_draws, judge_points
from dgemma.engine.autoregressive import laws, next_tokens
from dgemma.engine.drafting import Proposal
from dgemma.engine.request import Canvas, State
from dgemma.engine.runner import Runner
from dgemma.engine.shaping import with_biases
from dgemma.kernels import DRAW_BLOCK
from dgemma.kernels.random import Stream, uniform
from dgemma.kernels.reference import categorical

_ROWS = 16  # rows of full logits of a request at a time


@dataclass
class Verdict:
    """`tokens` are the accepted ones and the one that follows; `logits [.., V]` the model's own of those rows, for who
    asked."""

    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


def propose(
    state: State, canvas: Canvas, argmax: Tensor, hidden: Tensor, steps: int, stop: str, runner: Runner
) -> None:
    """The canvas of `state` is done, with `hidden [C, H]` of its last step: what stands in it becomes the draft."""
    drafting, config = state.drafting, state.config
    assert drafting is not None and drafting.plan is not None
    option = drafting.plan.option
    part = slice(option.lead, option.lead + option.tokens)
    state.steps.append(steps)
    state.canvas = None
    if not by_draws(config):
        drafting.proposal = Proposal(tuple(argmax[part].tolist()), steps, stop)
        return
    places = torch.arange(option.width, device=hidden.device)[part]
    tokens: list[int] = []
    for rows, few in zip(hidden[part].split(_ROWS), places.split(_ROWS), strict=True):
        uniforms = _uniforms(Stream.PROPOSE, config, runner.model.config.vocab_size, few, canvas.index)
        tokens += categorical(_drafted_laws(runner, rows, canvas.bias, config).log(), uniforms).tolist()
    drafting.proposal = Proposal(tuple(tokens), steps, stop, hidden[part].clone(), canvas.bias)


def catch_up(drafter: Runner, states: Sequence[State], most: int) -> None:
    """Encode what was committed and the drafter, a model of its own, has not read: all but what its canvas shows."""
    while True:
        jobs = []
        for state in states:
            cache, lead = state.draft_cache, state.drafting.lead if state.drafting else 0
            assert cache is not None
            if cache.length < len(state.ids) - lead:
                state.encode_passes += cache.length >= len(state.request.prompt)
                jobs.append((cache, state.ids[cache.length : len(state.ids) - lead][:most]))
        if not jobs:
            return
        drafter.encode(jobs)


def by_draws(config: GenerationConfig) -> bool:
    """Whether drafts are draws, and not the likeliest tokens (which draws are at temperature 0)."""
    return config.mode == "verified" and config.verify_draft == "sample" and config.temperature > 0


@torch.inference_mode()
def judge(runner: Runner, drafter: Runner, states: Sequence[State], hidden: Sequence[Tensor]) -> list[Verdict]:
    """What each request's pass makes of its draft of n tokens; `hidden [n + 1, H]` from its last committed token on."""
    verdicts = [Verdict() for _ in states]
    # Few rows at a time: behind a token that does not stand, no law is needed.
    waiting = [at for at, state in enumerate(states) if not (state.drafted and by_draws(state.config))]
    drawn: list[list[int]] = [[] for _ in states]
    while waiting:
        parts = [hidden[at][len(drawn[at]) : len(drawn[at]) + _ROWS] for at in waiting]
        logits = runner.logits(torch.cat(parts))
        pairs = [(states[at], len(drawn[at]), len(part)) for at, part in zip(waiting, parts, strict=True)]
        tokens = iter(_next(logits, [(state, begin + row) for state, begin, rows in pairs for row in range(rows)]))
        for at, own in zip(waiting, logits.split([len(part) for part in parts]), strict=True):
            drawn[at] += [next(tokens) for _ in own]
            if states[at].request.logprobs is not None:
                verdicts[at].logits.append(own)
        waiting = [at for at in waiting if _stands(drawn[at], states[at].drafted)]
    for at, state in enumerate(states):
        if drawn[at]:
            draft = torch.tensor(state.drafted[: len(drawn[at]) - 1], dtype=torch.int64)
            accepted, token = judge_points(torch.tensor(drawn[at]), draft)
            verdicts[at].tokens = [*state.drafted[: int(accepted)], int(token)]
        else:
            verdicts[at] = _by_draws(runner, drafter, state, hidden[at])
    return verdicts


def settle(state: State, kept: Sequence[int], model: ModelConfig, company: int) -> None:
    """After `kept` of a verdict was committed: forget the keys and values of what was not, and plan what comes next."""
    drafting = state.drafting
    if drafting is None:
        return
    state.cache.truncate(min(state.cache.length, len(state.ids) - 1))
    accepted = 0
    for token, drafted in zip(kept, state.drafted, strict=False):
        if token != drafted:
            break
        accepted += 1
    refused = accepted < min(len(state.drafted), len(kept))
    drafting.judged(accepted, accepted + refused, company)
    if state.room > 1 and not state.ending:
        drafting.think(state.request.config, model, len(state.ids), state.completion, state.room, company)


def _stands(drawn: Sequence[int], draft: Sequence[int]) -> bool:
    """Whether all is accepted so far, and something is left to be judged."""
    return len(drawn) <= len(draft) and list(drawn) == list(draft[: len(drawn)])


def _next(logits: Tensor, rows: Sequence[tuple[State, int]]) -> list[int]:
    configs = [state.config for state, _ in rows]
    shaped = with_biases(logits, configs, [_counts(state, row) for state, row in rows])
    return next_tokens(shaped, configs, [len(state.ids) + row for state, row in rows])


def _counts(state: State, drafted: int) -> Counter[int]:
    """How often each token stands in the answer, with so many drafted ones; only penalties ask."""
    if not drafted or not (state.config.presence_penalty or state.config.frequency_penalty):
        return state.counts
    return state.counts + Counter(state.drafted[:drafted])


def _by_draws(runner: Runner, drafter: Runner, state: State, hidden: Tensor) -> Verdict:
    drafting, config, vocab = state.drafting, state.config, runner.model.config.vocab_size
    assert drafting is not None and drafting.proposal is not None and drafting.proposal.hidden is not None
    proposal, count = drafting.proposal, len(state.drafted)
    raw = torch.cat([runner.logits(rows) for rows in hidden.split(_ROWS)])
    p = laws(with_biases(raw, [config] * (count + 1), [_counts(state, row) for row in range(count + 1)]), config)
    assert proposal.hidden is not None
    q = torch.cat([_drafted_laws(drafter, rows, proposal.bias, config) for rows in proposal.hidden.split(_ROWS)])
    positions = torch.arange(len(state.ids), len(state.ids) + count + 1, device=hidden.device)
    accept = uniform(Stream.VERIFY, config.seed, config.choice, 0, 0, positions[:-1], 0)
    other = _uniforms(Stream.VERIFY, config, vocab, positions, 0, 1)
    accepted, law = judge_draws(p, q, torch.tensor(proposal.tokens, device=hidden.device), accept)
    stands = int(accepted)
    tokens = [*proposal.tokens[:stands], *categorical(law.log()[None], other[stands : stands + 1]).tolist()]
    return Verdict(tokens, [raw])


def _drafted_laws(runner: Runner, hidden: Tensor, bias: Tensor | None, config: GenerationConfig) -> Tensor:
    """What draws are drawn from and tested with `[R, V]`: the canvas's logits under the parameters of the draw."""
    logits = runner.logits(hidden)
    return laws(logits if bias is None else logits + bias, config)


def _uniforms(
    stream: Stream, config: GenerationConfig, vocab: int, places: Tensor, canvas: int, step: int = 0
) -> Tensor:
    blocks = torch.arange(-(-vocab // DRAW_BLOCK), device=places.device)
    return uniform(stream, config.seed, config.choice, canvas, step, places[:, None], blocks)
