"""Mode "verified" in the engine: what mode "ar" would write, at any price; what drafts read and what they leave."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from chance import SURE
from engine_kit import CANVAS, NO_REUSE, WINDOW, config, end, of, prompt, request, run, tiny_model, tokens

from dgemma.config import EngineConfig
from dgemma.control import Control
from dgemma.engine import Engine, Request, validate
from dgemma.engine.pace import Costs, Line, Option, Pace, Plan, Tallies, expected
from dgemma.errors import ConfigError, RequestError
from dgemma.eval.speculation import chi_square
from dgemma.events import Committed, Draft, Event, Scored

MODEL = tiny_model()
PLACED = tiny_model(canvas_positions=CANVAS)
# Three tokens that both passes think likely, so that many drafts stand and many do not.
LIKELY = ((5, 7.0), (9, 5.5), (77, 5.5))
EASY: dict[str, Any] = {"logit_bias": LIKELY, "verify_pace": "fixed", "max_denoising_steps": 3, "temperature": 0.0}


def verified(length: int, seed: int = 0, **changes: Any) -> Request:
    return request(length, seed, **{**EASY, "mode": "verified", **changes})


def ar(length: int, seed: int = 0, **changes: Any) -> Request:
    changes = {name: value for name, value in changes.items() if name != "verify_draft"}
    return request(length, seed, **{**EASY, "mode": "ar", **changes})


def committed(events: Sequence[Event]) -> list[Committed]:
    return [event for event in events if isinstance(event, Committed)]


def alike(
    length: int, seed: int = 0, model: Any = MODEL, engine: EngineConfig = NO_REUSE, **changes: Any
) -> list[Event]:
    """The events of mode verified, whose tokens and ending are those of mode ar."""
    wanted = run(Engine(model, engine), [ar(length, seed, **changes)])
    events = run(Engine(model, engine), [verified(length, seed, **changes)])
    assert tokens(events) == tokens(wanted)
    assert end(events).reason == end(wanted).reason
    return events


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_answer_is_that_of_mode_ar(dtype: torch.dtype, temperature: float) -> None:
    """Prompts around one and three windows, windows narrower and wider than the canvas; answers of several canvases."""
    accepted = []
    for window in (2, WINDOW, CANVAS, 3 * CANVAS):
        model = tiny_model(dtype, sliding_window=window)
        for length in sorted({max(1, window + extra) for extra in (-2, -1, 0, 1)} | {3 * window + 1}):
            events = alike(length, seed=length, model=model, temperature=temperature, max_new_tokens=20)
            accepted += end(events).accepted
    assert sum(accepted) / len(accepted) > 1 and 0 in accepted, "drafts must stand and fall for this to say anything"


@pytest.mark.parametrize("model", [MODEL, PLACED], ids=["moved", "placed"])
@pytest.mark.parametrize("budget", [1, 2, 3, CANVAS - 1, CANVAS, CANVAS + 1, 2 * CANVAS + 1, 40])
def test_any_budget_is_kept(model: Any, budget: int) -> None:
    events = alike(9, model=model, max_new_tokens=budget)
    assert len(tokens(events)) == end(events).completion_tokens == budget


def test_drafts_of_a_model_with_places_stay_in_them() -> None:
    """Its canvases begin where those of mode diffusion do, and the whole canvas is read at every step."""
    item = Request(prompt=prompt(9), config=config(mode="verified", **EASY, max_new_tokens=30), watch=True)
    events = run(Engine(PLACED, NO_REUSE), [item])
    known, drafts = 0, 0
    for event in events:
        if isinstance(event, Draft):
            assert len(event.tokens) == CANVAS - known % CANVAS  # what is committed is told no more
            drafts += 1
        elif isinstance(event, Committed):
            known += len(event.tokens)
    assert drafts > 3


def test_a_canvas_reads_the_committed_tokens_at_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(PLACED, NO_REUSE)
    seen: list[tuple[int, list[int], dict[int, int]]] = []
    inner = engine.runner.denoise

    def spy(jobs: Any, softs: Any, draws: Any) -> Any:
        state = next(iter(engine._running.values()))
        seen.append((jobs[0][0].length, jobs[0][1].tolist(), list(state.ids)))
        return inner(jobs, softs, draws)

    monkeypatch.setattr(engine.runner, "denoise", spy)
    run(engine, [verified(9, max_new_tokens=30)])
    for length, canvas, ids in seen:
        assert (length - 9) % CANVAS == 0 and canvas[: len(ids) - length] == ids[length:] != []


def test_stop_tokens_end_it_where_they_are_accepted() -> None:
    reasons = set()
    for seed in range(8):
        events = alike(7, seed, temperature=1.0, stop_tokens=(9,), max_new_tokens=30)
        reasons.add(end(events).reason)
        assert 9 not in tokens(events)[:-1]
    assert reasons == {"stop"} or reasons == {"stop", "length"}


@pytest.mark.parametrize("draft", ["argmax", "sample"])
def test_no_draft_is_cut_for_what_it_says(draft: str) -> None:
    """An end token that is drafted is tested like any other: all that the budget allows is."""
    engine, ended = Engine(MODEL, NO_REUSE), 0
    for seed in range(10):
        number = engine.add(verified(7, seed, temperature=1.0, stop_tokens=(5,), verify_draft=draft, max_new_tokens=30))
        while engine.has_work:
            engine.tick()
            state = engine._running.get(number)
            if state is not None and state.drafted:
                assert len(state.drafted) == min(CANVAS - 1, state.room - 1)
                ended += 5 in state.drafted[:-1]
    assert ended


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 3}, {"top_p": 0.7}, {"temperature": 0.5}, {"presence_penalty": 1.9}, {"frequency_penalty": 1.2},
        {"logit_bias": ((5, 4.0), (9, -100.0), (12, 4.5))},
    ],
)  # fmt: skip
def test_parameters_of_the_draw_act_as_in_mode_ar(changes: dict[str, Any]) -> None:
    accepted = 0
    for seed in range(2):
        accepted += sum(end(alike(8, seed, max_new_tokens=24, **{"temperature": 1.0, **changes})).accepted)
    assert accepted > 0


def test_penalties_count_the_drafted_tokens_before_a_place() -> None:
    """Or a draft of one token again and again would stand."""
    events = alike(8, max_new_tokens=24, logit_bias=((5, 9.0), (9, 8.0), (77, 7.0)), frequency_penalty=2.0)
    assert len(set(tokens(events))) >= 3 and max(end(events).accepted) >= 1


@pytest.mark.parametrize("draft", ["argmax", "sample"])
def test_company_changes_nothing(draft: str) -> None:
    shared: dict[str, Any] = {"temperature": 1.0, "verify_draft": draft, "max_new_tokens": 30, "watch": True}
    items = [verified(5 + 3 * seed, seed, **shared) for seed in range(4)]
    items += [request(7, 9), request(8, 10, mode="ar", temperature=1.0)]
    engine = EngineConfig(prefix_cache_tokens=0, max_batch_rows=3, max_batch_tokens=40)
    together = run(Engine(MODEL, engine), items)
    for number, item in enumerate(items, start=1):
        assert of(together, number) == of(run(Engine(MODEL, engine), [item]), 1)


def test_drawn_drafts_follow_the_laws_of_the_encoder() -> None:
    """Through the real engine, all 3-grams of a vocabulary of 4; and the same test refuses a wrong law."""
    model = tiny_model(vocab_size=4)
    engine = Engine(model, EngineConfig(prefix_cache_tokens=0, max_batch_rows=100))
    given, sequences = (1, 3, 2), 1000
    asked = config(
        mode="verified", verify_draft="sample", verify_pace="fixed", max_denoising_steps=1, max_new_tokens=4,
        canvas_length=4,
    )  # fmt: skip
    answers: dict[int, list[int]] = {}
    accepted: list[int] = []
    items = [Request(prompt=given, config=asked.with_(choice=choice)) for choice in range(sequences)]
    for start in range(0, sequences, 500):
        for event in run(engine, items[start : start + 500]):
            if isinstance(event, Committed):
                answers.setdefault(event.request, []).extend(event.tokens)
            elif hasattr(event, "accepted") and not isinstance(event, Draft):
                accepted += event.accepted
    grams = torch.tensor([answer[:3] for answer in answers.values()])
    counts = torch.bincount(grams @ torch.tensor([16, 4, 1]), minlength=64)
    law = _joint(engine, given, 4)
    assert sum(accepted) > sequences / 4
    assert chi_square(counts, law)[2] > 1e-3
    assert chi_square(counts, torch.softmax(1.6 * law.log(), 0))[2] < SURE


def _joint(engine: Engine, given: tuple[int, ...], vocab: int) -> torch.Tensor:
    def after(ids: tuple[int, ...]) -> torch.Tensor:
        cache = engine.new_cache()
        return torch.log_softmax(engine.runner.logits(engine.runner.encode([(cache, ids)])[0][-1:]), -1)[0].double()

    logs = [
        after(given)[a] + after((*given, a))[b] + after((*given, a, b))
        for a in range(vocab) for b in range(vocab)
    ]  # fmt: skip
    return torch.cat(logs).exp()


def test_drawn_drafts_at_temperature_0_are_the_likeliest_tokens() -> None:
    alike(9, verify_draft="sample", max_new_tokens=30)


@pytest.mark.parametrize("top", [0, 3])
def test_logprobs_are_those_of_mode_ar(top: int) -> None:
    def told(mode: Any) -> list[Any]:
        item = mode(9, temperature=1.0, max_new_tokens=30, stop_tokens=(77,))
        events = run(Engine(MODEL, NO_REUSE), [Request(prompt=item.prompt, config=item.config, logprobs=top)])
        numbers = [event.canvas for event in committed(events)]
        assert numbers == [event.canvas for event in events if isinstance(event, Scored)] == sorted(set(numbers))
        return [pair for e in events if isinstance(e, Scored) for pair in zip(e.logprobs, e.top, strict=True)]

    assert told(verified) == told(ar)


def test_counts_add_up() -> None:
    events = alike(9, max_new_tokens=50)
    last, commits = end(events), committed(events)
    drafts = [event for event in commits if event.stop != "ar"]
    assert len(last.accepted) == len(last.steps) == len(drafts)
    assert [event.steps for event in drafts] == list(last.steps)
    assert [len(event.tokens) - 1 for event in drafts] == list(last.accepted)
    assert last.encode_passes == len(commits) - 1  # the first token comes with the prompt


def test_what_was_refused_leaves_nothing_in_the_cache() -> None:
    """Keys and values after the answer are those of a plain encoding of it."""
    engine = Engine(MODEL, NO_REUSE)
    number = engine.add(verified(9, max_new_tokens=30, temperature=1.0))
    while engine.has_work:
        state = engine._running.get(number)
        if state is not None and state.drafting and state.drafting.accepted and not state.drafted:
            fresh = engine.new_cache()
            for token in state.ids[: state.cache.length]:
                engine.runner.encode([(fresh, [token])])
            for layer in range(4):
                for mine, plain in zip(state.cache.prefix(layer), fresh.prefix(layer), strict=True):
                    assert torch.equal(mine, plain)
        engine.tick()


@pytest.mark.parametrize("block", [1, 3, CANVAS])
def test_reuse_takes_prompts_and_never_drafts(block: int) -> None:
    shared = Engine(MODEL, EngineConfig(prefix_block=block, encode_chunk=16))
    first = run(shared, [verified(24, max_new_tokens=30)])
    again = run(shared, [verified(24, max_new_tokens=30)])
    plain = run(Engine(MODEL, NO_REUSE), [ar(24, max_new_tokens=30)])
    assert tokens(first) == tokens(again, 2) == tokens(plain)
    assert end(again, 2).cached_tokens >= 23 - 23 % block - block
    # Who goes on from the whole answer gets what a fresh engine would give.
    longer = Request(prompt=(*prompt(24), *tokens(first)), config=ar(24, max_new_tokens=9).config)
    assert tokens(run(shared, [longer]), 3) == tokens(run(Engine(MODEL, NO_REUSE), [longer]))


def test_abort_in_the_middle_of_a_draft() -> None:
    engine = Engine(MODEL, NO_REUSE)
    number = engine.add(verified(9, max_new_tokens=60, max_denoising_steps=9, stability_threshold=None))
    for _ in range(4):
        engine.tick()
    last = engine.abort(number)
    assert last is not None and last.reason == "abort" and not engine.has_work
    alike(9, max_new_tokens=12)


@pytest.mark.parametrize("places", [None, CANVAS])
@pytest.mark.parametrize("draft", ["argmax", "sample"])
def test_another_model_may_draft(places: int | None, draft: str) -> None:
    """What is written is the law of the engine's own model, beside requests of any mode."""
    other = tiny_model(seed=5, hidden_size=16, num_experts=0, top_k_experts=0, expert_size=0,
                       sliding_window=4, canvas_positions=places)  # fmt: skip
    items = [verified(5 + 9 * seed, seed, temperature=1.0, verify_draft=draft, max_new_tokens=30) for seed in range(3)]
    items += [request(7, 9), ar(8, 10)]
    engine = Engine(MODEL, EngineConfig(encode_chunk=8), drafter=other)
    together = run(engine, items)
    for number, item in enumerate(items, start=1):
        assert of(together, number) == of(run(Engine(MODEL, EngineConfig(encode_chunk=8), drafter=other), [item]), 1)
    for number in range(1, 4):
        steps, passes, last = end(together, number).steps, end(together, number).encode_passes, end(together, number)
        assert len(last.accepted) == len(steps) and sum(last.accepted) > 0
        assert passes > len([event for event in committed(together) if event.request == number]) - 1
        if draft == "argmax":
            plain = run(
                Engine(MODEL, NO_REUSE), [ar(5 + 9 * (number - 1), number - 1, temperature=1.0, max_new_tokens=30)]
            )
            assert tokens(together, number) == tokens(plain)
    assert of(together, 4) == of(run(Engine(MODEL, EngineConfig(encode_chunk=8)), [items[3]]), 1)
    with pytest.raises(ConfigError, match="vocabulary of 128 tokens, got one of 64"):
        Engine(MODEL, drafter=tiny_model(vocab_size=64))


