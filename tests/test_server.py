"""The routes of the server against the same requests alone: whole answers, streams, drafts, traces, many at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from server_kit import Running, chat_body, idle, running
from text_kit import save_model

from dgemma.api import LLM, Generation
from dgemma.events import Committed, Draft, Finished
from dgemma.server.schemas import Extension
from dgemma.server.schemas_chat import ChatRequest
from dgemma.server.schemas_completions import CompletionRequest
from dgemma.server.schemas_responses import ResponsesRequest
from dgemma.trace import TraceReader
from dgemma.view import moments

PROMPTS = ["Once upon a time", "A", "Lily lived by the river and she was", "def add(a, b):"]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM.load(save_model(tmp_path_factory.mktemp("models") / "tiny", max_positions=1024), device="cpu")


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Running]:
    with running(llm) as one:
        yield one


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def parted(llm: LLM, text: str, **overrides: Any) -> tuple[str, str]:
    """Answer and thought of a chat alone."""
    events = llm.chat_stream(messages(text), **overrides)
    told = list(moments(events, llm.tokenizer, llm.generation.stop_tokens, split_thoughts=True))
    return "".join(moment.text for moment in told), "".join(moment.thought for moment in told)


def joined(chunks: list[Any], index: int = 0) -> tuple[str, str, str | None]:
    """Text, thought and reason of one choice of a stream of chat completions."""
    assert chunks[-1] == "[DONE]"
    choices = [c for chunk in chunks[:-1] for c in chunk["choices"] if c["index"] == index]
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    thought = "".join(choice["delta"].get("reasoning_content", "") for choice in choices)
    reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    assert len(reasons) == 1 and choices[-1]["finish_reason"]
    return text, thought, reasons[0]


def test_models_and_health(server: Running, llm: LLM) -> None:
    (entry,) = server.get("/v1/models").json()["data"]
    assert server.get(f"/v1/models/{llm.name}").json() == entry
    assert (entry["id"], entry["owned_by"], entry["object"]) == ("tiny", "dgemma", "model")
    about = entry["dgemma"]
    assert (about["canvas_length"], about["vocab_size"], about["max_positions"]) == (16, llm.config.vocab_size, 1024)
    assert about["chat"] is True and about["demo"] is False
    assert about["samplers"] == ["entropy_bound", "confidence", "ancestral"]
    assert about["generation"]["steps"] == 6 and about["generation"]["max_new_tokens"] == 24
    assert about["blank"] == [0, 1, 6]
    assert server.get("/v1/models/other").status_code == 404
    assert server.get("/health").json() == {"status": "ok", "model": "tiny"}
    paths = server.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health"} <= set(paths)


def test_the_documentation_of_the_fields_needs_no_other_server(server: Running) -> None:
    page = server.get("/docs").text
    for name in (*ChatRequest.model_fields, *CompletionRequest.model_fields, *ResponsesRequest.model_fields):
        assert f"<code>{name}</code>" in page
    for name in Extension.model_fields:
        assert f"<code>{name}</code>" in page
    assert "://" not in page and "<script" not in page


@pytest.mark.parametrize("text", PROMPTS)
def test_a_completion_is_what_generate_gives(server: Running, llm: LLM, text: str) -> None:
    alone: Generation = llm.generate(text, seed=5, max_new_tokens=40)
    body = {"model": "tiny", "prompt": text, "seed": 5, "max_tokens": 40}
    answer = server.post("/v1/completions", body).json()
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (alone.text, alone.finish_reason)
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(alone.prompt_token_ids)
    assert usage["completion_tokens"] == len(alone.token_ids)
    assert usage["total_tokens"] == len(alone.prompt_token_ids) + len(alone.token_ids)
    assert usage["dgemma"]["steps"] == list(alone.steps)
    assert usage["dgemma"]["denoising_steps"] == sum(alone.steps)
    assert usage["dgemma"]["tokens_per_forward"] == pytest.approx(alone.tokens_per_forward, abs=1e-3)
    assert answer["dgemma"] == {"seed": 5, "mode": "diffusion", "approximate": False}
    chunks = server.chunks("/v1/completions", {**body, "stream": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == alone.text
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]][-1] == alone.finish_reason


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_a_chat_is_what_chat_gives(server: Running, llm: LLM, mode: str) -> None:
    alone = llm.chat(messages(PROMPTS[0]), seed=3, max_new_tokens=40, mode=mode)
    text, thought = parted(llm, PROMPTS[0], seed=3, max_new_tokens=40, mode=mode)
    body = chat_body(llm, PROMPTS[0], seed=3, max_tokens=40, dgemma={"mode": mode})
    answer = server.post("/v1/chat/completions", body).json()
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"] == text
    assert choice["message"].get("reasoning_content", "") == thought
    assert choice["finish_reason"] == alone.finish_reason
    assert answer["usage"]["completion_tokens"] == len(alone.token_ids)
    assert answer["usage"]["dgemma"]["tokens_per_forward"] == pytest.approx(alone.tokens_per_forward, abs=1e-3)
    chunks = server.chunks("/v1/chat/completions", {**body, "stream": True})
    assert joined(chunks) == (text, thought, alone.finish_reason)
    if mode == "ar":
        assert len(chunks) > 20, "token by token"


def test_a_thought_stands_apart(server: Running, llm: LLM) -> None:
    """A bias makes the random model begin with opened channels; penalties end that, and it never closes one or ends."""
    opened, closed = (llm.tokenizer.token_id(name) for name in ("<|channel>", "<channel|>"))
    body = chat_body(llm, max_tokens=40, dgemma={"mode": "ar"}, frequency_penalty=2.0, temperature=0, stop=["e"])
    body["logit_bias"] = {str(opened): 10, str(closed): -100, "1": -100, "6": -100}
    answer = server.post("/v1/chat/completions", body).json()
    message = answer["choices"][0]["message"]
    assert message["content"] == "" and len(message["reasoning_content"]) > 20
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 40
    assert answer["choices"][0]["finish_reason"] == "length", "a stop text is none of a thought"
    chunks = server.chunks("/v1/chat/completions", {**body, "stream": True})
    assert joined(chunks)[:2] == ("", message["reasoning_content"])


def test_a_thought_is_an_item_of_its_own(llm: LLM) -> None:
    """In /v1/responses. The same bias as above, as the model's default; here the channel may be closed."""
    other = LLM.load(llm.folder, device="cpu")
    opened = other.tokenizer.token_id("<|channel>")
    other.generation = other.generation.with_(
        logit_bias={opened: 10, 1: -100, 6: -100}, mode="ar", frequency_penalty=2.0, temperature=0.0
    )
    text, thought = parted(other, PROMPTS[0], max_new_tokens=60)
    assert thought
    body = {"model": "tiny", "input": PROMPTS[0], "max_output_tokens": 60, "stream": True}
    with running(other) as server, server.client() as client:
        raw = client.post("/v1/responses", json=body).text
        whole = client.post("/v1/responses", json={**body, "stream": False}).json()
    events = [json.loads(line.removeprefix("data: ")) for line in raw.splitlines() if line.startswith("data: ")]
    for kind, expected in (("reasoning_text", thought), ("output_text", text)):
        assert "".join(e["delta"] for e in events if e["type"] == f"response.{kind}.delta") == expected
        assert [e["text"] for e in events if e["type"] == f"response.{kind}.done"] == [expected]
    added = [event["item"]["type"] for event in events if event["type"] == "response.output_item.added"]
    done = [event["item"]["type"] for event in events if event["type"] == "response.output_item.done"]
    assert added == done == ["reasoning", "message"]
    assert [item["content"][0]["text"] for item in whole["output"]] == [thought, text]
    assert [item["content"] for item in events[-1]["response"]["output"]] == [
        item["content"] for item in whole["output"]
    ]


