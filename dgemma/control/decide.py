"""Decision reads as plain data: closed questions, templates with a hole, the tree of tokens that tells labels apart.

A label's probability is a product over the branchings on its way. At a branching, the canvas holds every token on which
the labels that are still possible agree, and noise elsewhere; what the denoiser predicts at the position where they
first differ, renormalised over the tokens found there, says which way. Which canvases are to be read follows from the
labels alone, so all of them can be read in one pass. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dgemma.errors import RequestError
from dgemma.text.chat import ChatTemplate
from dgemma.text.tokenizer import Tokenizer

HOLE, QUESTION = "[[answer]]", "[[question]]"
KINDS = ("yesno", "choice", "score")
MOST_LABELS = 10_000
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Question:
    """A closed question: one of `labels`, of kind "yesno" (two, the first is yes), "choice", or "score".

    `text` takes the place of `[[question]]` in the template. `values` are what the labels of a score count, in order.
    """

    kind: str
    labels: tuple[str, ...]
    text: str = ""
    name: str = ""
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        named = f"question {self.name!r}" if self.name else "a question"
        if self.kind not in KINDS:
            raise RequestError(f"the kind of {named} must be one of {', '.join(KINDS)}; got {self.kind!r}")
        if not all(isinstance(label, str) and label.strip() for label in self.labels):
            raise RequestError(f"the labels of {named} must be texts that are not empty, got {list(self.labels)!r}")
        if len(set(self.labels)) < len(self.labels):
            twice = next(label for label in self.labels if self.labels.count(label) > 1)
            raise RequestError(f"{named} has the label {twice!r} twice")
        if self.kind == "yesno" and len(self.labels) != 2:
            raise RequestError(f"{named} is a yes/no question and needs 2 labels, got {len(self.labels)}")
        if not 2 <= len(self.labels) <= MOST_LABELS:
            raise RequestError(f"{named} must have 2 to {MOST_LABELS} labels, got {len(self.labels)}")
        if len(self.values) != (len(self.labels) if self.kind == "score" else 0):
            raise RequestError(
                f"values belong to a score, one to a label; {named} is a {self.kind} with {len(self.labels)} labels "
                f"and {len(self.values)} values"
            )

    @staticmethod
    def of(fields: Mapping[str, Any]) -> Question:
        """A question from plain fields, as they stand in a JSON file; a score may give `low` and `high`."""
        known = {"kind", "labels", "text", "name", "values", "low", "high"}
        if unknown := sorted(set(fields) - known):
            raise RequestError(f"a question has no field {unknown[0]!r}; it may have {', '.join(sorted(known))}")
        given = dict(fields)
        kind = given.pop("kind", None)
        if kind == "score" and "labels" not in given:
            return score(given.pop("low", 1), given.pop("high", 5), **given)
        labels = given.pop("labels", ("yes", "no") if kind == "yesno" else ())
        if not isinstance(labels, list | tuple):
            raise RequestError(f"labels must be a list of texts, got {labels!r}")
        if kind == "score" and "values" not in given:
            given["values"] = tuple(_number(label) for label in labels)
        given["values"] = tuple(given.get("values", ()))
        return Question(str(kind), tuple(labels), **given)


def yes_no(text: str = "", *, yes: str = "yes", no: str = "no", name: str = "") -> Question:
    """Whether something holds, told by one of two words."""
    return Question("yesno", (yes, no), text, name)


def choice(labels: Sequence[str], text: str = "", *, name: str = "") -> Question:
    """Which of the labels belongs into the hole."""
    return Question("choice", tuple(labels), text, name)


def score(low: int, high: int, text: str = "", *, name: str = "") -> Question:
    """A whole number from `low` to `high`, both included."""
    if not isinstance(low, int) or not isinstance(high, int) or not low < high or high - low >= MOST_LABELS:
        raise RequestError(
            f"a score needs whole numbers low < high, at most {MOST_LABELS} of them; got {low!r}, {high!r}"
        )
    numbers = range(low, high + 1)
    return Question("score", tuple(map(str, numbers)), text, name, tuple(map(float, numbers)))


def _number(label: Any) -> float:
    try:
        return float(label)
    except (TypeError, ValueError):
        raise RequestError(f"the labels of a score are numbers, or it has values beside them; got {label!r}") from None


@dataclass(frozen=True)
class Branch:
    """A branching: at `position` of the canvas, `labels[i]` (numbers) go on with `tokens[i]`; `pins` are given."""

    pins: tuple[tuple[int, int], ...]
    position: int
    tokens: tuple[int, ...]
    labels: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Asked:
    """One question as tokens: `lead` stands before the canvas, `tails` are what each label makes of its beginning."""

    question: Question
    lead: tuple[int, ...]
    tails: tuple[tuple[int, ...], ...]
    branches: tuple[Branch, ...]
    reach: int
    """Positions that the canvas must have."""


def opened(
    template: str | Sequence[Mapping[str, Any]], chat: ChatTemplate | None, tokenizer: Tokenizer, prompt: Sequence[int]
) -> tuple[str, Sequence[int]]:
    """The template as a text, and the ids before it: `prompt`, or nothing where a conversation begins itself."""
    if isinstance(template, str):
        return template, prompt
    if chat is None or len(prompt) > 1:
        raise RequestError("a conversation needs a model with a chat template, and no prompt before it")
    text = chat.render(template, add_generation_prompt=False)
    return text, () if text.startswith(tokenizer.special_names.get("bos_token", "<bos>")) else prompt


def prepare(
    encode: Encode,
    template: str,
    questions: Question | Sequence[Question],
    before: Sequence[int],
    *,
    joint: bool = False,
) -> list[Asked]:
    """The questions as tokens behind those of `before`: a canvas of its own for each, or one for all if `joint`.

    Text is cut in front of the spaces before a hole, and the parts are tokenised apart. A canvas begins at its (first)
    hole, so that all text before it can be encoded.
    """
    questions = [questions] if isinstance(questions, Question) else list(questions)
    if not questions:
        raise RequestError("there are no questions; decide needs at least 1")
    if joint:
        return _jointly(encode, _expand(template, questions), questions, before)
    asked = []
    leads: dict[str, tuple[int, ...]] = {}
    for question in questions:
        head, *rest = _parts(_expand(template, [question]), 1)
        if head not in leads:
            leads[head] = (*before, *encode(head))
        lead = leads[head]
        tails = _tails(encode, question, rest[0])
        asked.append(Asked(question, lead, tails, tuple(_branches(tails, question)), max(map(len, tails))))
    return asked


def _expand(template: str, questions: Sequence[Question]) -> str:
    """The template with the questions' texts in their place, one a line."""
    if QUESTION in template:
        return template.replace(QUESTION, "\n".join(question.text for question in questions))
    if texts := [question.text for question in questions if question.text]:
        raise RequestError(f"the template has no {QUESTION} where the question {texts[0][:60]!r} could stand")
    return template