def test_a_drafter_keeps_keys_and_values_that_count() -> None:
    alone, both = Engine(MODEL), Engine(MODEL, drafter=MODEL)
    asked = verified(9)
    assert both.kv_bytes(asked) == 2 * alone.kv_bytes(asked)
    assert both.kv_bytes(request(9)) == alone.kv_bytes(request(9))


def test_wrong_settings_are_refused_by_name() -> None:
    for changes, words in (({"verify_draft": "x"}, "verify_draft"), ({"verify_pace": 1}, "verify_pace")):
        with pytest.raises(RequestError, match=words):
            config(**changes)
    with pytest.raises(RequestError, match="canvas_length must be at most"):
        validate(request(5, mode="verified", canvas_length=1000), MODEL.config)
    with pytest.raises(RequestError, match='needs mode "diffusion", got mode "verified"'):
        control = Control(pins=((0, 1),))
        validate(Request(prompt=(3,), config=config(mode="verified"), control=control), MODEL.config)
    with pytest.raises(ConfigError, match="canvas_cost"):
        EngineConfig(canvas_cost=0)


def test_positions_of_the_model_limit_drafts_and_not_the_answer() -> None:
    model = tiny_model(max_positions=9 + 21)
    events = alike(9, model=model, max_new_tokens=21)
    assert len(tokens(events)) == 21


