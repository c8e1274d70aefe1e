"""What a live view of a request shows, whatever it is drawn on: moments, cells with a heat, running numbers.

Knows events, traces and tokenizers; the terminal (`cli`) and the notebook draw what it says.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Container, Generator, Iterable
from dataclasses import dataclass

from dgemma.events import Committed, Draft, Event, Finished
from dgemma.text.chat import AnswerStream
from dgemma.text.tokenizer import StreamDecoder, Tokenizer
from dgemma.trace import Moment

HEAT_COLOURS = ("#007eba", "#376bfd", "#8353ff", "#b639e3", "#d81aae", "#e8016c", "#ec1000")
"""Heat 1..7, cold to hot. All have the same luminance: 4.4:1 or better on black and on white alike."""
HEAT_NATS = (0.02, 0.1, 0.3, 0.8, 1.6, 2.8, 4.2)
"""Entropy from which a cell has heat 1..7. Below the first: heat 0, sure, the colour of text."""
BLANK = "·"
_LONGEST_WAIT_S = 3.0


@dataclass(frozen=True, slots=True)
class Cell:
    """One position of a canvas. `blank` positions end or fill the answer and will not be part of its text."""

    text: str
    heat: int
    accepted: bool
    blank: bool

    @property
    def strong(self) -> bool:
        """Accepted in this step, and part of the text."""
        return self.accepted and not self.blank

    @property
    def underlined(self) -> bool:
        """Strong, yet unsure: a canvas that has settled is to look calm."""
        return self.strong and self.heat > 0


def heat(entropy: float) -> int:
    """0 (sure) to 7 of an entropy in nats; what is no number counts as unsure."""
    return bisect_right(HEAT_NATS, entropy) if entropy == entropy else len(HEAT_NATS)


def cells(draft: Draft, piece: Callable[[int], str], blank: Container[int]) -> list[Cell]:
    """The predicted canvas. `piece` gives the printable text of an id, `blank` holds end and pad ids."""
    return [
        Cell(BLANK if token in blank else piece(token), heat(entropy), accepted, token in blank)
        for token, entropy, accepted in zip(draft.tokens, draft.entropy, draft.accepted, strict=True)
    ]


def moments(
    events: Iterable[Event], tokenizer: Tokenizer, ends: Container[int], split_thoughts: bool = False
) -> Generator[Moment]:
    """Events with their time and their text. `ends` are the end tokens, which are no part of a text.

    `split_thoughts` takes what stands between channel tokens for a thought; else it is text like the rest.
    """
    begun = time.perf_counter()
    plain, answers = StreamDecoder(tokenizer), AnswerStream(tokenizer)
    for event in events:
        text = thought = ""
        if isinstance(event, Committed):
            ids = event.tokens[:-1] if event.tokens and event.tokens[-1] in ends else event.tokens
            parts = answers.push(ids) if split_thoughts else []
            text = "".join(part.text for part in parts) if split_thoughts else plain.push(ids)
            thought = "".join(part.thought for part in parts)
        elif isinstance(event, Finished):
            parts = answers.flush()
            text = "".join(part.text for part in parts) + plain.flush()
            thought = "".join(part.thought for part in parts)
        yield Moment(time.perf_counter() - begun, event, text, thought)


def paced(moments: Iterable[Moment], speed: float) -> Generator[Moment]:
    """Recorded moments when they are due, `speed` times as fast as they were; long waits are cut to 3 seconds."""
    due, before = time.monotonic(), 0.0
    for moment in moments:
        due += min(max(moment.seconds - before, 0.0) / speed, _LONGEST_WAIT_S)
        before = moment.seconds
        time.sleep(max(due - time.monotonic(), 0.0))
        yield moment


class Progress:
    """The running numbers of one request; `observe` every moment in order."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens: list[int] = []
        """Committed tokens, an end token included."""
        self.texts: list[str] = []
        """The text of the committed tokens, in parts."""
        self.steps: list[int] = []
        """Denoising steps of every canvas committed so far."""
        self.stops: list[str] = []
        self.committed: list[Committed] = []
        self.draft: Draft | None = None
        """The canvas in work; None between canvases and in autoregressive mode."""
        self.finished: Finished | None = None

    def observe(self, moment: Moment) -> None:
        """Take the next event into account."""
        self.seconds = moment.seconds
        self.texts.append(moment.text)
        match moment.event:
            case Draft() as draft:
                self.draft = draft
            case Committed(tokens=tokens, steps=steps, stop=stop) as committed:
                self.draft = None
                self.committed.append(committed)
                self.tokens += tokens
                self.stops.append(stop)
                if stop != "ar":
                    self.steps.append(steps)
            case Finished() as finished:
                self.finished = finished

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def autoregressive(self) -> bool:
        """Whether the encoder wrote the first token from the prompt's pass, and each later one in a pass of its own."""
        return self.stops[:1] == ["ar"]

    @property
    def settled(self) -> int:
        """Tokens committed, and those accepted in the canvas in work (which may yet change)."""
        return len(self.tokens) + (sum(self.draft.accepted) if self.draft else 0)

    @property
    def forwards(self) -> int:
        """Forward passes: denoising steps, and encoded canvases or tokens, as `Generation` counts them."""
        if self.autoregressive:
            return sum(self.steps) + len(self.stops) + (self.draft.step if self.draft else 0)
        if self.finished:
            return sum(self.finished.steps) + self.finished.encode_passes
        encoded = len(self.stops) if self.draft else max(len(self.stops) - 1, 0)
        return sum(self.steps) + encoded + (self.draft.step if self.draft else 0)

    @property
    def tokens_per_forward(self) -> float:
        return self.settled / self.forwards if self.forwards else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.settled / self.seconds if self.seconds > 0 else 0.0

    @property
    def mean_entropy(self) -> float:
        """Of the canvas in work, nats a position; 0 when there is none."""
        return sum(self.draft.entropy) / len(self.draft.entropy) if self.draft else 0.0


def count_tokens(progress: Progress) -> str:
    count = len(progress.tokens)
    return f"{count} token{'s' * (count != 1)}"


def numbers(progress: Progress) -> list[str]:
    """The running numbers as texts, the most important first: where it is, how hot, how fast."""
    draft = progress.draft
    if draft is None:
        texts = [count_tokens(progress)]
    else:
        step = f"{draft.step:>{len(str(draft.max_steps))}}/{draft.max_steps}"
        texts = [f"canvas {draft.canvas + 1}", f"step {step}", f"T {draft.temperature:.2f}"]
        texts.append(f"entropy {progress.mean_entropy:.3f}")
    if progress.settled:
        texts.append(f"{progress.tokens_per_second:.0f} tok/s")
        texts.append(f"{progress.tokens_per_forward:.1f} tok/forward")
    return texts
