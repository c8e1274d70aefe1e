"""`LLM`: texts in, texts out; batches, streams, chats, scores, asyncio; errors that say what is allowed."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from text_kit import save_model

from dgemma.api import LLM, Generation
from dgemma.config import EngineConfig
from dgemma.errors import CheckpointError, ConfigError, RequestError
from dgemma.events import Committed, Draft, Finished

PROMPTS = ["Once upon a time", "A", "Lily lived by the river and she was", "def add(a, b):"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM.load(folder, device="cpu")


def timeless(answer: Generation) -> Generation:
    return replace(answer, seconds=0.0)


def idle(llm: LLM) -> bool:
    for _ in range(1000):
        if llm.worker._thread is None:
            return not llm.engine.has_work
        time.sleep(0.01)
    return False


def test_what_a_loaded_model_knows(llm: LLM, folder: Path) -> None:
    assert (llm.name, llm.folder, llm.demo) == (folder.name, folder, False)
    assert llm.device == torch.device("cpu") and llm.dtype is torch.float32
    assert llm.generation.max_denoising_steps == 6 and llm.config.canvas_length == 16
    assert llm.chat_template is not None
    assert llm.encode_prompt("A") == [llm.tokenizer.bos, *llm.tokenizer.encode("A")]


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), (torch.float64, torch.float64)])
def test_the_type_can_be_chosen(folder: Path, dtype: str | torch.dtype, expected: torch.dtype) -> None:
    other = LLM.load(folder, device="cpu", dtype=dtype)
    assert other.dtype is expected
    assert len(other.generate("A", max_new_tokens=3).token_ids) == 3


def test_generate(llm: LLM) -> None:
    answer = llm.generate("Once upon a time", seed=4)
    assert answer.prompt_token_ids == tuple(llm.encode_prompt("Once upon a time"))
    assert (answer.seed, answer.mode, answer.model) == (4, "diffusion", llm.name)
    assert 1 <= len(answer.token_ids) <= 24 and answer.finish_reason in ("stop", "length")
    assert len(answer.steps) == len(answer.stops) and set(answer.stops) <= {"stable", "cap"}
    passes = sum(answer.steps) + len(answer.steps) - 1
    assert answer.tokens_per_forward == pytest.approx(len(answer.token_ids) / passes)
    assert answer.seconds > 0 and answer.cached_tokens == 0
    assert timeless(llm.generate(list(answer.prompt_token_ids), seed=4)) == timeless(answer)
    assert llm.generate("Once upon a time", seed=5).token_ids != answer.token_ids


def test_a_list_of_prompts_gets_what_each_gets_alone(llm: LLM) -> None:
    before = llm.engine.counters.denoise_passes
    together = llm.generate(PROMPTS, seed=2)
    shared = llm.engine.counters.denoise_passes - before
    alone = [llm.generate(prompt, seed=2) for prompt in PROMPTS]
    assert [timeless(answer) for answer in together] == [timeless(answer) for answer in alone]
    assert shared < sum(sum(answer.steps) for answer in alone)
    ids = [llm.encode_prompt(prompt) for prompt in PROMPTS[:2]]
    assert [a.token_ids for a in llm.generate(ids, seed=2)] == [a.token_ids for a in alone[:2]]


def test_the_end_token_is_in_the_ids_and_not_in_the_text(llm: LLM) -> None:
    free = llm.generate("A", stop_tokens=(), max_new_tokens=16, seed=3)
    place = next(i for i in range(3, 16) if free.token_ids[i] not in free.token_ids[:i])
    answer = llm.generate("A", stop_tokens=(free.token_ids[place],), max_new_tokens=16, seed=3)
    assert answer.token_ids == free.token_ids[: place + 1] and answer.finish_reason == "stop"
    assert answer.text == llm.tokenizer.decode(free.token_ids[:place])
    assert free.text == llm.tokenizer.decode(free.token_ids)


def test_mode_ar(llm: LLM) -> None:
    answer = llm.generate("A", mode="ar", max_new_tokens=9, stop_tokens=())
    assert (answer.mode, answer.steps, answer.stops) == ("ar", (), ("ar",))
    assert len(answer.token_ids) == 9 and answer.tokens_per_forward == 1.0


def test_steps_is_short_for_max_denoising_steps(llm: LLM) -> None:
    assert llm.generate("A", steps=2, stop_tokens=(), confidence_threshold=None).steps == (2, 2)
    with pytest.raises(RequestError, match="steps is another name of max_denoising_steps"):
        llm.generate("A", steps=2, max_denoising_steps=3)


# -- streams -------------------------------------------------------------------------


def test_a_stream_says_what_generate_says(llm: LLM) -> None:
    answer, events = llm.generate("A", seed=6), list(llm.stream("A", seed=6))
    assert tuple(t for e in events if isinstance(e, Committed) for t in e.tokens) == answer.token_ids
    assert sum(isinstance(e, Draft) for e in events) == sum(answer.steps)
    assert isinstance(events[-1], Finished) and events[-1].reason == answer.finish_reason


def test_leaving_a_stream_aborts(llm: LLM) -> None:
    for event in llm.stream("A", max_new_tokens=200, stop_tokens=()):
        assert isinstance(event, Draft)
        break
    assert idle(llm)


def test_a_stream_that_is_never_read_costs_nothing(llm: LLM) -> None:
    llm.stream("A")
    assert idle(llm)


def test_an_interrupt_aborts_and_the_model_stays_usable(llm: LLM) -> None:
    def interrupted() -> None:
        for _ in llm.stream("A", max_new_tokens=200, stop_tokens=()):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert idle(llm)
    assert llm.generate("A", max_new_tokens=2).token_ids


# -- chat ----------------------------------------------------------------------------


def test_later_turns_reuse_what_earlier_ones_encoded(folder: Path) -> None:
    engines = EngineConfig(prefix_block=8), EngineConfig(prefix_block=8, prefix_cache_tokens=0)
    talker, fresh = (LLM.load(folder, device="cpu", engine=engine) for engine in engines)
    messages = [{"role": "user", "content": "Once upon a time there was"}]
    for turn in range(3):
        answer = talker.chat(messages, seed=turn)
        again = fresh.generate(talker.encode_chat(messages), seed=turn)
        assert answer.token_ids == again.token_ids
        assert (answer.cached_tokens > 0) == (turn > 0)
        messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "And then?"}]
    assert talker.engine.counters.encoded_tokens < fresh.engine.counters.encoded_tokens


def test_chat_streams(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    events = list(llm.chat_stream(messages, seed=1))
    assert isinstance(events[0], Draft) and isinstance(events[-1], Finished)
    tokens = tuple(t for e in events if isinstance(e, Committed) for t in e.tokens)
    assert tokens == llm.generate(llm.encode_chat(messages), seed=1).token_ids


def test_the_template_decides_where_the_text_begins(llm: LLM) -> None:
    ids = llm.encode_chat([{"role": "user", "content": "Hello"}])
    assert ids.count(llm.tokenizer.bos) == 1 and ids[0] == llm.tokenizer.bos
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    thinking = llm.chat(messages, template={"enable_thinking": True}, max_new_tokens=2)
    assert len(thinking.prompt_token_ids) > len(llm.encode_chat(messages))


def test_a_model_without_a_template_cannot_chat(tmp_path: Path) -> None:
    bare = LLM.load(save_model(tmp_path / "bare", template=None), device="cpu")
    with pytest.raises(RequestError, match="'bare' has no chat template; use generate"):
        bare.chat([{"role": "user", "content": "Hello"}])


# -- scores --------------------------------------------------------------------------


def test_score_is_the_encoders_log_likelihood(llm: LLM) -> None:
    score = llm.score("lived by the river.", prompt="Lily ")
    ids = [*llm.encode_prompt("Lily "), *llm.tokenizer.encode("lived by the river.")]
    (hidden,) = llm.engine.runner.encode([(llm.engine.new_cache(), ids)])
    logp = torch.log_softmax(llm.engine.runner.logits(hidden), dim=-1)
    count = len(score.token_ids)
    expected = [float(logp[i - 1, ids[i]]) for i in range(len(ids) - count, len(ids))]
    assert score.logprobs == pytest.approx(expected, abs=1e-4)
    assert score.total == pytest.approx(sum(expected), abs=1e-3)
    assert score.per_token == pytest.approx(score.total / count)
    assert score.bits_per_byte == pytest.approx(-score.total / math.log(2) / len("lived by the river."))


def test_scores_add_up(llm: LLM) -> None:
    whole = llm.score("Once upon a time")
    ids = llm.tokenizer.encode("Once upon a time")
    parts = [llm.score(ids[k:], prompt=[llm.tokenizer.bos, *ids[:k]]).logprobs[0] for k in range(len(ids))]
    assert whole.logprobs == pytest.approx(parts, abs=1e-4)
    assert llm.score(ids).bits_per_byte == pytest.approx(whole.bits_per_byte)


def test_scoring_runs_beside_a_generation(llm: LLM) -> None:
    expected, answer = llm.score("a river"), llm.generate("A", seed=6)
    stream = llm.stream("A", seed=6)
    tokens = []
    for event in stream:
        assert llm.score("a river") == expected
        tokens += event.tokens if isinstance(event, Committed) else ()
    assert tuple(tokens) == answer.token_ids


# -- asyncio -------------------------------------------------------------------------


def test_the_async_twins_give_the_same(llm: LLM) -> None:
    async def all_at_once() -> tuple[Generation, list[Generation], list[object]]:
        async def events() -> list[object]:
            return [event async for event in llm.astream("A", seed=6)]

        return await asyncio.gather(llm.agenerate("A", seed=6), llm.agenerate(PROMPTS, seed=2), events())

    one, many, events = asyncio.run(all_at_once())
    assert timeless(one) == timeless(llm.generate("A", seed=6))
    assert [timeless(a) for a in many] == [timeless(a) for a in llm.generate(PROMPTS, seed=2)]
    expected = list(llm.stream("A", seed=6))
    assert [replace(e, request=0) for e in events] == [replace(e, request=0) for e in expected]


def test_cancelling_aborts(llm: LLM) -> None:
    async def cancelled() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await llm.agenerate(PROMPTS, max_new_tokens=150, stop_tokens=(), steps=400)

    asyncio.run(cancelled())
    assert idle(llm)


def test_closing_an_async_stream_aborts(llm: LLM) -> None:
    async def closed() -> None:
        stream = llm.astream("A", max_new_tokens=200, stop_tokens=())
        assert isinstance(await anext(stream), Draft)
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(closed())
    assert idle(llm)


# -- wrong use -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "overrides", "message"),
    [
        ([], {}, "the prompt is empty"),
        (5, {}, "a prompt is a text or a list of token ids, got int"),
        ([1, 2.5], {}, "a prompt is a text or a list of token ids, got list"),
        ("A", {"speed": 3}, "unknown generation parameter 'speed'; known: accept_confidence"),
        ("A", {"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ("A", {"max_new_tokens": 1000}, "the model has 256"),
        ("A", {"sampler": "gibbs"}, "unknown sampler 'gibbs'"),
        (["A", []], {}, "the prompt is empty"),
    ],
)
def test_wrong_prompts_and_parameters(llm: LLM, prompt: object, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(prompt, **overrides)  # type: ignore[call-overload]
    if not isinstance(prompt, list):
        with pytest.raises(RequestError, match=message):
            llm.stream(prompt, **overrides)  # type: ignore[arg-type]
    assert idle(llm)


def test_nothing_to_score(llm: LLM) -> None:
    with pytest.raises(RequestError, match="the text to score is empty"):
        llm.score("")
    with pytest.raises(RequestError, match="the model has 256"):
        llm.score([5] * 256)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int3"}, "dtype must be auto, float32, bfloat16, float16, float64; got 'int3'"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"device": "tpu9"}, "device must be auto, cpu, cuda or cuda:N; got 'tpu9'"),
        ({"device": "mps"}, "device must be auto, cpu, cuda or cuda:N; got 'mps'"),
        ({"device": "cuda:99"}, "there is no device 'cuda:99' here: torch sees"),
    ],
)
def test_wrong_ways_to_load(folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM.load(folder, **options)  # type: ignore[arg-type]


def test_a_missing_model_is_named() -> None:
    with pytest.raises(CheckpointError, match="no checkpoint 'nowhere'"):
        LLM.load("nowhere")


def test_threads_and_engine_limits_are_taken(folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        small = LLM.load(folder, device="cpu", threads=1, engine=EngineConfig(max_batch_rows=1))
        assert torch.get_num_threads() == 1 and small.engine.config.max_batch_rows == 1
    finally:
        torch.set_num_threads(before)