# --- pace ---


def paid(acceptance: float, cost: float, tokens_: int = 4000, most: int = 16, width: int = 16) -> tuple[float, float]:
    """Speed over autoregression, and drafts a token, of an engine whose drafts stand so often; steps do not help."""
    pace, own = Pace(Costs(cost)), Tallies()
    generator = torch.Generator().manual_seed(0)
    written, spent, drafts = 0, 0.0, 0
    while written < tokens_:
        options = [Option(size, 1, size - 1) for size in (width, 4 * width)]
        plan = pace.choose(options, config(max_denoising_steps=most), own, 1)
        accepted, steps = 0, 0
        if plan is not None:
            steps, drafts = plan.config.max_denoising_steps, drafts + 1
            while accepted < plan.option.tokens and float(torch.rand(1, generator=generator)) < acceptance:
                accepted += 1
        tested = 0 if plan is None else accepted + (accepted < plan.option.tokens)
        pace.learn(plan, own, tested, accepted, steps, 1)
        written, spent = written + accepted + 1, spent + (1 if plan is None else cost * (steps + 1))
    return written / spent, drafts / written


@pytest.mark.parametrize("cost", [1.2, 3.0, 10.0])
def test_drafts_that_fail_cost_little(cost: float) -> None:
    for acceptance in (0.0, 0.3, 0.6):
        for written in (600, 4000):
            speed, _ = paid(acceptance, cost, written)
            assert speed > 0.95