def test_responses_are_the_same_answer(server: Running, llm: LLM) -> None:
    text, _ = parted(llm, PROMPTS[0], seed=3, max_new_tokens=40)
    alone = llm.chat(messages(PROMPTS[0]), seed=3, max_new_tokens=40)
    body = {"model": "tiny", "input": PROMPTS[0], "seed": 3, "max_output_tokens": 40}
    answer = server.post("/v1/responses", body).json()
    assert answer["output"][-1]["content"][0]["text"] == text
    assert answer["status"] == ("incomplete" if alone.finish_reason == "length" else "completed")
    assert answer["usage"]["output_tokens"] == len(alone.token_ids)
    with server.client() as client:
        raw = client.post("/v1/responses", json={**body, "stream": True}).text
    events = [json.loads(line.removeprefix("data: ")) for line in raw.splitlines() if line.startswith("data: ")]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta") == text
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == f"response.{answer['status']}"
    assert events[-1]["response"]["output"][-1]["content"] == answer["output"][-1]["content"]
    items = [{"role": "user", "content": [{"type": "input_text", "text": PROMPTS[0]}]}]
    again = server.post("/v1/responses", {**body, "input": items}).json()
    assert again["output"][-1]["content"] == answer["output"][-1]["content"]
    told = server.post("/v1/responses", {**body, "instructions": "Be brief."}).json()
    asked = [{"role": "system", "content": "Be brief."}, *messages(PROMPTS[0])]
    assert told["usage"]["input_tokens"] == len(llm.encode_chat(asked))


