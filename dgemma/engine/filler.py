"""From a text with holes, or a text to edit, to a search (`engine.infilling`), with a model's own tokenizer.

The one place of this room that reads and gives text; it does so through `control`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dgemma.config import GenerationConfig, is_whole
from dgemma.control.edit import Change, Span, checked, doubted, kept, template_of, token_spans
from dgemma.control.infill import USUAL_MOST, Infill
from dgemma.control.lexicon import Lexicon
from dgemma.control.template import MOST_TOKENS, Hole, Template, parse
from dgemma.engine.doubting import doubts
from dgemma.engine.infilling import USUAL_CANDIDATES, Filling, Infilled, run
from dgemma.engine.likelihood import token_logprobs
from dgemma.engine.worker import Worker
from dgemma.errors import RequestError
from dgemma.text.tokenizer import Tokenizer

_FILL = "Fill in every place of this text that stands in double brackets. Write the whole text.\n\n"
Chat = Callable[[Sequence[dict[str, str]]], list[int]]


@dataclass(frozen=True)
class Edited:
    """An edited text and its `changes`. `logprob` and `before` are the encoder's, in nats, of the new and of the old
    text from the first character on that could change.

    `doubted` tells for each token of the given text its characters and log-probability, if the model chose. `truncated`
    tells that some place did not see all the text behind it. `steps` are of each canvas.
    """

    text: str
    changes: tuple[Change, ...]
    logprob: float
    before: float
    doubted: tuple[tuple[Span, float], ...]
    truncated: bool
    steps: tuple[int, ...]
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    seed: int
    approximate: bool
    model: str


@dataclass(frozen=True)
class Editing:
    """A planned edit: have its `filling` run, then ask for the `result`. No `spans`: all of the text is open."""

    filling: Filling
    text: str
    spans: tuple[Span, ...]
    doubted: tuple[tuple[Span, float], ...]
    before: float

    def result(self, filled: Infilled) -> Edited:
        spans = self.spans or ((0, len(self.text)),)
        pairs = zip(spans, filled.fills, strict=True)
        return Edited(
            text=filled.text,
            changes=tuple(Change(*span, self.text[slice(*span)], fill) for span, fill in pairs),
            logprob=filled.logprob,
            before=self.before,
            doubted=self.doubted,
            truncated=filled.truncated,
            steps=filled.candidates[0].steps,
            token_ids=filled.token_ids,
            prompt_token_ids=filled.prompt_token_ids,
            seed=filled.seed,
            approximate=filled.approximate,
            model=filled.model,
        )


class Filler:
    """Plans and runs infills and edits of one model. `chat` renders a conversation, if the model knows any."""

    def __init__(self, worker: Worker, tokenizer: Tokenizer, chat: Chat | None, name: str) -> None:
        self.worker, self._tokenizer, self._chat, self._name = worker, tokenizer, chat, name
        self._model = worker.engine.model_config
        self._lexicon = Lexicon(tokenizer, self._model.vocab_size)

    def infilling(
        self,
        config: GenerationConfig,
        text: str | Template,
        *,
        prompt: str = "",
        candidates: int = USUAL_CANDIDATES,
        most: int = USUAL_MOST,
        truncate: bool = False,
        watch: bool = False,
        **overrides: Any,
    ) -> Filling:
        """The search for what belongs into the holes of `text`; see `LLM.infill`."""
        if not is_whole(most, 1, MOST_TOKENS):
            raise RequestError(f"most is a number of tokens, 1..{MOST_TOKENS}; got {most!r}")
        template = parse(text) if isinstance(text, str) else text
        shown = bool(template.instructions) and self._chat is not None
        before = self._before(prompt, _FILL + template.written if shown else "")
        plan = Infill(self._lexicon, template, before, config.blank_tokens, most)
        return Filling(
            plan,
            _with(config, overrides),
            self._model,
            candidates=candidates,
            truncate=truncate,
            watch=watch,
            ignored=() if shown else template.instructions,
            name=self._name,
        )

    def infill(self, config: GenerationConfig, text: str | Template, **options: Any) -> Infilled:
        return run(self.worker, self.infilling(config, text, **options))

    def editing(
        self,
        config: GenerationConfig,
        text: str,
        *,
        spans: Sequence[Sequence[int]] | None = None,
        doubt: float | None = None,
        by: str = "canvas",
        instruction: str = "",
        prompt: str = "",
        keep_prefix: int = 0,
        keep_suffix: int = 0,
        resize: int = 0,
        candidates: int = USUAL_CANDIDATES,
        truncate: bool = False,
        watch: bool = False,
        **overrides: Any,
    ) -> Editing:
        """The plan of an edit; see `LLM.edit`."""
        if spans is not None and doubt is not None:
            raise RequestError("spans and doubt both say what to edit; give one of them")
        if not text.strip():
            raise RequestError("there is no text to edit")
        if not is_whole(resize, 0, MOST_TOKENS):
            raise RequestError(f"resize is a number of tokens, 0..{MOST_TOKENS}; got {resize!r}")
        if instruction and self._chat is None:
            raise RequestError(f"model {self._name!r} has no chat template, so nobody can tell it an instruction")
        keep = kept(text, keep_prefix, keep_suffix)
        config = _with(config, overrides)
        before = self._before(prompt, f"{instruction}\n\n{text}" if instruction else "")
        told: tuple[tuple[Span, float], ...] = ()
        if spans is not None:
            chosen = checked(text, spans)
            if chosen[0][0] < keep[0] or chosen[-1][1] > keep[1]:
                raise RequestError(
                    f"the spans reach into what keep_prefix and keep_suffix keep; {keep[0]}:{keep[1]} is free"
                )
        elif doubt is not None:
            ids = self._lexicon.held(text)
            places = token_spans(self._lexicon, text, ids)
            likely = doubts(self.worker.engine, before, ids, by, config.seed)
            chosen = doubted(text, places, likely, doubt, keep)
            told = tuple(zip(places, likely, strict=True))
        elif instruction or keep_prefix or keep_suffix:
            chosen = [] if keep == (0, len(text)) else checked(text, [keep])
        else:
            raise RequestError("say what to edit: spans, doubt, keep_prefix, keep_suffix or an instruction")
        plan = self._plan(text, chosen, before, config, resize)
        filling = Filling(
            plan,
            config,
            self._model,
            candidates=candidates,
            truncate=truncate,
            watch=watch,
            lenient=True,
            name=self._name,
        )
        return Editing(filling, text, tuple(chosen), told, self._likelihood(plan, text, chosen))

    def edit(self, config: GenerationConfig, text: str, **options: Any) -> Edited:
        editing = self.editing(config, text, **options)
        return editing.result(run(self.worker, editing.filling))

    def _plan(
        self, text: str, spans: Sequence[Span], before: tuple[int, ...], config: GenerationConfig, resize: int
    ) -> Infill:
        if spans:
            draft: tuple[int, ...] = ()
            template = template_of(self._lexicon, text, spans, resize)
        else:
            draft = self._lexicon.held(text)
            room = len(draft) + max(resize, len(draft) // 4)
            template = Template(("", ""), (Hole(room, room),))
        plan = Infill(self._lexicon, template, before, config.blank_tokens)
        return replace(plan, draft=draft)

    def _likelihood(self, plan: Infill, text: str, spans: Sequence[Span]) -> float:
        """The encoder's of the old text from the first place on that may change."""
        begin = len(plan.texts[0]) if spans else 0
        ids = self._lexicon.held(text[begin:])
        return sum(token_logprobs(self.worker.engine, [*plan.prompt, *ids], given=len(plan.prompt)))

    def _before(self, prompt: str, message: str) -> tuple[int, ...]:
        """Ids that stand before the text: the begin, a prompt, or a turn of a conversation that asks for it."""
        if message and self._chat is not None:
            return tuple(self._chat([{"role": "user", "content": f"{prompt}\n\n{message}" if prompt else message}]))
        return (self._tokenizer.bos, *self._tokenizer.encode(prompt))


def _with(config: GenerationConfig, overrides: dict[str, Any]) -> GenerationConfig:
    if "max_new_tokens" in overrides:
        raise RequestError("max_new_tokens has no meaning here: how long the text gets follows from its holes")
    if "steps" in overrides:
        if "max_denoising_steps" in overrides:
            raise RequestError("steps is another name of max_denoising_steps; give one of them")
        overrides["max_denoising_steps"] = overrides.pop("steps")
    return config.with_(**overrides)