def test_drafts_that_pay_are_made() -> None:
    for cost in (1.2, 3.0):
        speed, _ = paid(0.99, cost)
        assert speed > 0.85 * max(expected(0.99, width - 1) / (2 * cost) for width in (16, 64))


def test_drafts_at_any_price_leave_no_debt() -> None:
    pace, own, option = Pace(Costs(3.0)), Tallies(), Option(16, 1, 15)
    for _ in range(50):
        pace.learn(Plan(option, config(verify_pace="fixed", max_denoising_steps=9)), own, 15, 15, 9, 1)
    assert pace.choose([option], config(max_denoising_steps=1), Tallies(), 1) is not None


def test_a_change_of_fortune_is_noticed() -> None:
    pace, own, option = Pace(Costs(3.0)), Tallies(), Option(16, 1, 15)
    for accepted in [15] * 20 + [0] * 20:
        plan = pace.choose([option], config(max_denoising_steps=1), own, 1)
        pace.learn(plan, own, accepted + (accepted < 15), accepted, 1, 1) if plan else pace.learn(None, own, 0, 0, 0, 1)
    assert pace.choose([option], config(max_denoising_steps=1), own, 1) is None


def test_prices_are_learnt_from_passes() -> None:
    line = Line()
    for rows in (1, 4, 17, 65, 1, 1, 17, 200) * 5:
        line.saw(rows, 0.002 + 0.0001 * rows)
    line.saw(17, 30.0)  # a pass that was held up
    assert line.seconds(1) == pytest.approx(0.0021, rel=0.25)
    assert line.seconds(65) == pytest.approx(0.0085, rel=0.25)
    costs = Costs(None)
    assert costs.of("denoise", 16, 1) == 3.0  # nothing seen yet
    for _ in range(20):
        costs.saw("encode", 1, 0.001)
        costs.saw("denoise", 16, 0.004)
    assert costs.of("denoise", 16, 1) == pytest.approx(4.0, rel=0.1)
    assert costs.of("encode", 1, 1) == pytest.approx(1.0)


@pytest.mark.parametrize("pace", ["adaptive", "fixed"])
def test_the_pace_is_a_matter_of_price_alone(pace: str) -> None:
    for cost in (0.01, 1.0, 50.0):
        engine = EngineConfig(prefix_cache_tokens=0, canvas_cost=cost)
        events = alike(9, engine=engine, verify_pace=pace, max_new_tokens=60, temperature=1.0)
        if pace == "adaptive" and cost == 50.0:
            assert end(events).accepted == ()
        else:
            assert end(events).accepted
