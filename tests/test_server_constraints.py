"""Structured answers of the server, with the real `openai` client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from openai import BadRequestError, OpenAI
from pydantic import BaseModel, Field
from server_kit import Running, running
from text_kit import save_model

from dgemma.api import LLM


class Pet(BaseModel):
    name: str = Field(max_length=4)
    kind: Literal["cat", "dog"]
    age: int = Field(ge=0, le=9)


SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": SCHEMA}}
HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    llm = LLM.load(save_model(tmp_path_factory.mktemp("tiny"), max_positions=512))
    with running(llm) as one:
        yield one


@pytest.fixture(scope="module")
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_parse_with_a_pydantic_model(client: OpenAI, server: Running) -> None:
    answer = client.chat.completions.parse(
        model=server.llm.name, messages=HELLO, response_format=Pet, seed=3, max_tokens=80
    )
    pet = answer.choices[0].message.parsed
    assert isinstance(pet, Pet) and pet.kind in ("cat", "dog")
    assert answer.choices[0].finish_reason == "stop"


def test_responses_parse(client: OpenAI, server: Running) -> None:
    answer = client.responses.parse(model=server.llm.name, input="Hello", text_format=Pet, max_output_tokens=80)
    assert isinstance(answer.output_parsed, Pet)


def test_json_object_streamed(client: OpenAI, server: Running) -> None:
    stream = client.chat.completions.create(
        model=server.llm.name, messages=HELLO, response_format={"type": "json_object"}, stream=True, max_tokens=40
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("route", ["chat", "completions"])
@pytest.mark.parametrize(
    ("fields", "fits"),
    [
        ({"guided_json": SCHEMA}, lambda text: isinstance(json.loads(text)["ok"], bool)),
        ({"guided_json": json.dumps(SCHEMA)}, lambda text: isinstance(json.loads(text)["ok"], bool)),
        ({"response_format": FORMAT}, lambda text: isinstance(json.loads(text)["ok"], bool)),
        ({"guided_regex": "[a-c]{3}"}, lambda text: len(text) == 3 and set(text) <= set("abc")),
        ({"guided_choice": ["yes", "no", "a.b"]}, lambda text: text in ("yes", "no", "a.b")),
        ({"guided_grammar": 'a: "x" a | "y"'}, lambda text: text.strip("x") == "y"),
    ],
)
def test_guided_fields(client: OpenAI, server: Running, route: str, fields: dict[str, Any], fits: Any) -> None:
    for seed in (1, 2):
        common: dict[str, Any] = {"model": server.llm.name, "seed": seed, "n": 2, "extra_body": fields}
        if route == "chat":
            texts = [c.message.content or "" for c in client.chat.completions.create(messages=HELLO, **common).choices]
        else:
            texts = [c.text for c in client.completions.create(prompt="Hello", **common).choices]
        assert len(texts) == 2 and all(map(fits, texts)), texts


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"guided_regex": "("}, "guided_regex", "brackets that do not match"),
        ({"guided_choice": []}, "guided_choice", ""),
        ({"guided_json": {"not": {}}}, "guided_json", "'not' is not supported"),
        ({"guided_json": "{"}, "guided_json", "the schema is not JSON"),
        ({"guided_grammar": "a: b"}, "guided_grammar", "no rule 'b'"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "one structure"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs a json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format", "must be of type"),
        ({"response_format": FORMAT | {"more": 1}}, "response_format", "unknown field 'more'"),
        ({"guided_regex": "a{60}", "max_tokens": 9}, "max_tokens", "max_tokens is 9"),
        ({"guided_regex": "a", "top_k": 5}, "top_k", "cannot be combined with a constraint"),
        ({"guided_regex": "a", "dgemma": {"mode": "ar"}}, "dgemma.mode", 'needs mode "diffusion"'),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    client: OpenAI, server: Running, fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(model=server.llm.name, messages=HELLO, extra_body=fields)
    assert caught.value.param == param and message in str(caught.value)


def test_the_trace_tells_the_path_of_each_step(server: Running) -> None:
    answer = server.chat(guided_regex="[a-c]{3}", dgemma={"trace": True})
    lines = [json.loads(line) for line in server.get(f"/v1/traces/{answer.json()['id']}").text.splitlines()]
    drafts = [line for line in lines if line.get("type") == "draft"]
    assert drafts and all(len(line["states"]) == line["width"] + 1 and line["states"][0] == 0 for line in drafts)
