"""Infill and edit: the text around holes stays, fills are as long as asked for, none repeats what follows it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import text_kit
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, normalizers, pre_tokenizers

from dgemma.api import LLM
from dgemma.control.edit import checked, doubted, token_spans
from dgemma.control.infill import Infill, Layout
from dgemma.control.lexicon import Lexicon, doubles, echoes
from dgemma.control.template import Hole, Template, parse
from dgemma.engine.doubting import doubts
from dgemma.engine.infilling import Answered, Filling, run
from dgemma.errors import RequestError
from dgemma.text.tokenizer import Tokenizer
from dgemma.train.stories import make_story

HELD_OUT = 1_000_000_000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    yield LLM.load(text_kit.save_model(tmp_path_factory.mktemp("models") / "tiny", max_positions=512), device="cpu")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("default", device="cpu")


def decoded(llm: LLM, prompt: tuple[int, ...], answer: tuple[int, ...]) -> str:
    return llm.tokenizer.decode([*prompt, *answer])


def plan_of(llm: LLM, text: str) -> Infill:
    return Infill(Lexicon(llm.tokenizer, llm.config.vocab_size), parse(text), (llm.tokenizer.bos,), (0, 1, 6))


# -- what stays --------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.text(st.sampled_from("aot .,\n«é🙂'\"sat"), max_size=5), min_size=2, max_size=3),
    sizes=st.lists(st.integers(1, 3), min_size=2, max_size=2),
    seed=st.integers(0, 9),
)
def test_pinned_text_is_verbatim_in_the_decoded_answer(
    tiny: LLM, parts: list[str], sizes: list[int], seed: int
) -> None:
    """A random model writes whatever it likes, bytes of half characters too; all around it stays."""
    template = Template(tuple(parts), tuple(Hole(n, n) for n in sizes[: len(parts) - 1]))
    plan = Infill(Lexicon(tiny.tokenizer, tiny.config.vocab_size), template, (tiny.tokenizer.bos,), (0, 1, 6))
    assume(plan.layout(plan.least()).size <= 16)
    filling = Filling(plan, tiny.generation.with_(seed=seed), tiny.config, candidates=1)
    try:
        filled = run(tiny.worker, filling)
    except RequestError as error:
        assert "none of" in str(error), error  # six draws of noise may all echo
        return
    assert filled.text == template.filled(filled.fills)
    assert decoded(tiny, filled.prompt_token_ids, filled.token_ids) == filled.text
    for fill, text in zip(filled.fills, plan.texts[1:], strict=True):
        assert fill == fill.strip() and not echoes(fill, text)
    if plan.tails[-1]:
        assert len(filled.token_ids) == plan.layout(plan.least()).size


@pytest.mark.parametrize("text", ["sat on", " sat", "s", "  two", "é🙂", "\n\nA", "on", "conc", "«»", "a b"])
def test_text_is_held_as_it_is_by_any_tokenizer(text: str) -> None:
    byte_level, fallback = text_kit.byte_level(), text_kit.byte_fallback()
    prefixing = text_kit.byte_fallback()
    # As SentencePiece does: every text gets a space before it, and the decoder takes one off.
    prefixing.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    prefixing.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    spaced = text_kit.byte_level()
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for fast in (byte_level, fallback, prefixing, spaced):
        tokenizer = Tokenizer(fast, {"bos_token": "<bos>"})
        ids = Lexicon(tokenizer, tokenizer.vocab_size).held(text)
        for before in ("a", "on", "x."):
            own = tokenizer.encode(before)
            assert tokenizer.decode([*own, *ids]) == tokenizer.decode(own) + text


def test_a_text_that_the_tokenizer_cannot_write_is_refused(tiny: LLM) -> None:
    small = text_kit.byte_level()
    small.normalizer = normalizers.Lowercase()
    tokenizer = Tokenizer(small, {"bos_token": "<bos>"})
    with pytest.raises(RequestError, match="cannot write 'Cat' exactly"):
        Lexicon(tokenizer, tokenizer.vocab_size).held("Cat")
    with pytest.raises(RequestError, match="holds the special token '<eos>'"):
        tiny.infill("a [[...]] b<eos>")


# -- how long ------------------------------------------------------------------------------


def test_lengths_are_those_asked_for(llm: LLM) -> None:
    text = "Once there was a [[... 2 words ...]] who lived in [[... 3 tokens ...]]. [[... 1-2 words ...]] sang."
    filled = llm.infill(text, candidates=6, steps=8)
    assert len(filled.fills[0].split()) == 2 and 1 <= len(filled.fills[2].split()) <= 2
    assert filled.candidates[0].lengths[1] == 3
    assert decoded(llm, filled.prompt_token_ids, filled.token_ids) == filled.text
    good = [one for one in filled.candidates if not one.flaw]
    assert len(good) > 1 and filled.logprob == max(one.logprob for one in good), "the likeliest one that will do"


def test_the_likelihood_is_the_encoders_of_all_behind_the_prompt(llm: LLM) -> None:
    filled = llm.infill("Once upon a time there was a [[... 2-3 tokens ...]] named Anna. She", candidates=2)
    told = llm.score(list(filled.token_ids), prompt=list(filled.prompt_token_ids))
    assert filled.logprob == pytest.approx(told.total, abs=1e-3)
    for one in filled.candidates:
        assert one.logprob == pytest.approx(
            llm.score(list(one.token_ids), prompt=list(filled.prompt_token_ids)).total, abs=1e-3
        )


def test_an_open_end_may_stop_and_is_not_shortened(llm: LLM) -> None:
    filled = llm.infill("Once upon a time, [[...]]", most=10)
    assert len(filled.candidates) == 1 and len(filled.token_ids) == 10 and filled.fills[0]
    story = make_story(HELD_OUT + 3).text
    before = story[: story.rindex(" ", 0, -1)]
    ended = llm.infill(f"{before} [[...]]", most=12, truncate=True)
    assert ended.text == before + " " + ended.fills[0] and len(ended.token_ids) < 12, "it ends with the story"


def test_first_lengths_cover_every_hole(llm: LLM) -> None:
    plan = plan_of(llm, "A [[...]] and [[...]] or [[... 2 words ...]] then.")
    chosen = plan.first(64, 12)
    assert len(set(chosen)) == len(chosen) == 12
    assert {lengths[0] for lengths in chosen} >= {1, 2, 16} and {lengths[2] for lengths in chosen} == {2, 3, 4, 5, 6}
    assert all(plan.layout(lengths).size <= 64 for lengths in chosen)
    assert plan_of(llm, "A [[...]] b").first(64, 64) == [(n,) for n in range(1, 17)]
    assert list(Layout((2, 1), (0, 5), 9).spans) == [slice(0, 2), slice(5, 6)]


def test_what_does_not_fit_is_an_error_or_reported(tiny: LLM) -> None:
    text = "A [[... 2 tokens ...]]" + " on the mat" * 8
    with pytest.raises(RequestError, match="the widest canvas of this model holds 16: a hole cannot see"):
        tiny.infill(text)
    filled = tiny.infill(text, truncate=True, candidates=1)
    assert filled.truncated and filled.text.endswith(" on the mat" * 8)
    assert decoded(tiny, filled.prompt_token_ids, filled.token_ids) == filled.text
    assert not tiny.infill("A [[... 2 tokens ...]] on", truncate=True, candidates=1).truncated


# -- echoes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fill", "text", "echo"),
    [
        ("cat sat", " sat on the mat.", True),
        ("cat Sat on", " sat on the mat.", True),
        ("cat sat on the mat and a dog", " sat on the mat.", True),
        ("cat", " sat on the mat.", False),
        ("sat cat", " sat on the mat.", False),
        ("so.", ".", True),
        ("so,", ".", True),
        ("so", ".", False),
        ('he said."', ' "Yes," said', False),
        ("the end", "", False),
        ("so that he could. She", ". She sang", True),
    ],
)
def test_what_an_echo_is(fill: str, text: str, echo: bool) -> None:
    assert echoes(fill, text) is echo
    if echo and len(fill.split()) == 1:
        assert fill[-1] in doubles(text)


class Parrot:
    """Answers of a model that likes to repeat: `fills` in turn, with the pins that were asked for."""

    def __init__(self, llm: LLM, filling: Filling, fills: list[str]) -> None:
        self.filling, self.fills, self.llm = filling, fills, llm

    def round(self) -> None:
        answers = []
        for request in self.filling.requests():
            ids = [0] * request.config.max_new_tokens
            for place, token in request.control.pins:
                ids[place] = token
            free = [place for place, token in enumerate(ids) if not token]
            own = self.llm.tokenizer.encode(self.fills.pop(0))
            for place, token in zip(free, own, strict=True):
                ids[place] = token
            answers.append(Answered(tuple(ids), (-0.1,) * len(ids), ()))
        self.filling.take(answers)


def test_an_echo_is_not_taken_even_if_it_is_likelier(llm: LLM) -> None:
    filling = llm.filler.infilling(llm.generation, "The [[... 1-2 tokens ...]] sat on the mat.", candidates=2)
    parrot = Parrot(llm, filling, [" cat", " cat sat"])
    parrot.round()
    assert not filling.requests()
    filled = filling.result()
    assert filled.fills == ("cat",) and [one.flaw for one in filled.candidates] == ["", "echo"]


def test_where_all_echo_the_hole_is_filled_again_without_that_end(llm: LLM) -> None:
    filling = llm.filler.infilling(llm.generation, "The [[... 2 tokens ...]] sat on the mat.")
    parrot = Parrot(llm, filling, [" cat sat", " sat on", " big cat"])
    parrot.round()
    (again,) = filling.requests()
    assert again.config.choice == 1
    (sat,) = llm.tokenizer.encode(" sat")
    masks = dict(again.control.masks)
    assert masks[1].tokens[sat] and not masks[0].tokens[sat]
    parrot.round()
    (again,) = filling.requests()
    assert dict(again.control.masks)[1].tokens[llm.tokenizer.encode(" on")[0]]
    parrot.round()
    assert filling.result().fills == ("big cat",)


def test_a_hole_that_nothing_fits_is_an_error_not_an_echo(llm: LLM) -> None:
    filling = llm.filler.infilling(llm.generation, "The [[... 2 tokens ...]] sat on the mat.")
    parrot = Parrot(llm, filling, [" cat sat"] * 99)
    with pytest.raises(RequestError, match=r"none of 7 fills will do \(echo\)"):
        for _ in range(9):
            parrot.round()


def test_no_echo_on_stories(llm: LLM) -> None:
    """Holes before every kind of text; many candidates of too great a length would echo."""
    words = make_story(HELD_OUT + 5).text.split(" ")[:40]
    flaws = []
    for at in range(8, 32, 4):
        text = " ".join(words[:at]) + " [[... 4-9 tokens ...]] " + " ".join(words[at + 1 : at + 8])
        filled = llm.infill(text, candidates=6, steps=12)
        assert not echoes(filled.fills[0], " " + " ".join(words[at + 1 : at + 8]))
        flaws += [one.flaw for one in filled.candidates]
    assert "echo" in flaws, "the model does echo, so the test tests something"


# -- masks -------------------------------------------------------------------------------


def test_masks_hold_at_every_place(llm: LLM) -> None:
    """A hole of n words in n tokens: each begins a word; the last is not the word that follows."""
    plan = plan_of(llm, "There was a [[... 3 words ...]] named")
    masks = dict(plan.control((3,)).masks)
    pieces = plan.lexicon.pieces
    for place in range(3):
        allowed = [pieces[token] for token in (~masks[place].tokens).nonzero().flatten().tolist()]
        assert allowed and all(piece[:1] == b" " and len(piece.split()) == 1 for piece in allowed)
    (named,) = llm.tokenizer.encode(" named")
    assert masks[2].tokens[named] and not masks[1].tokens[named]


def test_an_instruction_is_shown_or_reported(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = "The cat sat because [[a short reason]]. It was late."
    shown = llm.filler.infilling(llm.generation, text)
    assert "a short reason" in llm.tokenizer.decode(shown.plan.prompt) and llm.infill(text, candidates=2).ignored == ()
    folder = text_kit.save_model(tmp_path_factory.mktemp("models") / "plain", template=None)
    plain = LLM.load(folder, device="cpu").infill("a [[a reason]] b", candidates=2)
    assert plain.ignored == ("a reason",)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 5}, "max_new_tokens has no meaning here"),
        ({"mode": "ar"}, 'needs mode "diffusion"'),
        ({"candidates": 0}, "candidates must be a whole number of 1..64, got 0"),
        ({"most": 0}, "most is a number of tokens"),
        ({"unknown": 1}, "unknown generation parameter 'unknown'"),
    ],
)
def test_wrong_options_are_refused(tiny: LLM, options: dict, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        tiny.infill("a [[...]] b", **options)


# -- edit ------------------------------------------------------------------------------


def test_an_edit_keeps_all_but_its_spans(llm: LLM) -> None:
    text = "Once upon a time there was a little girl named Anna. She had a red ball."
    begin = text.index("little girl")
    spans = [(text.index("red"), text.index("red") + 3), (begin, begin + len("little girl"))]
    edited = llm.edit(text, spans=spans, seed=3)
    first, second = edited.changes
    assert (first.old, second.old) == ("little girl", "red")
    assert (
        edited.text
        == text[: first.start] + first.new + text[first.end : second.start] + second.new + text[second.end :]
    )
    assert decoded(llm, edited.prompt_token_ids, edited.token_ids) == edited.text
    resized = llm.edit(text, spans=spans[:1], resize=2)
    assert resized.text.startswith(text[: spans[0][0]]) and resized.text.endswith(text[spans[0][1] :])


def test_doubt_finds_what_does_not_belong_and_mends_it(llm: LLM) -> None:
    words = make_story(HELD_OUT + 7).text.split(" ")[:40]
    words[12], words[30] = "elephant", "purple"
    bad = " ".join(words)
    for by in ("canvas", "encoder"):
        edited = llm.edit(bad, doubt=0.1, by=by)
        olds = " ".join(change.old for change in edited.changes)
        assert "elephant" in olds and "purple" in olds, by
        assert edited.logprob > edited.before + 10 and len(edited.doubted) > 40
    kept = llm.edit(bad, doubt=0.1, keep_prefix=bad.index("elephant") + 8)
    assert kept.text.startswith(bad[: bad.index("elephant") + 8])


def test_the_encoders_doubt_is_its_log_probability(llm: LLM) -> None:
    ids = llm.tokenizer.encode("Once upon a time there was a purple")
    told = doubts(llm.engine, [llm.tokenizer.bos], ids, "encoder")
    assert told == pytest.approx(llm.score(ids).logprobs, abs=1e-4)
    canvas = doubts(llm.engine, [llm.tokenizer.bos], ids, "canvas")
    assert min(range(len(ids)), key=canvas.__getitem__) >= len(ids) - 2


def test_an_instruction_starts_from_the_given_text(llm: LLM) -> None:
    text = "Once upon a time there was a little girl named Anna."
    editing = llm.filler.editing(llm.generation, text, instruction="Make her a boy.")
    (request,) = editing.filling.requests()
    assert request.control.draft == tuple(llm.tokenizer.encode(text)) and not request.control.pins
    assert "Make her a boy." in llm.tokenizer.decode(request.prompt)
    assert llm.edit(text, instruction="Make her a boy.").text


def test_spans_are_checked() -> None:
    assert checked("ab cd ef", [(6, 8), (0, 3), (3, 5)]) == [(0, 2), (3, 5), (6, 8)]
    assert checked("abcd", [(0, 2), (2, 4)]) == [(0, 4)]
    for spans, words in [
        ([(0, 9)], "0:9 is not in the text, which has characters 0:8"),
        ([(2, 2)], "2:2 is not in the text"),
        ([(2, 3)], "holds nothing but spaces"),
        ([(0, 4), (3, 5)], "0:4 and 3:5 overlap"),
        ([], "no spans to edit"),
        ([(0, 1, 2)], "a span is two whole numbers"),
    ]:
        with pytest.raises(RequestError, match=words):
            checked("ab cd ef", spans)


def test_tokens_know_their_characters(llm: LLM) -> None:
    lexicon = Lexicon(llm.tokenizer, llm.config.vocab_size)
    for text in ("Once upon a time", "é🙂 b", "a 🙂🙂", "\n\nx"):
        spans = token_spans(lexicon, text, llm.tokenizer.encode(text))
        assert {at for first, last in spans for at in range(first, last)} == set(range(len(text)))
    likely = [-1.0, -9.0, -1.0, -1.0]
    assert doubted("ab cd ef gh", [(0, 2), (2, 4), (4, 5), (5, 11)], likely, 0.25, (0, 11)) == [(3, 5)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "say what to edit"),
        ({"spans": [(0, 1)], "doubt": 0.1}, "give one of them"),
        ({"doubt": 0}, "more than 0 and at most 1; got 0"),
        ({"doubt": 0.1, "by": "me"}, "one of canvas, encoder; got 'me'"),
        ({"spans": [(0, 1)], "keep_prefix": 1}, "reach into what keep_prefix"),
        ({"keep_prefix": 2, "keep_suffix": 3}, "leave nothing of 5 characters"),
        ({"keep_prefix": 9}, "0..5 of this text; got 9"),
        ({"spans": [(0, 1)], "resize": -1}, "resize is a number of tokens"),
    ],
)
def test_wrong_edits_are_refused(tiny: LLM, options: dict, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        tiny.edit("a b c", **options)


def test_a_mask_is_checked_and_kept_by_the_engine(tiny: LLM) -> None:
    vocab = tiny.config.vocab_size
    plan = plan_of(tiny, "a [[... 3 tokens ...]] b")
    (request,) = Filling(plan, tiny.generation, tiny.config, candidates=1).requests()
    for place, mask in request.control.masks:
        assert mask.tokens.dtype == torch.bool and mask.tokens.shape == (vocab,) and place < 3
