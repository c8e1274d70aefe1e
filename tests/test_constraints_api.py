"""Constraints through `LLM` and the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, Field, field_validator
from text_kit import dgemma, save_model

from dgemma.api import LLM
from dgemma.errors import RequestError

SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}


class Pet(BaseModel):
    name: str = Field(max_length=5)
    kind: Literal["cat", "dog"]


class Never(BaseModel):
    ok: bool

    @field_validator("ok")
    @classmethod
    def _no(cls, value: bool) -> bool:
        raise ValueError("never")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM.load(folder)


def test_parsed_is_an_object_of_the_model(llm: LLM) -> None:
    answers = llm.generate(["Hello", "Once upon a time", "The café"], schema=Pet, seed=4, max_new_tokens=60)
    assert all(isinstance(answer.parsed, Pet) and answer.finish_reason == "stop" for answer in answers)
    assert [Pet.model_validate_json(answer.text) for answer in answers] == [answer.parsed for answer in answers]


def test_parsed_of_other_languages(llm: LLM) -> None:
    assert isinstance(llm.generate("a", schema=SCHEMA).parsed["ok"], bool)
    assert isinstance(llm.generate("a", schema=json.dumps(SCHEMA)).parsed["ok"], bool)
    assert isinstance(llm.generate("a", schema="object").parsed, dict)
    chosen = llm.generate("a", choices=["yes", "no"])
    assert chosen.text in ("yes", "no") and chosen.parsed is None
    assert re.fullmatch("(é|€|日){2,5}", llm.generate("a", regex="(é|€|日){2,5}").text)
    assert set(llm.generate("a", grammar='s: "(" s ")" | "x"').text) <= set("(x)")
    assert llm.generate("a").parsed is None


def test_a_model_that_checks_more_than_its_schema_says_why(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"fits the schema, but the model refuses it(?s:.*)never"):
        llm.generate("a", schema=Never)


@pytest.mark.parametrize(
    ("language", "settings", "message"),
    [
        ({"schema": Pet}, {"mode": "ar"}, 'needs mode "diffusion", got mode "ar"'),
        ({"schema": Pet}, {"mode": "verified"}, 'needs mode "diffusion", got mode "verified"'),
        ({"regex": "a{90}"}, {"max_new_tokens": 20}, "tokens, its end token included; max_new_tokens is 20"),
        ({"regex": "a", "schema": Pet}, {}, "got schema and regex"),
        ({"choices": ["a"]}, {"stop_tokens": ()}, "needs an end token"),
    ],
)
def test_refused_before_generation(
    llm: LLM, language: dict[str, object], settings: dict[str, object], message: str
) -> None:
    before = llm.engine.counters
    with pytest.raises(RequestError, match=message):
        llm.generate("a", **language, **settings)
    assert llm.engine.counters == before


def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pet.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "x.txt").write_text('s: "(" s ")" | "x"')
    for arguments, fits in (
        (["--schema", str(tmp_path / "pet.json")], r'\{"ok": (true|false)\}'),
        (["--regex", "[ab]{3}"], "[ab]{3}"),
        (["--choices", "yes,no"], "yes|no"),
        (["--grammar", str(tmp_path / "x.txt")], r"\(*x\)*"),
    ):
        done = dgemma("generate", "Hello", "--model", str(folder), "--quiet", *arguments)
        assert done.returncode == 0 and re.fullmatch(fits, done.stdout.decode().strip()), done
    for arguments, message in (
        (["--schema", "/nowhere"], b"the schema '/nowhere' cannot be read"),
        (["--regex", "("], b"brackets that do not match"),
        (["--regex", "a", "--choices", "b"], b"got regex and choices"),
    ):
        done = dgemma("generate", "Hello", "--model", str(folder), *arguments)
        assert done.returncode and message in done.stderr and b"Traceback" not in done.stderr
