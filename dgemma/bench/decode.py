"""Decoding one prompt at a time: denoising, autoregression and the peer on the same weights, taking turns.

Three kinds of runs. `fixed`: one canvas of a fixed number of steps, no early stop, no end tokens, so both sides do
the same work; beside its steps stands the floor. `own`: the checkpoint's own sampler settings, stop rule and end
tokens. `ar`: the encoder of the same weights, greedy, with the token budget of `own` (ours only: the peer has no such
mode).
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from dgemma.api import LLM
from dgemma.bench.floor import Floor, Routing, encode_floor, step_floor
from dgemma.bench.machine import Machine, Memory
from dgemma.bench.parts import observe_routing
from dgemma.bench.peer import MediumPeer, Peer
from dgemma.bench.rates import Rates
from dgemma.bench.results import (
    KINDS,
    PROMPTS,
    DecodeReport,
    DecodeSettings,
    Ratio,
    Row,
    Timed,
    ratios_of,
    row_of,
)
from dgemma.bench.runs import Ours, Side
from dgemma.bench.tuned import TunedPeer
from dgemma.checkpoint.files import find_folder
from dgemma.config import GenerationConfig
from dgemma.engine import Request, validate
from dgemma.errors import DgemmaError

Say = Callable[[str], object]


def run_decode(
    llm: LLM,
    settings: DecodeSettings,
    overrides: Mapping[str, Any] | None = None,
    say: Say = lambda text: None,
) -> DecodeReport:
    """Measure. `overrides` are generation parameters taken over the checkpoint's; `say` hears what is going on."""
    own = llm.generation.with_(**{**(overrides or {}), "mode": "diffusion"})
    canvas = own.canvas_length or llm.config.canvas_length
    # Whole canvases, because that is what the peer writes.
    own = own.with_(max_new_tokens=-(-own.max_new_tokens // canvas) * canvas)
    kinds = {kind: config for kind, config in _kinds(own, canvas, settings).items() if kind in settings.kinds}
    prompts = prompts_of(llm, settings.prompts, settings.prompt_tokens)
    for prompt, config in itertools.product(prompts, kinds.values()):
        validate(Request(prompt=tuple(prompt), config=config, reuse=False), llm.config)
    model = llm.engine.runner.model
    machine = Machine.of(llm.device, llm.dtype)
    with contextlib.ExitStack() as stack:
        peers = _peers(llm, settings, canvas, stack, say) if settings.peer else []
        sides: list[Side] = [Ours(llm.engine), *peers]
        plan = [(side, kind) for kind in kinds for side in (sides[:1] if kind == "ar" else sides)]
        agreement = _agreement(sides, prompts[0]) if peers else None
        memory = _rehearse(plan, kinds, prompts[0], say)
        floors = _Floors(llm, prompts, canvas, sides[0], say) if settings.floor and "fixed" in kinds else None
        seeds = tuple(own.seed + repeat for repeat in range(settings.repeats))
        timed = _measure(plan, kinds, prompts, seeds, say)
    step, encode = floors.again(say) if floors else (None, None)
    return DecodeReport(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=llm.name,
        parameters=sum(weight.numel() for weight in model.parameters()),
        machine=machine,
        peer=f"transformers {peers[0].version}" if peers else None,
        peer_settings={peer.name: peer.settings for peer in peers},
        settings=settings,
        generation=own,
        canvas=canvas,
        prompts=PROMPTS[: settings.prompts],
        seeds=seeds,
        agreement=agreement,
        rows=tuple(row_of(side.name, kind, timed, memory[side.name, kind]) for side, kind in plan),
        ratios=tuple(ratios_of(timed, [side.name for side in sides])),
        floor=step,
        prompt_floor=encode,
        runs=tuple(asdict(item) for item in timed),
    )


def prompts_of(llm: LLM, count: int, tokens: int | None = None) -> list[list[int]]:
    """Ids of the first `count` built-in prompts, each repeated or cut to `tokens` if given."""
    prompts = [llm.encode_prompt(text) for text in PROMPTS[:count]]
    if tokens is None:
        return prompts
    return [list(itertools.islice(itertools.cycle(prompt), tokens)) for prompt in prompts]


def _peers(
    llm: LLM, settings: DecodeSettings, canvas: int, stack: contextlib.ExitStack, say: Say
) -> list[Peer | MediumPeer | TunedPeer]:
    say("loading transformers")
    folder = find_folder(settings.peer_model)[0] if settings.peer_model else llm.folder
    dtype = getattr(torch, settings.peer_dtype) if settings.peer_dtype else llm.dtype
    peer = Peer(folder, llm.config, dtype, llm.device, canvas)
    peers: list[Peer | MediumPeer | TunedPeer] = [peer]
    if settings.medium:
        peers.append(MediumPeer(peer))
    if settings.tuned:
        say("loading transformers again, with a tuned allocator")
        peers.append(stack.enter_context(TunedPeer(folder, dtype, canvas, peer.version)))
    return peers


class _Floors:
    """The floors of a step and of the prompt's pass: measured before the timed runs, and again after them."""

    def __init__(self, llm: LLM, prompts: Sequence[Sequence[int]], canvas: int, ours: Side, say: Say) -> None:
        say("the floor: rates of torch's primitives")
        self._config, self._canvas = llm.config, canvas
        self._prompt = round(statistics.median(len(prompt) for prompt in prompts))
        self._rates = Rates(llm.device, llm.dtype)
        brief = llm.generation.with_(max_new_tokens=canvas, canvas_length=canvas, max_denoising_steps=2, stop_tokens=())
        self._routing = observe_routing(lambda: ours.run(prompts[0], brief), canvas)
        self.now()

    def now(self) -> tuple[Floor, Floor]:
        step = step_floor(self._config, self._rates, self._prompt, [self._canvas], self._routing)
        return step, encode_floor(self._config, self._rates, 0, self._prompt, Routing())

    def again(self, say: Say) -> tuple[Floor, Floor]:
        say("the floor again: the better of both counts")
        self._rates.again()
        return self.now()


def _kinds(own: GenerationConfig, canvas: int, settings: DecodeSettings) -> dict[str, GenerationConfig]:
    fixed = own.with_(
        max_new_tokens=canvas, max_denoising_steps=settings.fixed_steps, canvas_length=canvas, stability_threshold=None,
        confidence_threshold=None, stop_tokens=(), sampler="entropy_bound", convention="hf", temperature=1.0, top_k=0,
    )  # fmt: skip
    return {"fixed": fixed, "own": own, "ar": own.with_(mode="ar", temperature=0.0)}


def _agreement(sides: Sequence[Side], prompt: Sequence[int]) -> float:
    ours, theirs = (side.encode(prompt) for side in sides[:2])
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _rehearse(
    plan: Sequence[tuple[Side, str]],
    kinds: Mapping[str, GenerationConfig],
    prompt: Sequence[int],
    say: Say,
) -> dict[tuple[str, str], Memory]:
    """One untimed run of everything: first calls import and allocate, and memory is measured here."""
    for side in dict.fromkeys(side for side, _ in plan):
        say(f"warming up {side.name}")
        brief = next(iter(kinds.values())).with_(mode="diffusion", max_denoising_steps=2)
        side.run(prompt, brief)
    memory = {}
    for side, kind in plan:
        say(f"memory: {side.name}, {kind}")
        memory[side.name, kind] = side.rehearse(prompt, kinds[kind])
    return memory


def _measure(
    plan: Sequence[tuple[Side, str]],
    kinds: Mapping[str, GenerationConfig],
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    say: Say,
) -> list[Timed]:
    timed = []
    rounds = [(seed, number) for seed in seeds for number in range(len(prompts))]
    for count, (seed, number) in enumerate(rounds):
        # Every other round backwards: whoever goes first has the same luck as who goes last.
        for side, kind in plan if count % 2 == 0 else plan[::-1]:
            say(f"round {count + 1} of {len(rounds)}: {side.name}, {kind}")
            run = side.run(prompts[number], kinds[kind].with_(seed=seed))
            timed.append(Timed(side.name, kind, number, seed, run))
        passes = {item.run.denoise_passes for item in timed if item.kind == "fixed"}
        if len(passes) > 1:
            raise DgemmaError(f"the sides took unequal numbers of steps in a fixed run: {sorted(passes)}")
    return timed


__all__ = ["KINDS", "PROMPTS", "DecodeReport", "DecodeSettings", "Ratio", "Row", "prompts_of", "run_decode"]
