"""Every field of OpenAI's request schemas, as the installed client types them: it has its effect, or it is refused.

The tables in server_fields.py name them all: one that a newer client adds fails the first test until somebody decides.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from openai.types import completion_create_params as completions
from openai.types.chat import completion_create_params as chat
from openai.types.responses import response_create_params as responses
from server_fields import BOOKS, CHAT, COMPLETIONS, EXTENSION, PROMPT, RESPONSES, SETTING, TABLES
from server_kit import Running, running
from text_kit import save_model

from dgemma.api import LLM, Generation
from dgemma.server.schemas import Extension

TYPED: dict[str, tuple[type, ...]] = {
    CHAT: (chat.CompletionCreateParamsNonStreaming, chat.CompletionCreateParamsStreaming),
    COMPLETIONS: (completions.CompletionCreateParamsNonStreaming, completions.CompletionCreateParamsStreaming),
    RESPONSES: (responses.ResponseCreateParamsNonStreaming, responses.ResponseCreateParamsStreaming),
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM.load(save_model(tmp_path_factory.mktemp("models") / "tiny", max_positions=512), device="cpu")


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Running]:
    with running(llm) as one:
        yield one


@dataclass
class Ask:
    """Sends one route the same question, with changes."""

    server: Running
    path: str

    def body(self, **changes: Any) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.server.llm.name, "seed": 5}
        if self.path == CHAT:
            body["messages"] = [{"role": "user", "content": PROMPT}]
        else:
            body["input" if self.path == RESPONSES else "prompt"] = PROMPT
        return body | {"max_output_tokens" if self.path == RESPONSES else "max_tokens": 24} | changes

    def __call__(self, **changes: Any) -> dict[str, Any]:
        answer = self.server.post(self.path, self.body(**changes))
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def text(self, **changes: Any) -> str:
        return texts(self(**changes))[0]

    def alone(self, **overrides: Any) -> str:
        """What the library answers."""
        llm, overrides = self.server.llm, {"seed": 5, "max_new_tokens": 24, **overrides}
        messages = [{"role": "user", "content": PROMPT}]
        generation: Generation = (
            llm.generate(PROMPT, **overrides) if self.path == COMPLETIONS else llm.chat(messages, **overrides)
        )
        # The tiny model's chats hold no thoughts here, or this comparison would not do.
        assert self.path == COMPLETIONS or llm.tokenizer.token_id("<|channel>") not in generation.token_ids
        return readable(generation.text)


def texts(answer: dict[str, Any]) -> list[str]:
    if "output" in answer:
        found = [item["content"][0]["text"] for item in answer["output"] if item["type"] == "message"]
    else:
        found = [
            choice["message"]["content"] if "message" in choice else choice["text"] for choice in answer["choices"]
        ]
    return [readable(text) for text in found]


def logprobs_of(response: dict[str, Any]) -> list[Any]:
    (message,) = (item for item in response["output"] if item["type"] == "message")
    entries: list[Any] = message["content"][0]["logprobs"]
    return entries


def readable(text: str) -> str:
    """Bytes that are no text count once: how many U+FFFD they become depends on where a stream was cut."""
    return re.sub("\ufffd+", "\ufffd", text)


def tokens_out(answer: dict[str, Any]) -> int:
    usage = answer["usage"]
    return int(usage.get("output_tokens", usage.get("completion_tokens")))


Effect = Callable[[Ask], None]
EFFECTS: dict[str, Effect] = {}
GREEDY = {"mode": "ar"}


def effect(*names: str) -> Callable[[Effect], Effect]:
    def register(check: Effect) -> Effect:
        EFFECTS.update(dict.fromkeys(names, check))
        return check

    return register


@effect("messages", "prompt", "input")
def _question(ask: Ask) -> None:
    other = {CHAT: {"messages": [{"role": "user", "content": "A"}]}, COMPLETIONS: {"prompt": "A"}}
    changes = other.get(ask.path, {"input": "A"})
    llm = ask.server.llm
    alone = llm.generate if ask.path == COMPLETIONS else llm.chat
    asked: Any = "A" if ask.path == COMPLETIONS else [{"role": "user", "content": "A"}]
    assert ask.text(**changes) == readable(alone(asked, seed=5, max_new_tokens=24).text) != ask.text()


@effect("instructions")
def _instructions(ask: Ask) -> None:
    llm = ask.server.llm
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    answer = ask(instructions="Be brief.")
    assert texts(answer) == [readable(llm.chat(messages, seed=5, max_new_tokens=24).text)] != [ask.text()]


@effect("model")
def _model(ask: Ask) -> None:
    answer = ask.server.post(ask.path, ask.body(model="gpt-6-astra"))
    assert answer.status_code == 404 and answer.json()["error"]["param"] == "model"


@effect("seed")
def _seed(ask: Ask) -> None:
    assert ask.text(seed=6) == ask.text(seed=6) == ask.alone(seed=6) != ask.text(seed=7)


@effect("temperature")
def _temperature(ask: Ask) -> None:
    for value in (0, 0.7, 2):
        assert ask.text(temperature=value, dgemma=GREEDY) == ask.alone(temperature=value, mode="ar")
    assert ask.text(temperature=0, seed=1, dgemma=GREEDY) == ask.text(temperature=0, seed=2, dgemma=GREEDY)
    assert ask.text(temperature=2, seed=1, dgemma=GREEDY) != ask.text(temperature=2, seed=2, dgemma=GREEDY)


@effect("top_p")
def _top_p(ask: Ask) -> None:
    """Next to nothing leaves the likeliest token, whatever the seed; in a canvas it acts as in the library."""
    narrow = [ask.text(top_p=1e-6, seed=seed, dgemma=GREEDY) for seed in (1, 2)]
    assert narrow[0] == narrow[1] == ask.text(temperature=0, dgemma=GREEDY)
    assert ask.text(top_p=0.3) == ask.alone(top_p=0.3) != ask.text()


@effect("presence_penalty", "frequency_penalty")
def _penalties(ask: Ask) -> None:
    for name in ("presence_penalty", "frequency_penalty"):
        kinds = []
        for value in (-2, 2):
            alone = ask.alone(temperature=0, mode="ar", max_new_tokens=60, **{name: value})
            assert ask.text(temperature=0, dgemma=GREEDY, max_tokens=60, **{name: value}) == alone
            kinds.append(len(set(ask.server.llm.tokenizer.encode(alone))))
        assert kinds[0] < kinds[1], f"{name} must make tokens more various"


@effect("logit_bias")
def _bias(ask: Ask) -> None:
    token = ask.server.llm.tokenizer.encode("a")[0]
    assert set(ask.text(logit_bias={str(token): 100})) == {"a"}
    some = ask.server.llm.tokenizer.encode(ask.text())
    banned = ask.text(logit_bias={str(one): -100 for one in some})
    assert banned == ask.alone(logit_bias={one: -100 for one in some}) != ask.text()


@effect("max_tokens", "max_completion_tokens", "max_output_tokens")
def _budget(ask: Ask) -> None:
    names = {CHAT: ("max_tokens", "max_completion_tokens"), COMPLETIONS: ("max_tokens",)}
    for name in names.get(ask.path, ("max_output_tokens",)):
        body = {key: value for key, value in ask.body().items() if not key.startswith("max_")}
        for count in (1, 7):
            answer = ask.server.post(ask.path, body | {name: count}).json()
            assert tokens_out(answer) <= count and ask.alone(max_new_tokens=count) == texts(answer)[0]
        refused = ask.server.post(ask.path, body | {name: 100_000})
        error = refused.json()["error"]
        assert refused.status_code == 400 and error["param"] == name
        assert "100000" in error["message"] and "512" in error["message"] and name in error["message"]


@effect("n")
def _n(ask: Ask) -> None:
    assert texts(ask(n=3)) == [ask.alone(choice=index) for index in range(3)]


@effect("stop")
def _stop(ask: Ask) -> None:
    whole = ask.text()
    for stop in (whole[5:8], [whole[9:12], whole[5:8]], ["never §", whole[2]]):
        cut = min(whole.index(one) for one in ([stop] if isinstance(stop, str) else stop) if one in whole)
        assert ask.text(stop=stop) == whole[:cut]


@effect("stream")
def _stream(ask: Ask) -> None:
    raw = ask.server.post(ask.path, ask.body(stream=True))
    assert raw.headers["content-type"].startswith("text/event-stream") and raw.text.startswith(("data: ", "event: "))


@effect("stream_options")
def _stream_options(ask: Ask) -> None:
    if ask.path == RESPONSES:
        assert ask.server.post(ask.path, ask.body(stream=True, stream_options={})).status_code == 200
        return
    chunks = ask.server.chunks(ask.path, ask.body(stream=True, stream_options={"include_usage": True}))
    assert chunks[-2]["usage"]["completion_tokens"] == tokens_out(ask())
    chunks = ask.server.chunks(ask.path, ask.body(stream=True, stream_options={"include_canvas": True}))
    assert any(chunk["dgemma"].get("line", {}).get("type") == "draft" for chunk in chunks[:-1] if "dgemma" in chunk)


@effect("logprobs", "top_logprobs", "include")
def _logprobs(ask: Ask) -> None:
    if ask.path == COMPLETIONS:
        for count in (0, 3):
            logprobs = ask(logprobs=count)["choices"][0]["logprobs"]
            assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) > 0
            assert {len(top) for top in logprobs["top_logprobs"]} <= {count, count - 1}  # two ids may have one text
        assert ask()["choices"][0]["logprobs"] is None
        return
    if ask.path == RESPONSES:
        include = ["message.output_text.logprobs"]
        for count, more in ((0, {}), (0, {"top_logprobs": 0}), (4, {"top_logprobs": 4})):
            entries = logprobs_of(ask(include=include, **more))
            assert entries and {len(entry["top_logprobs"]) for entry in entries} == {count}
        assert logprobs_of(ask()) == []
        return
    assert ask(logprobs=False)["choices"][0]["logprobs"] is None
    content = ask(logprobs=True)["choices"][0]["logprobs"]["content"]
    assert content and all(entry["top_logprobs"] == [] for entry in content)
    content = ask(logprobs=True, top_logprobs=4)["choices"][0]["logprobs"]["content"]
    assert {len(entry["top_logprobs"]) for entry in content} == {4}


@effect("reasoning_effort", "reasoning")
def _reasoning(ask: Ask) -> None:
    """The template of the tiny model writes <|think|> where there is a system message."""
    if ask.path == CHAT:
        system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
        plain, aloud = (ask(messages=system, reasoning_effort=effort) for effort in ("none", "medium"))
    else:
        plain, aloud = (ask(instructions="Be brief.", reasoning={"effort": effort}) for effort in ("none", "medium"))
    name = "prompt_tokens" if ask.path == CHAT else "input_tokens"
    assert aloud["usage"][name] > plain["usage"][name]


@pytest.mark.parametrize("path", TYPED)
def test_the_table_has_every_field(path: str) -> None:
    typed = {name for kind in TYPED[path] for name in typing.get_type_hints(kind)}
    assert typed - set(TABLES[path]) == set(), "the client has fields that nobody decided on"
    assert set(TABLES[path]) - typed == set(), "the client has no such fields"


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, table in TABLES.items() for name in table])
def test_a_field_acts_or_is_refused(server: Running, llm: LLM, path: str, name: str) -> None:
    neutral, refused = TABLES[path][name]
    ask = Ask(server, path)
    usual = ask.text()
    for value in neutral:
        assert ask.text(**{name: value}) == usual, f"{name}={value!r} must change nothing"
    for value in refused:
        answer = server.post(path, ask.body(**{name: value}))
        error = answer.json()["error"]
        assert answer.status_code == 400, f"{name}={value!r}: {answer.text}"
        assert str(error["param"]).startswith(name), f"{name}={value!r}: {error}"
        assert name.rpartition(".")[2] in error["message"] or "unknown" in error["message"], error
    if name in EFFECTS and not (path == RESPONSES and name == "prompt"):
        EFFECTS[name](ask)
    elif name not in BOOKS:
        assert refused, f"{name} has no effect, so some value of it must be refused"


@pytest.mark.parametrize("path", TYPED)
def test_a_field_nobody_knows_is_refused(server: Running, path: str) -> None:
    for changes, param in (({"unknown": 1}, "unknown"), ({"dgemma": {"unknown": 1}}, "dgemma.unknown")):
        answer = server.post(path, Ask(server, path).body(**changes))
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param
    missing = "messages" if path == CHAT else "prompt" if path == COMPLETIONS else "input"
    body = {name: value for name, value in Ask(server, path).body().items() if name != missing}
    answer = server.post(path, body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == missing


def test_top_k(server: Running) -> None:
    for path in TYPED:
        ask = Ask(server, path)
        one = [ask.text(top_k=1, seed=seed, dgemma=GREEDY) for seed in (1, 2)]
        assert one[0] == one[1] == ask.text(temperature=0, dgemma=GREEDY)
        assert ask.text(top_k=0) == ask.text()
        assert server.post(path, ask.body(top_k=-1)).json()["error"]["param"] == "top_k"


def test_the_extension_table_is_whole() -> None:
    assert set(EXTENSION) == set(Extension.model_fields)


@pytest.mark.parametrize("name", EXTENSION)
def test_a_field_of_the_extension_acts(server: Running, llm: LLM, name: str) -> None:
    value, refused = EXTENSION[name]
    setting, ask = SETTING.get(name, {}), Ask(server, COMPLETIONS)
    for wrong in refused:
        error = server.post(COMPLETIONS, ask.body(dgemma={name: wrong})).json()["error"]
        assert error["param"] == f"dgemma.{name}", error
    if name == "trace":
        assert "trace_id" in ask(dgemma={"trace": True})["dgemma"]
        return
    if name == "confidence":  # what it says: test_confidence.py
        plain, told = (ask(dgemma=settings)["choices"][0] for settings in ({}, {"confidence": True}))
        assert "dgemma" not in plain and told["dgemma"]["confidence"]
        return
    plain, changed = ask(dgemma=setting), ask(dgemma={**setting, name: value})
    alone = llm.generate(PROMPT, seed=5, max_new_tokens=24, **setting, **{name: value})
    assert texts(changed) == [readable(alone.text)] and changed["usage"]["dgemma"]["steps"] == list(alone.steps)
    steps = [answer["usage"]["dgemma"]["steps"] for answer in (plain, changed)]
    assert texts(plain) != texts(changed) or steps[0] != steps[1], f"{name} has no effect"


def test_null_switches_a_stop_rule_off(server: Running, llm: LLM) -> None:
    ask, never = Ask(server, COMPLETIONS), {"stability_threshold": None, "confidence_threshold": None}
    early = {"stability_threshold": 0, "confidence_threshold": 9.0}
    assert ask(dgemma=early)["usage"]["dgemma"]["denoising_steps"] == 2
    assert ask(dgemma=never)["usage"]["dgemma"]["steps"] == [6, 6]
    assert ask(dgemma={"mode": None, "sampler": None, "steps": None})["choices"] == ask()["choices"]


def test_a_long_prompt_leaves_what_room_there_is(server: Running, llm: LLM) -> None:
    """Without max_tokens the usual budget shrinks; with it, the request is refused."""
    body = {"model": llm.name, "prompt": [5] * 500, "seed": 1}
    assert server.post(COMPLETIONS, body).status_code == 400  # not even one canvas fits
    body["prompt"] = [5] * 490
    answer = server.post(COMPLETIONS, body).json()
    assert answer["usage"]["completion_tokens"] <= 16
    assert server.post(COMPLETIONS, body | {"max_tokens": 17}).json()["error"]["code"] == "context_length_exceeded"
