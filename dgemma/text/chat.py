"""Conversations to prompts, through the checkpoint's own template; and answers back into thought and text.

A template is a program from an untrusted file: it runs in a sandbox, sees plain data only and can write
nothing.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dgemma.errors import CheckpointError, RequestError
from dgemma.text.tokenizer import StreamDecoder, Tokenizer, read_tokenizer_config, special_names

ROLES = ("system", "developer", "user", "assistant", "tool")
CHANNEL_OPEN = "<|channel>"
CHANNEL_CLOSE = "<channel|>"
_THOUGHT = re.compile(r"<\|channel>(?:thought)?\n?(.*?)(?:<channel\|>\s*|\Z)", re.DOTALL)


class ChatTemplate:
    """A compiled chat template. `render` gives exactly what `transformers.apply_chat_template` gives."""

    def __init__(self, source: str, names: Mapping[str, str] | None = None) -> None:
        """`names` are the special tokens a template may print, as in `{"bos_token": "<bos>"}`."""
        self.source = source
        self._names = dict(names or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template does not compile: {error}") from None

    @staticmethod
    def load(folder: str | Path) -> ChatTemplate | None:
        """Of a checkpoint: `chat_template.jinja`, else the one in `tokenizer_config.json`, else None."""
        config = read_tokenizer_config(folder)
        path = Path(folder) / "chat_template.jinja"
        if path.is_file():
            try:
                source: Any = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from None
        else:
            path = Path(folder) / "tokenizer_config.json"
            source = config.get("chat_template")
            if isinstance(source, list):  # older files hold several, by name
                source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise CheckpointError(f"{path}: chat_template must be a text, got {type(source).__name__}")
        try:
            return ChatTemplate(source, special_names(config))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any) -> str:
        """The prompt of a conversation. `extra` reaches the template (`tools=`, `enable_thinking=`, ...).

        Messages are `{"role": ..., "content": ...}`; the content is a text or a list of parts.
        """
        plain = [_checked(index, message) for index, message in enumerate(messages)]
        if not plain:
            raise RequestError("the conversation is empty: give at least one message")
        values: dict[str, Any] = {**self._names, "tools": None, "documents": None, **copy.deepcopy(extra)}
        values |= {"messages": plain, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(values)
        except jinja2.exceptions.SecurityError as error:
            raise CheckpointError(f"the chat template does what the sandbox forbids: {error}") from None
        except jinja2.TemplateError as error:
            raise RequestError(f"the chat template refuses this conversation: {error}") from None
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise RequestError(f"the chat template fails on this conversation: {error}") from None


def _checked(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of one message that the template may see, with the reasoning under the names templates read."""
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in ROLES:
        raise RequestError(f"message {index}: role must be one of {', '.join(ROLES)}; got {role!r}")
    content = message.get("content")
    parts = isinstance(content, list | tuple) and all(isinstance(x, Mapping) and "type" in x for x in content)
    if not (isinstance(content, str) or parts or (content is None and message.get("tool_calls"))):
        raise RequestError(f"message {index}: content must be a text or a list of parts, got {content!r}")
    plain = copy.deepcopy(dict(message))
    fields = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((plain[name] for name in fields if plain.get(name) is not None), None)
    if reasoning is not None:
        plain.update({name: reasoning for name in fields[:2] if plain.get(name) is None})
    return plain


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace without names that begin with an underscore: those reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        own, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _Namespace._guard(name)
        jinja2.utils.Namespace.__init__(own, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._guard(name)
        super().__setitem__(name, value)

    @staticmethod
    def _guard(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} begins with an underscore")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """`dict(...)` for templates: a function has no methods that the type would offer."""
    return dict(*args, **kwargs)


def _environment() -> ImmutableSandboxedEnvironment:
    """The jinja2 dialect that chat templates are written in, as `transformers` sets it up."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_make_dict, namespace=_Namespace
    )
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes characters for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


@dataclass(frozen=True)
class Answer:
    """An answer in its two parts; `thought` is empty when the model did not think aloud."""

    thought: str
    text: str


def split_answer(text: str) -> Answer:
    """Split `<|channel>thought ... <channel|>` from the answer, in a text decoded with its special tokens.

    A thought without an end is a thought to the end: the budget ran out.
    """
    thoughts = [match.strip() for match in _THOUGHT.findall(text)]
    return Answer("\n".join(filter(None, thoughts)), _THOUGHT.sub("", text).strip())


class AnswerStream:
    """The same for ids that arrive bit by bit: `push` gives the new parts, in order, each thought or text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._open, self._close = (tokenizer.token_id(name) for name in (CHANNEL_OPEN, CHANNEL_CLOSE))
        self._decoder = StreamDecoder(tokenizer)
        self._thinking = False
        self._heading = ""  # begun name of the channel, not shown
        self._in_heading = False

    def push(self, ids: Sequence[int]) -> list[Answer]:
        """The new text, one `Answer` a change between thinking and answering; empty ones are left out."""
        parts: list[Answer] = []
        start = 0
        for index, token in enumerate(ids):
            if token is not None and token in (self._open, self._close):
                self._add(parts, self._decoder.push(ids[start:index]) + self._decoder.flush())
                self._thinking = self._in_heading = token == self._open
                self._heading, start = "", index + 1
        self._add(parts, self._decoder.push(ids[start:]))
        return parts

    def flush(self) -> list[Answer]:
        """The end: what the decoder still held back."""
        parts: list[Answer] = []
        self._add(parts, self._decoder.flush())
        return parts

    def _add(self, parts: list[Answer], text: str) -> None:
        if self._in_heading:
            self._heading += text
            name, newline, rest = self._heading.partition("\n")
            if not newline and "thought".startswith(name):
                return
            self._in_heading = False
            text = rest if newline and name in ("", "thought") else self._heading
        if text:
            parts.append(Answer(text, "") if self._thinking else Answer("", text))
