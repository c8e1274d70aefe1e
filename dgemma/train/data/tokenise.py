"""Rows to tokens with target spans: a text, a completion after its prompt, the assistant's turns of a chat.

Knows no files. What a prompt and what an answer is made of is encoded apart, as it happens at inference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from dgemma.errors import DataError, RequestError
from dgemma.text.chat import ChatTemplate
from dgemma.text.tokenizer import Tokenizer
from dgemma.train.data.documents import Source
from dgemma.train.data.reading import BadRow, BadRows, Kind, Row

Spans = list[tuple[int, int]]


def tokenise(
    name: str, kind: Kind, rows: Iterable[Row], tokenizer: Tokenizer, template: ChatTemplate | None, bad: BadRows
) -> Source:
    """The documents of all good rows; texts get their end when batches are made, answers carry theirs.

    Raises DataError if no row is good, or if a chat cannot be rendered turn by turn.
    """
    end = end_token(tokenizer)
    encode = _encoders(tokenizer, template, end)[kind]
    parts: list[np.ndarray] = []
    spans: Spans = []
    offsets = [0]
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    for row in rows:
        try:
            ids, targets = encode(row)
        except (BadRow, RequestError) as reason:
            bad.add(row.where, reason)
            continue
        parts.append(np.asarray(ids, dtype=dtype))
        spans += [(offsets[-1] + a, offsets[-1] + b) for a, b in targets]
        offsets.append(offsets[-1] + len(ids))
    if not parts:
        raise DataError(f"{name}: no row can be used" + "".join(f"; {line}" for line in bad.first[:1]))
    at = np.array(offsets, dtype=np.int64)
    if kind == "text":
        return Source(name, np.concatenate(parts), at, None, True, end)
    return Source(name, np.concatenate(parts), at, np.array(spans, dtype=np.int64), True, None, answer_only=True)


def end_token(tokenizer: Tokenizer) -> int:
    """The id that ends a text. Raises DataError if the tokenizer has none."""
    name = tokenizer.special_names.get("eos_token", "<eos>")
    end = tokenizer.token_id(name)
    if end is None:
        raise DataError(f"the tokenizer has no end token {name!r}")
    return end


def _encoders(
    tokenizer: Tokenizer, template: ChatTemplate | None, end: int
) -> dict[Kind, Callable[[Row], tuple[list[int], Spans]]]:
    def text(row: Row) -> tuple[list[int], Spans]:
        return [tokenizer.bos, *tokenizer.encode(row.fields["text"])], []

    def completion(row: Row) -> tuple[list[int], Spans]:
        prompt = [tokenizer.bos, *tokenizer.encode(row.fields["prompt"])]
        ids = [*prompt, *tokenizer.encode(row.fields["completion"]), end]
        return ids, [(len(prompt), len(ids))]

    def chat(row: Row) -> tuple[list[int], Spans]:
        if template is None:
            raise DataError(f"{row.where}: a chat needs a checkpoint with a chat template, this one has none")
        return _chat(row, tokenizer, template, end)

    return {"text": text, "completion": completion, "chat": chat}


def _chat(row: Row, tokenizer: Tokenizer, template: ChatTemplate, end: int) -> tuple[list[int], Spans]:
    """Every assistant turn is a span: from the end of its generation prompt to its end-of-turn token."""
    ids: list[int] = []
    spans: Spans = []
    done = ""
    for prompt, closed in _turns(row.fields["messages"], template):
        if not (prompt.startswith(done) and closed.startswith(prompt)):
            raise DataError(
                f"{row.where}: the chat template writes earlier turns anew when a turn is added, so the answers cannot "
                "be told from their prompts; split the chat into one row per answer, or use prompt and completion"
            )
        ids += tokenizer.encode(prompt[len(done) :])
        turn = tokenizer.encode(closed[len(prompt) :])
        # What a template writes behind the end of a turn (a newline) is nobody's answer.
        closing = [at for at, token in enumerate(turn) if token in tokenizer.special_ids]
        answer = turn[: closing[-1] + 1] if closing else [*turn, end]
        spans.append((len(ids), len(ids) + len(answer)))
        ids += answer + (turn[closing[-1] + 1 :] if closing else [])
        done = closed
    return ids[: spans[-1][1]], spans


def _turns(messages: Sequence[dict[str, Any]], template: ChatTemplate) -> Iterable[tuple[str, str]]:
    """Of every assistant turn: the prompt it answers, and the conversation that it closes."""
    for at, message in enumerate(messages):
        if message.get("role") == "assistant":
            yield template.render(messages[:at], True), template.render(messages[: at + 1], False)
