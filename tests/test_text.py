"""Tokenizer, streaming decoder, chat template (against transformers) and the parts of an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import text_kit
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Fast

from dgemma.errors import CheckpointError, RequestError
from dgemma.text.chat import Answer, AnswerStream, ChatTemplate, split_answer
from dgemma.text.tokenizer import StreamDecoder, Tokenizer, special_names

NAMES = special_names(text_kit.config_json())
KINDS: dict[str, Tokenizer] = {
    "byte level": Tokenizer(text_kit.byte_level(), NAMES),
    "byte fallback": Tokenizer(text_kit.byte_fallback(), NAMES),
}
tokenizers = pytest.mark.parametrize("tokenizer", KINDS.values(), ids=list(KINDS))


# -- tokenizer ----------------------------------------------------------------------------


@tokenizers
@pytest.mark.parametrize("text", [*text_kit.TEXTS, "", " ", "\n\n", "日本語 🙂", " leading", "a\tb"])
def test_text_survives(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@tokenizers
def test_special_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<bos><|turn>user<turn|>")
    assert ids[0] == tokenizer.bos == 2 and ids[1] == 5 and ids[-1] == 6
    assert tokenizer.decode(ids) == "user"
    assert tokenizer.decode(ids, skip_special=False) == "<bos><|turn>user<turn|>"
    assert tokenizer.bos not in tokenizer.encode("plain")
    assert tokenizer.token_id("<eos>") == 1 and tokenizer.token_id("<none>") is None


@tokenizers
def test_vocab_size(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size > 256
    assert tokenizer.decode([tokenizer.vocab_size + 7]) == ""


@tokenizers
def test_every_piece_is_printable_and_on_one_line(tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.piece(token) for token in range(tokenizer.vocab_size + 5)]
    assert all(piece and piece.isprintable() for piece in pieces)
    assert tokenizer.piece(1) == "<eos>"
    assert tokenizer.piece(tokenizer.encode("\n")[-1]) == "↵"
    (token,) = tokenizer.encode(" t") if tokenizer is KINDS["byte fallback"] else tokenizer.encode(" the")[:1]
    assert tokenizer.piece(token).startswith(" t")


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    fast = text_kit.byte_level()
    fast.enable_truncation(3)
    fast.enable_padding(length=10)
    tokenizer = Tokenizer.load(text_kit.save_tokenizer(tmp_path, fast))
    assert tokenizer.decode(tokenizer.encode(text_kit.TEXTS[0])) == text_kit.TEXTS[0]
    assert len(tokenizer.encode("a")) == 1


def test_surrogates_are_refused() -> None:
    with pytest.raises(RequestError, match="UTF-8"):
        KINDS["byte level"].encode("a\udcff")


def test_bos_may_be_an_object_and_the_config_may_be_missing(tmp_path: Path) -> None:
    text_kit.save_tokenizer(tmp_path, text_kit.byte_level())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<eos>"}}))
    assert Tokenizer.load(tmp_path).bos == 1
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(tmp_path).bos == 2


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", "{", "tokenizer.json is not a tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json cannot be read"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json must hold"),
        ("tokenizer_config.json", '{"bos_token": "<nope>"}', "no begin-of-sequence token"),
    ],
)
def test_broken_files_are_named(name: str, content: str | None, told: str, tmp_path: Path) -> None:
    text_kit.save_tokenizer(tmp_path, text_kit.byte_level())
    path = tmp_path / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(CheckpointError, match=told) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


# -- streaming ----------------------------------------------------------------------------


@st.composite
def chopped(draw: st.DrawFn) -> tuple[str, str, list[int]]:
    kind = draw(st.sampled_from(sorted(KINDS)))
    text = draw(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=30))
    return kind, text, draw(st.lists(st.integers(1, 5), max_size=40))


@given(chopped())
def test_streamed_text_equals_decoded(case: tuple[str, str, list[int]]) -> None:
    kind, text, lengths = case
    tokenizer = KINDS[kind]
    ids, decoder, parts = tokenizer.encode(text), StreamDecoder(KINDS[kind]), []
    for length in [*lengths, len(ids) + 1]:
        parts.append(decoder.push(ids[:length]))
        ids = ids[length:]
        assert not parts[-1].endswith("\ufffd")
    assert "".join(parts) + decoder.flush() == tokenizer.decode(tokenizer.encode(text))


@tokenizers
def test_a_character_is_held_until_it_is_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x🙂")
    assert len(ids) == 5
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push([token]) for token in ids] == ["x", "", "", "", "🙂"]
    assert decoder.flush() == ""


@tokenizers
def test_broken_bytes_do_not_hold_back_what_follows(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("🙂")[:2]
    decoder = StreamDecoder(tokenizer)
    text = decoder.push([*half, *half, *half]) + decoder.push(tokenizer.encode("on")) + decoder.flush()
    assert text.endswith("on") and "\ufffd" in text
    assert decoder.push(half) == "" and "\ufffd" in decoder.flush()


@given(st.lists(st.integers(0, 260), max_size=30), st.integers(0, 30))
def test_any_ids_stream(ids: list[int], cut: int) -> None:
    decoder = StreamDecoder(KINDS["byte level"])
    text = decoder.push(ids[:cut]) + decoder.push(ids[cut:]) + decoder.flush()
    assert text.replace("\ufffd", "") == KINDS["byte level"].decode(ids).replace("\ufffd", "")


# -- chat template ------------------------------------------------------------------------

BUSY = """\
{%- macro trimmed(content) -%}
    {%- if content is string -%}{{ content | trim }}
    {%- else -%}{%- for part in content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{{ bos_token }}
{%- set ns = namespace(turns=0, last='') %}
{%- if tools %}
    {{- '<|turn>system\\n' }}
    {% for tool in tools %}
        {{- tool | tojson(indent=2) }}
    {% endfor %}
    {{- '<turn|>\\n' }}
{%- endif %}
{% for message in messages %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
    {% generation %}
    {%- set ns.turns = ns.turns + 1 %}
    {{- '<|turn>' ~ ('model' if message['role'] == 'assistant' else message['role']) }}
    {%- if message.reasoning_content %}<|channel>thought\\n{{ message.reasoning_content }}<channel|>{% endif %}
 {{ trimmed(message.content) -}}
    <turn|>
    {% endgeneration %}
    {%- set ns.last = message.role -%}
{% endfor %}
{{ ns.turns }} {{ ns.last }} {{ dict(a=1)['a'] }} {{ eos_token }} {{ {'ä': '<'} | tojson }} {{ enable_thinking }}
{%- if add_generation_prompt %}<|turn>model
{% endif %}
"""

CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Why is the sky blue?"}],
    "system": [{"role": "system", "content": " Be terse.\n"}, {"role": "user", "content": "  Hi  "}],
    "turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning": "since"},
        {"role": "tool", "content": "42"},
        {"role": "user", "content": "c <turn|> 🙂"},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image"}]}],
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "ü": [1, 2]}}}]


def default_template() -> str:
    """The default model's, if it is there."""
    path = text_kit.REPO / "dgemma/models/default/chat_template.jinja"
    return path.read_text() if path.is_file() else text_kit.TEMPLATE


@pytest.fixture(scope="module", params=["tiny", "busy", "default"])
def template_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = {"tiny": text_kit.TEMPLATE, "busy": BUSY, "default": default_template()}[request.param]
    return text_kit.save_tokenizer(tmp_path_factory.mktemp(request.param), text_kit.byte_level(), source)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("extra", [{}, {"tools": TOOLS}, {"enable_thinking": True}], ids=["", "tools", "think"])
def test_renders_as_transformers_does(template_folder: Path, chat: str, prompted: bool, extra: dict[str, Any]) -> None:
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(template_folder)
    ours = ChatTemplate.load(template_folder)
    assert ours is not None
    try:
        want = theirs.apply_chat_template(CHATS[chat], tokenize=False, add_generation_prompt=prompted, **extra)
    except (TemplateError, TypeError):
        with pytest.raises(RequestError):
            ours.render(CHATS[chat], add_generation_prompt=prompted, **extra)
        return
    assert ours.render(CHATS[chat], add_generation_prompt=prompted, **extra) == want
    ids = theirs.apply_chat_template(CHATS[chat], add_generation_prompt=prompted, return_dict=False, **extra)
    assert Tokenizer.load(template_folder).encode(want) == list(ids)


def test_rendering_leaves_messages_alone() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{{ m.thinking }}{% endfor %}")
    messages = [{"role": "user", "content": "x", "reasoning": "r"}]
    assert template.render(messages) == "xr"
    assert messages == [{"role": "user", "content": "x", "reasoning": "r"}]


def test_where_a_template_is_found(tmp_path: Path) -> None:
    text_kit.save_tokenizer(tmp_path, text_kit.byte_level(), None)
    assert ChatTemplate.load(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(text_kit.config_json("in config")))
    loaded = ChatTemplate.load(tmp_path)
    assert loaded is not None and loaded.render(CHATS["one"]) == "in config"
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}yes"}]
    config.write_text(json.dumps({**text_kit.config_json(), "chat_template": several}))
    loaded = ChatTemplate.load(tmp_path)
    assert loaded is not None and loaded.render(CHATS["one"]) == "<bos>yes"
    (tmp_path / "chat_template.jinja").write_text("a file of its own")
    loaded = ChatTemplate.load(tmp_path)
    assert loaded is not None and loaded.render(CHATS["one"]) == "a file of its own"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja.*does not compile"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['__builtins__'] }}",
        "{{ dict.__init__ }}",
        "{{ dict.mro() }}",
        "{{ (messages | map(attribute='__class__') | list)[0].__name__ }}",
        "{{ ''['__class__'].__name__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ ('{0.__class__}' | attr('format'))(messages) }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update(role='x') }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_a_malicious_template_reaches_nothing(attack: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    try:
        told = ChatTemplate(attack).render(messages)
    except (CheckpointError, RequestError):
        told = ""
    assert told == "" and messages == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "conversation is empty"),
        ([{"role": "robot", "content": "x"}], "message 0: role must be one of system, .*; got 'robot'"),
        ([{"content": "x"}], "got None"),
        (["hello"], "message 0"),
        ([{"role": "user"}], "content must be a text"),
        ([{"role": "user", "content": 5}], "content must be a text"),
        ([{"role": "user", "content": ["x"]}], "content must be a text"),
    ],
)
def test_wrong_messages_are_told(messages: list[Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        ChatTemplate(text_kit.TEMPLATE).render(messages)


def test_what_a_template_refuses_is_told() -> None:
    with pytest.raises(RequestError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(CHATS["one"])
    with pytest.raises(RequestError, match="fails on this conversation"):
        ChatTemplate("{{ 1 + 'a' }}").render(CHATS["one"])


# -- answers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Blue.", Answer("", "Blue.")),
        ("<|channel>thought\nLight scatters.\n<channel|>Blue.", Answer("Light scatters.", "Blue.")),
        ("<|channel>thought\n<channel|>Blue.", Answer("", "Blue.")),
        ("<|channel>thought\nNever ends", Answer("Never ends", "")),
        ("<|channel>thought\na<channel|>x <|channel>thought\nb<channel|>y", Answer("a\nb", "x y")),
        ("", Answer("", "")),
    ],
)
def test_split_answer(text: str, answer: Answer) -> None:
    assert split_answer(text) == answer
    tokenizer = KINDS["byte level"]
    for size in (1, 2, 100):
        ids, stream, parts = tokenizer.encode(text), AnswerStream(tokenizer), []
        while ids:
            parts += stream.push(ids[:size])
            ids = ids[size:]
        parts += stream.flush()
        told = Answer("".join(p.thought for p in parts), "".join(p.text for p in parts))
        assert (told.thought.strip().replace("\n", ""), told.text.strip()) == (
            answer.thought.replace("\n", ""), answer.text,
        )  # fmt: skip


def test_without_channel_tokens_all_is_text() -> None:
    fast = Fast.from_str(text_kit.byte_level().to_str())
    tokenizer = Tokenizer(fast, NAMES)
    stream = AnswerStream(tokenizer)
    assert stream.push(tokenizer.encode("abc")) == [Answer("", "abc")]
