"""Answers with a structure: `response_format` as OpenAI has it, `guided_*` as vLLM has it; and their constraint.

Reads fields and compiles; what a schema may say is the business of `dgemma.control`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from dgemma.api import LLM
from dgemma.control.language.languages import ANY_OBJECT, expression
from dgemma.errors import RequestError
from dgemma.server.errors import invalid
from dgemma.server.schemas import Penalised, Sampling

_GUIDED = {"json": "schema", "regex": "regex", "choice": "choices", "grammar": "grammar"}


async def constrain(llm: LLM, body: Sampling, values: dict[str, Any], names: dict[str, str]) -> None:
    """Put the constraint that `body` asks for, if any, among the parameters; a 400 names the field at fault.

    Automata are compiled beside the event loop; the engine's own check then finds them made.
    """
    asked = _asked(body)
    if len(asked) > 1:
        raise invalid(f"an answer can have one structure; got {' and '.join(asked)}", list(asked)[1])
    for field, language in asked.items():
        try:
            pattern = await asyncio.to_thread(_compiled, llm, language)
        except RequestError as error:
            raise invalid(str(error), field) from None
        values["regex"], names["regex"] = pattern, field


def _compiled(llm: LLM, language: dict[str, Any]) -> str:
    pattern = expression(**language)
    assert pattern is not None
    llm.compiler.edges(pattern)
    return pattern


def _asked(body: Sampling) -> dict[str, dict[str, Any]]:
    """Field to language."""
    found: dict[str, dict[str, Any]] = {}
    if isinstance(body, Penalised):
        for name, language in _GUIDED.items():
            value = getattr(body, f"guided_{name}")
            if value is not None:
                found[f"guided_{name}"] = {language: value}
    text = getattr(body, "text", None)
    chosen, field = (
        (text.format, "text.format") if text else (getattr(body, "response_format", None), "response_format")
    )
    if chosen is not None and chosen["type"] != "text":
        found[field] = {"schema": ANY_OBJECT if chosen["type"] == "json_object" else chosen["schema"]}
    return found
