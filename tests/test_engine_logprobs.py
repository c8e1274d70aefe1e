"""Log-probabilities of committed tokens: the encoder's equal a full pass over the same tokens, the denoiser's the
slow loop; asking for them changes no token, and they come in order.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_kit import CANVAS, NO_REUSE, VOCAB, config, end, of, prompt, request, run, tiny_model, tokens
from naive import NaiveCache, encode
from slow_answer import canvases

from dgemma.api import LLM
from dgemma.config import EngineConfig
from dgemma.engine import Engine, Request, token_logprobs
from dgemma.errors import RequestError
from dgemma.events import Committed, Event, Finished, Scored

MODEL, EXACT = tiny_model(), tiny_model(torch.float64)
ENDS = tuple(range(0, VOCAB, 9))


def ask(length: int, seed: int = 0, logprobs: int | None = 3, **changes: object) -> Request:
    return replace(request(length, seed=seed, **changes), logprobs=logprobs)


def logprobs_of(events: list[Event], number: int = 1) -> list[float]:
    return [value for e in events if isinstance(e, Scored) and e.request == number for value in e.logprobs]


def full_pass(ids: list[int]) -> torch.Tensor:
    """Log-probabilities `[T, V]` of what follows each token, in one pass without the engine."""
    return torch.log_softmax(EXACT.logits(encode(EXACT, NaiveCache(EXACT.config), torch.tensor(ids))), dim=-1)


# -- values --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{}, {"logit_bias": {5: 9.0}, "presence_penalty": 2.0, "temperature": 0.3}])
@pytest.mark.parametrize("mode", ["diffusion", "ar"])
@pytest.mark.parametrize("length", [1, 5, 6, 20])
def test_the_encoders_equal_a_full_pass(length: int, mode: str, shape: dict[str, object]) -> None:
    """At temperature 1 and without what shapes the draw; the alternatives, too."""
    item = ask(length, seed=3, mode=mode, max_new_tokens=20, logprobs=4, **shape)
    events = run(Engine(EXACT, NO_REUSE), [item])
    ids = [*item.prompt, *tokens(events)]
    wanted = full_pass(ids[:-1])[length - 1 :]
    scored = [e for e in events if isinstance(e, Scored)]
    assert [v for e in scored for v in e.logprobs] == pytest.approx(
        [float(row[token]) for row, token in zip(wanted, ids[length:], strict=True)], abs=1e-5
    )
    top = [place for e in scored for place in e.top]
    assert len(top) == 20
    for row, place in zip(wanted, top, strict=True):
        ranked = sorted(range(VOCAB), key=lambda token: -float(row[token]))[:4]
        assert [token for token, _ in place] == ranked
        assert [value for _, value in place] == pytest.approx([float(row[token]) for token in ranked], abs=1e-5)


@pytest.mark.parametrize("settings", [
    NO_REUSE, EngineConfig(prefix_cache_tokens=0, encode_chunk=1), EngineConfig(prefix_cache_tokens=0, encode_chunk=3),
    EngineConfig(prefix_cache_tokens=0, encode_chunk=5, prefix_block=5), EngineConfig(prefix_block=4),
    EngineConfig(prefix_cache_tokens=0, max_batch_tokens=9),
])  # fmt: skip
def test_they_equal_the_score_however_passes_are_cut(settings: EngineConfig) -> None:
    """Prompts that end inside and at the end of chunks and blocks; the second time the prompt comes from the store."""
    engine = Engine(MODEL, settings)
    items = [ask(n, seed=n, mode=m, max_new_tokens=21) for n in (1, 3, 4, 8, 15) for m in ("diffusion", "ar")]
    for _ in range(2):
        events = run(engine, items)
        first = min(e.request for e in events)
        for number, item in enumerate(items, start=first):
            ids = [*item.prompt, *tokens(events, number)]
            wanted = token_logprobs(Engine(MODEL, NO_REUSE), ids, len(item.prompt))
            assert logprobs_of(events, number) == pytest.approx(wanted, abs=1e-5)
    if settings.prefix_cache_tokens:
        assert engine.prefix_counters.reused_tokens > 0


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("shape", [{}, {"logit_bias": {5: 3.0}, "frequency_penalty": 1.0, "top_p": 0.8}])
def test_the_denoisers_are_of_the_deciding_step(steps: int, shape: dict[str, object]) -> None:
    """At temperature 1, of the logits as they are."""
    item = ask(7, seed=5, max_new_tokens=3 * CANVAS, max_denoising_steps=steps, **shape)
    events = run(Engine(EXACT, NO_REUSE), [item])
    slow = list(canvases(EXACT, list(item.prompt), item.config))
    scored = [e for e in events if isinstance(e, Scored)]
    assert [e.canvas for e in scored] == [0, 1, 2]
    for event, (ids, logits) in zip(scored, slow, strict=True):
        rows = torch.log_softmax(logits, dim=-1)
        wanted = [float(row[token]) for row, token in zip(rows, ids, strict=True)]
        assert event.canvas_logprobs == pytest.approx(wanted, abs=1e-5)
        assert event.canvas_logprobs != pytest.approx(event.logprobs, abs=1e-2)


@pytest.mark.parametrize("count", [0, 1, 20])
@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_as_many_alternatives_as_asked_for(count: int, mode: str) -> None:
    events = run(Engine(MODEL, NO_REUSE), [ask(5, seed=1, mode=mode, logprobs=count)])
    scored = [e for e in events if isinstance(e, Scored)]
    assert all(len(place) == count for e in scored for place in e.top)
    for event in scored:
        assert len(event.logprobs) == len(event.top)
        assert len(event.canvas_logprobs) == (len(event.logprobs) if mode == "diffusion" else 0)


# -- when they come, and what they cost ----------------------------------------------


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_scores_follow_their_tokens(mode: str) -> None:
    """Committed, Scored of the same canvas and number of tokens, and so on, then Finished; cut canvases included."""
    for changes in ({"max_new_tokens": 21}, {"max_new_tokens": 60, "stop_tokens": ENDS}):
        events = run(Engine(MODEL, NO_REUSE), [ask(5, seed=1, mode=mode, **changes)])
        assert isinstance(events[-1], Finished)
        pairs = list(zip(events[:-1:2], events[1::2], strict=True))
        for committed, scored in pairs:
            assert isinstance(committed, Committed) and isinstance(scored, Scored)
            assert scored.canvas == committed.canvas and len(scored.logprobs) == len(committed.tokens)
        assert end(events).reason == ("stop" if "stop_tokens" in changes else "length")


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_asking_changes_nothing_else(mode: str) -> None:
    without, asked = (
        run(Engine(MODEL, NO_REUSE), [ask(5, seed=1, mode=mode, watch=True, logprobs=count)]) for count in (None, 2)
    )
    rest = [replace(e, encode_passes=0) if isinstance(e, Finished) else e for e in asked if not isinstance(e, Scored)]
    assert rest == [replace(e, encode_passes=0) if isinstance(e, Finished) else e for e in without]
    assert not any(isinstance(e, Scored) for e in without)


def test_the_last_canvas_is_encoded_for_them_and_only_for_them() -> None:
    changes = {"max_new_tokens": 3 * CANVAS - 2, "max_denoising_steps": 2, "confidence_threshold": None}
    for count, canvases_, tail in ((None, 2, 0), (2, 3, CANVAS - 2)):
        engine = Engine(MODEL, NO_REUSE)
        events = run(engine, [ask(5, logprobs=count, **changes)])
        assert end(events).encode_passes == canvases_
        assert engine.counters.encoded_tokens == 5 + 2 * CANVAS + tail
        assert engine.counters.denoise_passes == 6


def test_a_prompt_from_the_store_leaves_its_last_token_to_encode() -> None:
    engine, ids = Engine(MODEL, EngineConfig(prefix_block=4)), prompt(12)
    asked = [Request(prompt=ids, config=config(seed=4), logprobs=count) for count in (None, None, 0)]
    cached = [end(run(engine, [item]), number).cached_tokens for number, item in enumerate(asked, start=1)]
    assert cached == [0, 12, 8]


# -- company -------------------------------------------------------------------------


COMPANY = [
    ask(5, seed=1), ask(9, seed=2, mode="ar"), request(7, seed=3, watch=True), ask(30, seed=4, canvas_length=19),
    ask(2, seed=5, stop_tokens=ENDS), ask(6, seed=6, top_p=0.7, logprobs=0), request(6, seed=7, mode="ar"),
    ask(8, seed=8, convention="jax"), ask(8, seed=9, mode="ar", frequency_penalty=1.0, logprobs=20),
]  # fmt: skip


@pytest.mark.parametrize("chunk", [4, 512])
def test_a_batch_equals_its_singles_bit_for_bit(chunk: int, threads: int) -> None:
    settings = EngineConfig(prefix_cache_tokens=0, encode_chunk=chunk)
    events = run(Engine(MODEL, settings), joins={2 * i: item for i, item in enumerate(COMPANY)})
    for number, item in enumerate(COMPANY, start=1):
        assert of(events, number) == run(Engine(MODEL, settings), [item]), number


def test_aborting_while_scores_are_owed_leaves_nothing() -> None:
    engine = Engine(MODEL, NO_REUSE)
    number = engine.add(ask(5, max_new_tokens=CANVAS, max_denoising_steps=2, confidence_threshold=None))
    events = [*engine.tick(), *engine.tick()]
    assert [type(e).__name__ for e in events] == ["Committed"] and engine.has_work
    last = engine.abort(number)
    assert last is not None and (last.reason, last.completion_tokens) == ("abort", CANVAS)
    assert not engine.has_work


@pytest.mark.parametrize("count", [-1, 21, 1.0, True, "3"])
def test_wrong_numbers_are_named(count: object) -> None:
    with pytest.raises(RequestError, match=rf"logprobs must be a whole number of 0 to 20, .* got {count!r}"):
        Engine(MODEL).add(replace(request(3), logprobs=count))  # type: ignore[arg-type]


# -- `LLM` ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_generate_gives_a_record_a_token(llm: LLM, mode: str) -> None:
    plain = llm.generate("Once upon", seed=3, max_new_tokens=37, mode=mode)
    answer = llm.generate("Once upon", seed=3, max_new_tokens=37, mode=mode, logprobs=2)
    assert plain.logprobs is None and answer.token_ids == plain.token_ids and answer.logprobs is not None
    assert tuple(record.token for record in answer.logprobs) == answer.token_ids
    score = llm.score(answer.token_ids, prompt=answer.prompt_token_ids)
    assert [record.logprob for record in answer.logprobs] == pytest.approx(score.logprobs, abs=1e-5)
    for record in answer.logprobs:
        assert len(record.top) == 2 and record.top[0][1] >= record.top[1][1]
        assert (record.canvas_logprob is None) == (mode == "ar")


def test_streams_carry_them(llm: LLM) -> None:
    kinds = [type(e).__name__ for e in llm.stream("Once", max_new_tokens=20, logprobs=0) if type(e).__name__ != "Draft"]
    assert kinds == ["Committed", "Scored", "Committed", "Scored", "Finished"]
    with pytest.raises(RequestError, match="0 to 20"):
        llm.stream("Once", logprobs=99)
