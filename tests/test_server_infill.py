"""/v1/infill, /v1/edit, and `suffix` of /v1/completions: as the library answers, faults as OpenAI tells them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from server_kit import Running, idle, running
from text_kit import save_model

from dgemma.api import LLM
from dgemma.config import EngineConfig

TEXT = "Once upon a time there was a [[... 1-3 tokens ...]] named Anna. She"
STORY = "Once upon a time there was a little girl named Anna. She had a red ball."


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("default", device="cpu")


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Running]:
    with running(llm) as one:
        yield one


def body(llm: LLM, **fields: Any) -> dict[str, Any]:
    return {"model": llm.name, "seed": 5, **fields}


def test_infill_is_the_librarys(server: Running, llm: LLM) -> None:
    answer = server.post("/v1/infill", body(llm, text=TEXT, candidates=3, dgemma={"steps": 12}))
    assert answer.status_code == 200, answer.text
    told, alone = answer.json(), llm.infill(TEXT, candidates=3, steps=12, seed=5)
    assert (told["text"], told["fills"]) == (alone.text, list(alone.fills))
    assert told["logprob"] == pytest.approx(alone.logprob, abs=1e-3)
    assert [one["lengths"] for one in told["candidates"]] == [list(one.lengths) for one in alone.candidates]
    assert [one["steps"] for one in told["candidates"]] == [list(one.steps) for one in alone.candidates]
    assert told["object"] == "infill" and told["dgemma"]["seed"] == 5 and not told["truncated"]
    usage = told["usage"]
    assert usage["completion_tokens"] == len(alone.token_ids)
    assert usage["prompt_tokens"] == len(alone.prompt_token_ids)
    assert usage["dgemma"]["denoising_steps"] == sum(sum(one.steps) for one in alone.candidates)
    idle(llm)
    assert server.service.answers == 0


def test_a_seed_is_drawn_and_told(server: Running, llm: LLM) -> None:
    ask = {"model": llm.name, "text": TEXT, "candidates": 1}
    seeds = {server.post("/v1/infill", ask).json()["dgemma"]["seed"] for _ in range(3)}
    assert len(seeds) == 3


def test_edit_is_the_librarys(server: Running, llm: LLM) -> None:
    begin = STORY.index("little girl")
    spans = [{"start": begin, "end": begin + 11}]
    told = server.post("/v1/edit", body(llm, text=STORY, spans=spans)).json()
    alone = llm.edit(STORY, spans=[(begin, begin + 11)], seed=5)
    assert told["text"] == alone.text and told["object"] == "edit"
    assert told["changes"] == [{"start": begin, "end": begin + 11, "old": "little girl", "new": alone.changes[0].new}]
    assert told["before"] == pytest.approx(alone.before, abs=1e-3)
    doubted = server.post("/v1/edit", body(llm, text=STORY, doubt=0.1)).json()
    assert len(doubted["doubted"]) == len(llm.tokenizer.encode(STORY))


def test_suffix_of_completions_is_an_infill(server: Running, llm: LLM) -> None:
    ask = body(llm, prompt="Once upon a time there was a ", suffix=" named Anna. She", max_tokens=3)
    told = server.post("/v1/completions", ask).json()
    (choice,) = told["choices"]
    assert told["object"] == "text_completion" and choice["finish_reason"] == "stop"
    text = ask["prompt"] + choice["text"] + ask["suffix"]
    assert "  " not in text and choice["text"] and len(llm.tokenizer.encode(" " + choice["text"])) <= 3
    empty = server.post("/v1/completions", body(llm, prompt="Once", suffix="", max_tokens=4)).json()
    assert empty["choices"][0]["text"] == llm.generate("Once", seed=5, max_new_tokens=4).text


@pytest.mark.parametrize(
    ("path", "fields", "param", "words"),
    [
        ("/v1/infill", {"text": "no hole"}, "text", "the text has no hole"),
        ("/v1/infill", {"text": "a [[... "}, "text", "begins at character 3 and does not end"),
        ("/v1/infill", {}, "text", "text is missing"),
        ("/v1/infill", {"text": 1}, "text", "must be a valid string"),
        ("/v1/infill", {"text": TEXT, "candidates": 65}, "candidates", "64"),
        ("/v1/infill", {"text": TEXT, "most": 0}, "most", "greater"),
        ("/v1/infill", {"text": TEXT, "stream": True}, "stream", "cannot be streamed"),
        ("/v1/infill", {"text": TEXT, "max_tokens": 5}, "max_tokens", "unknown field"),
        ("/v1/infill", {"text": TEXT, "dgemma": {"mode": "ar"}}, "dgemma.mode", "needs mode"),
        ("/v1/infill", {"text": TEXT, "dgemma": {"trace": True}}, "dgemma.trace", "routes that give one answer"),
        ("/v1/infill", {"text": TEXT, "dgemma": {"t_max": 0.1}}, "dgemma.t_max", "greater than"),
        ("/v1/infill", {"text": "a [[... 2 tokens ...]] b<eos>"}, "text", "special token"),
        ("/v1/infill", {"text": "a [[...]]" + " on the mat" * 99}, "text", "the widest canvas of this model holds 256"),
        ("/v1/edit", {"text": STORY}, "spans", "say what to edit"),
        ("/v1/edit", {"text": STORY, "spans": [{"start": 1, "end": 999}]}, "spans", "is not in the text"),
        ("/v1/edit", {"text": STORY, "spans": []}, "spans", "at least 1"),
        ("/v1/edit", {"text": STORY, "doubt": 2}, "doubt", "less than or equal"),
        ("/v1/edit", {"text": STORY, "doubt": 0.1, "spans": [{"start": 0, "end": 4}]}, "spans", "give one of them"),
        ("/v1/edit", {"text": STORY, "doubt": 0.1, "by": "me"}, "by", "canvas"),
        ("/v1/completions", {"prompt": [5, 6], "suffix": "b"}, "suffix", "as a text"),
        ("/v1/completions", {"prompt": "a", "suffix": "b", "n": 2}, "n", "cannot be combined with suffix"),
        ("/v1/completions", {"prompt": "a", "suffix": "b", "stream": True}, "stream", "cannot be combined"),
        ("/v1/completions", {"prompt": "a", "suffix": "b", "logprobs": 1}, "logprobs", "cannot be combined"),
        ("/v1/completions", {"prompt": "a", "suffix": "b", "max_tokens": 999}, "max_tokens", "at most 256 with suffix"),
    ],
)
def test_faults(server: Running, llm: LLM, path: str, fields: dict[str, Any], param: str, words: str) -> None:
    answer = server.post(path, body(llm, **fields))
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error", answer.text
    assert words in error["message"] and error["param"] == param, error
    assert server.service.answers == 0


def test_other_models_are_not_served_here(server: Running) -> None:
    assert server.post("/v1/infill", {"model": "other", "text": TEXT}).status_code == 404
    assert server.post("/v1/edit", {"model": "other", "text": TEXT, "doubt": 0.1}).status_code == 404


def test_too_many_candidates_for_a_small_server(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = save_model(tmp_path_factory.mktemp("models") / "tiny", max_positions=512)
    small = LLM.load(folder, device="cpu", engine=EngineConfig(max_batch_rows=2))
    with running(small, max_waiting=1) as one:
        error = one.post("/v1/infill", {"model": small.name, "text": "a [[...]] b"}).json()["error"]
        assert error["param"] == "candidates" and "at most 3" in error["message"]
        ask = {"model": small.name, "text": "a [[...]] b", "candidates": 2, "seed": 1}
        assert one.post("/v1/infill", ask).status_code in (200, 400)


def test_the_routes_are_documented(server: Running) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    assert {"/v1/infill", "/v1/edit"} <= set(paths)
    page = server.get("/docs").text
    assert "POST /v1/infill" in page and "keep_prefix" in page