def _parts(text: str, holes: int) -> list[str]:
    """What stands before the first hole, then each hole's own spaces, a mark, and the text up to the next hole."""
    pieces = text.split(HOLE)
    if len(pieces) != holes + 1:
        raise RequestError(
            f"the text must have {holes} {HOLE} for {holes} question{'s' * (holes > 1)}, got {len(pieces) - 1}: "
            f"{text[-80:]!r}"
        )
    cut = [(piece.rstrip(" "), piece[len(piece.rstrip(" ")) :]) for piece in pieces[:-1]]
    after = [head for head, _ in cut[1:]] + [pieces[-1]]
    return [cut[0][0], *(f"{spaces}{HOLE}{rest}" for (_, spaces), rest in zip(cut, after, strict=True))]


def _tails(encode: Encode, question: Question, part: str) -> tuple[tuple[int, ...], ...]:
    tails = tuple(tuple(encode(part.replace(HOLE, label))) for label in question.labels)
    if len(set(tails)) < len(tails):
        same = next(i for i, tail in enumerate(tails) if tails.index(tail) < i)
        first = question.labels[tails.index(tails[same])]
        raise RequestError(f"the labels {first!r} and {question.labels[same]!r} are the same tokens for this model")
    return tails


def _branches(
    tails: Sequence[tuple[int, ...]], question: Question, start: int = 0, given: tuple[tuple[int, int], ...] = ()
) -> Iterator[Branch]:
    """All branchings; positions count from `start`, `given` are further pins."""
    waiting = [tuple(range(len(tails)))]
    while waiting:
        members = waiting.pop()
        rows = [tails[label] for label in members]
        # Sorted rows differ first where some neighbours do.
        shared = min(_common(*pair) for pair in pairwise(sorted(rows)))
        ended = [label for label, row in zip(members, rows, strict=True) if len(row) == shared]
        if ended:
            longer = next(label for label in members if label != ended[0])
            raise RequestError(
                f"the label {question.labels[ended[0]]!r} is the beginning of {question.labels[longer]!r}, so a canvas "
                f"cannot tell them apart; let text follow the {HOLE}"
            )
        ways: dict[int, list[int]] = {}
        for label, row in zip(members, rows, strict=True):
            ways.setdefault(row[shared], []).append(label)
        columns = enumerate(zip(*rows, strict=False))
        pins = tuple((start + place, column[0]) for place, column in columns if len(set(column)) == 1)
        yield Branch(tuple(sorted((*given, *pins))), start + shared, tuple(ways), tuple(map(tuple, ways.values())))
        waiting += [tuple(way) for way in ways.values() if len(way) > 1]


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many first tokens two rows share."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(left), len(right)))


def _jointly(encode: Encode, text: str, questions: Sequence[Question], before: Sequence[int]) -> list[Asked]:
    """All holes in one canvas. Each one's labels must be equally long, or nobody knows where the next one stands."""
    head, *parts = _parts(text, len(questions))
    lead = (*before, *encode(head))
    every = [_tails(encode, question, part) for question, part in zip(questions, parts, strict=True)]
    for question, tails in zip(questions, every, strict=True):
        lengths = sorted(set(map(len, tails)))
        if len(lengths) > 1:
            raise RequestError(
                f"joint needs labels of equal length; those of {question.name or question.text!r} differ by "
                f"{lengths[-1] - lengths[0]} tokens. Ask it alone"
            )
    starts = [sum(len(tails[0]) for tails in every[:place]) for place in range(len(every) + 1)]
    fixed = [
        tuple((start + at, column[0]) for at, column in enumerate(zip(*tails, strict=True)) if len(set(column)) == 1)
        for start, tails in zip(starts, every, strict=False)
    ]
    asked = []
    for place, (question, tails) in enumerate(zip(questions, every, strict=True)):
        others = tuple(pin for other, pins in enumerate(fixed) if other != place for pin in pins)
        branches = tuple(_branches(tails, question, starts[place], others))
        asked.append(Asked(question, lead, tails, branches, starts[-1]))
    return asked
