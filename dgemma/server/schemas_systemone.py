"""The body of POST /v1/systemone: a state and typed questions about it, in the shape that decision models are asked in.

The shape is public (TypeSafe's Jev API and the servers that follow it). What is ours stands in `dgemma`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from dgemma.control.decide import MOST_LABELS, Question
from dgemma.server.schemas import INT64, Strict, fault, fault_of

MOST_QUESTIONS = 128
MOST_LEVELS = 255
Content = str | dict[str, Any] | list[Any]


def text_of(content: Content | None) -> str:
    """A text as it is, anything else as JSON."""
    return "" if content is None else content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


class _Asked(Strict):
    instructions: Content | None = None
    """What is asked. With `[[answer]]` in it, the text of which the answer is a part."""
    labels: list[str] | None = None
    """Ours: the words that are read for the answers, in their order, where they are not the usual ones."""

    @property
    def words(self) -> list[str]:
        """What may stand at the answer."""
        raise NotImplementedError

    @property
    def lines(self) -> list[str]:
        """What the model is told of the answers."""
        raise NotImplementedError

    def question(self, name: str) -> Question:
        """As the model is asked."""
        raise NotImplementedError

    def text(self, cloze: bool) -> str:
        told = text_of(self.instructions)
        return told if cloze else "\n".join([*([told] if told else []), *self.lines])

    def _check_labels(self, answers: int) -> None:
        if self.labels is not None and len(self.labels) != answers:
            raise fault_of(
                "labels", f"there are {answers} answers, so it must have {answers} words, got {len(self.labels)}"
            )


class TrueFalse(Strict):
    """What the two answers mean."""

    true: Content | None = None
    false: Content | None = None


class Noul(_Asked):
    """Whether something holds; the answer is the probability that it does."""

    type: Literal["noul"]
    criteria: TrueFalse | None = None

    @model_validator(mode="after")
    def _two(self) -> Self:
        self._check_labels(2)
        return self

    @property
    def words(self) -> list[str]:
        return self.labels or ["yes", "no"]

    @property
    def lines(self) -> list[str]:
        told = (self.criteria.true, self.criteria.false) if self.criteria else (None, None)
        described = [f"{word}: {text_of(one)}" for word, one in zip(self.words, told, strict=True) if one is not None]
        return [*described, f"Answer {self.words[0]} or {self.words[1]}."]

    def question(self, name: str) -> Question:
        return Question("yesno", tuple(self.words), name=name)


class Choice(_Asked):
    """Which of several options holds."""

    type: Literal["choice"]
    criteria: dict[str, Content | None] = Field(min_length=2, max_length=MOST_LABELS)
    """The options, each with a description or null."""

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        self._check_labels(len(self.criteria))
        if not all(option.strip() for option in self.criteria):
            raise fault_of("criteria", "an option is empty")
        return self

    @property
    def words(self) -> list[str]:
        return self.labels or list(self.criteria)

    @property
    def lines(self) -> list[str]:
        pairs = zip(self.words, self.criteria.values(), strict=True)
        return [word if told is None else f"{word}: {text_of(told)}" for word, told in pairs]

    def question(self, name: str) -> Question:
        return Question("choice", tuple(self.words), name=name)


class Level(_Asked):
    """Where on a scale of ordered levels; the answer is the expected level, counted from 0."""

    type: Literal["score"]
    criteria: list[Content] = Field(min_length=2, max_length=MOST_LEVELS)
    """What the levels mean, the lowest first."""

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        self._check_labels(len(self.criteria))
        return self

    @property
    def words(self) -> list[str]:
        return self.labels or [str(number) for number in range(1, len(self.criteria) + 1)]

    @property
    def lines(self) -> list[str]:
        pairs = zip(self.words, self.criteria, strict=True)
        return [*(f"{word}: {text_of(told)}" for word, told in pairs), "Answer with the number of the level."]

    def question(self, name: str) -> Question:
        return Question("score", tuple(self.words), name=name, values=tuple(map(float, range(len(self.criteria)))))


def _type(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return kind if isinstance(kind, str) else None


# A callable, because the validators of `Strict` keep pydantic from looking at `type` itself.
OneOf = Annotated[
    Annotated[Noul, Tag("noul")] | Annotated[Choice, Tag("choice")] | Annotated[Level, Tag("score")],
    Discriminator(_type),
]


class Reading(Strict):
    """How to read; only a diffusion model has this."""

    draws: int = Field(default=4, ge=1, le=64)
    """Noise draws that the probabilities are averaged over."""
    seed: int = Field(default=0, ge=-INT64, lt=INT64)
    temperature: float | None = Field(default=None, gt=0)
    """Instead of the calibrated one."""
    joint: bool = False
    """All answers in one canvas; every question's `instructions` must have `[[answer]]` in them."""
    encoder: bool = False
    """The autoregressive model's probabilities, too."""


class SystemOneRequest(Strict):
    """Questions about a state, answered with probabilities; no text is written."""

    model: str | None = None
    """This server's model, or nothing. `jev-latest`, which clients of that API send by default, is nothing, too."""
    state: Content
    """What the questions are about: a text, or JSON that is read as text."""
    questions: dict[str, OneOf] = Field(min_length=1, max_length=MOST_QUESTIONS)
    """By names of your own; the answers have the same."""
    dgemma: Reading | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if sum(len(asked.words) for asked in self.questions.values()) > MOST_LABELS:
            raise fault(f"all questions together may have {MOST_LABELS} labels")
        return self