def test_choices_are_those_of_the_random_key(server: Running, llm: LLM) -> None:
    body = {"model": "tiny", "prompt": PROMPTS[:2], "n": 2, "seed": 9, "max_tokens": 20}
    answer = server.post("/v1/completions", body).json()
    alone = [llm.generate(text, seed=9, max_new_tokens=20, choice=i) for text in PROMPTS[:2] for i in range(2)]
    assert [choice["text"] for choice in answer["choices"]] == [one.text for one in alone]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert len({one.text for one in alone[:2]}) == 2
    assert answer["usage"]["prompt_tokens"] == sum(len(llm.encode_prompt(text)) for text in PROMPTS[:2])
    assert answer["usage"]["completion_tokens"] == sum(len(one.token_ids) for one in alone)
    chunks = server.chunks("/v1/completions", {**body, "stream": True})
    for index, one in enumerate(alone):
        own = [c for chunk in chunks[:-1] for c in chunk["choices"] if c["index"] == index]
        assert "".join(choice["text"] for choice in own) == one.text


def test_without_a_seed_there_is_one_to_repeat_it_with(server: Running, llm: LLM) -> None:
    body = {name: value for name, value in chat_body(llm, max_tokens=20).items() if name != "seed"}
    first, second = (server.post("/v1/chat/completions", body).json() for _ in range(2))
    assert first["dgemma"]["seed"] != second["dgemma"]["seed"]
    again = server.post("/v1/chat/completions", {**body, "seed": first["dgemma"]["seed"]}).json()
    assert again["choices"] == first["choices"]
    streamed = server.chunks("/v1/chat/completions", {**body, "stream": True})
    seed = streamed[0]["dgemma"]["seed"]
    text = server.post("/v1/chat/completions", {**body, "seed": seed}).json()["choices"][0]["message"]["content"]
    assert joined(streamed)[0] == text


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
@pytest.mark.parametrize("logprobs", [False, True])
def test_a_stop_text_ends_the_answer_and_the_work(server: Running, llm: LLM, mode: str, logprobs: bool) -> None:
    alone = llm.generate(PROMPTS[0], seed=5, max_new_tokens=100, mode=mode)
    place = len(alone.text) // 3
    stop = alone.text[place : place + 3]
    place = alone.text.index(stop)
    body: dict[str, Any] = {"model": "tiny", "prompt": PROMPTS[0], "seed": 5, "max_tokens": 100, "stop": [stop, "§"]}
    body |= {"dgemma": {"mode": mode}} | ({"logprobs": 1} if logprobs else {})
    before = llm.engine.load.committed_tokens
    answer = server.post("/v1/completions", body).json()
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (alone.text[:place], "stop")
    begun = [
        len(llm.tokenizer.decode(alone.token_ids[:count]).rstrip("\ufffd")) for count in range(len(alone.token_ids))
    ]
    count = sum(start < place for start in begun)
    assert answer["usage"]["completion_tokens"] == count
    assert llm.engine.load.committed_tokens - before < 70, "the engine went on"
    if logprobs:
        assert len(choice["logprobs"]["tokens"]) == count
    chunks = server.chunks("/v1/completions", {**body, "stream": True, "stream_options": {"include_usage": True}})
    parts = [c for chunk in chunks[:-1] for c in chunk["choices"]]
    assert "".join(part["text"] for part in parts) == alone.text[:place]
    assert parts[-1]["finish_reason"] == "stop"
    assert chunks[-2]["usage"]["completion_tokens"] == count
    streamed = sum(len(part["logprobs"]["tokens"]) for part in parts if part["logprobs"])
    assert streamed == (count if logprobs else 0)


def test_an_engine_may_be_done_before_it_is_known_by_number(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread goes on while the one that submitted sleeps; it would die of a number that it does not have."""
    submit = llm.worker.submit

    def slowly(request: Any, deliver: Any) -> int:
        number = submit(request, deliver)
        idle(llm)
        return number

    with running(llm) as server:
        monkeypatch.setattr(llm.worker, "submit", slowly)
        answer = server.post(
            "/v1/completions", {"model": "tiny", "prompt": "Once", "max_tokens": 8, "stop": ["§"], "seed": 1}
        )
    assert answer.status_code == 200 and answer.json()["choices"][0]["text"]


def test_log_probabilities_are_the_encoders(server: Running, llm: LLM) -> None:
    alone = llm.chat(messages(PROMPTS[0]), seed=4, max_new_tokens=20)
    ids = alone.token_ids[:-1] if alone.finish_reason == "stop" else alone.token_ids
    exact = llm.score(list(alone.token_ids), prompt=list(alone.prompt_token_ids)).logprobs
    body = chat_body(llm, PROMPTS[0], seed=4, max_tokens=20, logprobs=True, top_logprobs=3)
    content = server.post("/v1/chat/completions", body).json()["choices"][0]["logprobs"]["content"]
    shown = [place for place, token in enumerate(ids) if token not in llm.tokenizer.special_ids]
    entries = [content[place] for place in range(len(content)) if ids[place] not in llm.tokenizer.special_ids]
    assert [entry["logprob"] for entry in entries] == pytest.approx([exact[place] for place in shown], abs=1e-4)
    for entry in content:
        top = [one["logprob"] for one in entry["top_logprobs"]]
        assert len(top) == 3 and top == sorted(top, reverse=True) and entry["logprob"] <= top[0] + 1e-6
        assert entry["canvas_logprob"] < 0
        assert entry["bytes"] is None or bytes(entry["bytes"]).decode() == entry["token"]
    chunks = server.chunks("/v1/chat/completions", {**body, "stream": True})
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks[:-1] if chunk["choices"]]
    assert [entry for part in parts if part for entry in part["content"]] == content


def test_usage_comes_last_if_asked_for(server: Running, llm: LLM) -> None:
    body = chat_body(llm, max_tokens=20)
    usage = server.post("/v1/chat/completions", body).json()["usage"]
    chunks = server.chunks("/v1/chat/completions", {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert all(chunk["usage"] is None for chunk in chunks[:-2])
    last = chunks[-2]
    assert last["choices"] == []
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert last["usage"][name] == usage[name]
    assert last["usage"]["dgemma"]["steps"] == usage["dgemma"]["steps"]
    assert all("usage" not in chunk for chunk in server.chunks("/v1/chat/completions", {**body, "stream": True})[:-1])


def test_drafts_are_the_trace(server: Running, llm: LLM) -> None:
    """The lines in the stream, the kept trace and the events of the request alone say the same."""
    body = chat_body(llm, seed=6, max_tokens=40, n=2, stream=True, dgemma={"trace": True})
    body["stream_options"] = {"include_canvas": True}
    chunks = server.chunks("/v1/chat/completions", body)
    name = chunks[0]["dgemma"]["trace_id"]
    for index, suffix in enumerate(("", "-1")):
        lines = [c["dgemma"]["line"] for c in chunks[:-1] if c.get("dgemma", {}).get("index") == index]
        kept = server.get(f"/v1/traces/{name}{suffix}")
        assert kept.headers["content-type"] == "application/x-ndjson"
        assert [json.loads(line) for line in kept.text.splitlines()] == lines
        reader = TraceReader(kept.text.splitlines())
        assert (reader.header.seed, reader.header.prompt, reader.header.model) == (6, PROMPTS[0], "tiny")
        told = list(reader)
        alone = list(llm.chat_stream(messages(PROMPTS[0]), seed=6, max_new_tokens=40, choice=index))
        for kind, field in ((Draft, "tokens"), (Draft, "canvas_tokens"), (Draft, "accepted"), (Committed, "tokens")):
            assert [getattr(m.event, field) for m in told if isinstance(m.event, kind)] == [
                getattr(event, field) for event in alone if isinstance(event, kind)
            ]
        assert isinstance(told[-1].event, Finished) and isinstance(alone[-1], Finished)
        assert told[-1].event.steps == alone[-1].steps
        assert "".join(moment.text for moment in told) == joined(chunks, index)[0]
        places = [
            bool(chunk.get("dgemma", {}).get("line", {}).get("type") == "draft")
            for chunk in chunks[1:-1]
            if chunk.get("dgemma", {}).get("index") == index or any(c["index"] == index for c in chunk["choices"])
        ]
        assert places.index(True) < len(places) and not places[-1]
    plain = server.chunks("/v1/chat/completions", {k: v for k, v in body.items() if k != "stream_options"})
    assert joined(plain)[0] == joined(chunks)[0] and all(chunk["choices"] for chunk in plain[:-1])


def test_a_trace_is_there_when_the_answer_is(server: Running, llm: LLM) -> None:
    answer = server.chat(max_tokens=20, dgemma={"trace": True}).json()
    reader = TraceReader(server.get(f"/v1/traces/{answer['dgemma']['trace_id']}").text.splitlines())
    assert "".join(moment.text for moment in reader) == answer["choices"][0]["message"]["content"]
    assert "trace_id" not in server.chat(max_tokens=20).json()["dgemma"]
    for name in ("none", "../config", "%2e%2e%2fconfig"):
        assert server.get(f"/v1/traces/{name}").status_code == 404


def test_many_at_once_get_what_each_gets_alone(server: Running, llm: LLM) -> None:
    def ask(number: int) -> str:
        body = chat_body(llm, PROMPTS[number % 4], seed=number, max_tokens=30 + number, stream=True)
        return joined(server.chunks("/v1/chat/completions", body))[0]

    before = llm.engine.load
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, range(8)))
    after = llm.engine.load
    assert texts == [parted(llm, PROMPTS[n % 4], seed=n, max_new_tokens=30 + n)[0] for n in range(8)]
    rows = (after.denoise_rows - before.denoise_rows) / (after.denoise_passes - before.denoise_passes)
    assert rows > 1.5, "they did not share passes"


def test_a_later_turn_reuses_what_the_first_had(server: Running, llm: LLM) -> None:
    long = "Once upon a time there was a little girl named Lily who lived by the river. " * 3
    first = server.chat(long, max_tokens=10).json()
    again = server.chat(long, max_tokens=10).json()
    assert first["choices"] == again["choices"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    stopped = server.chat(long, max_tokens=100, stop=first["choices"][0]["message"]["content"][:1]).json()
    assert stopped["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_a_model_without_a_template_completes_only(tmp_path: Path) -> None:
    llm = LLM.load(save_model(tmp_path / "plain", template=None), device="cpu")
    with running(llm) as server:
        assert server.get("/v1/models").json()["data"][0]["dgemma"]["chat"] is False
        refused = server.chat()
        assert refused.status_code == 400 and "no chat template" in refused.json()["error"]["message"]
        body = {"model": "plain", "prompt": "A", "max_tokens": 5, "seed": 1}
        assert (
            server.post("/v1/completions", body).json()["choices"][0]["text"]
            == llm.generate("A", seed=1, max_new_tokens=5).text
        )
