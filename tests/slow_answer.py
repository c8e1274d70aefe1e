"""A whole answer in the slow obvious way: one canvas, one step, reference kernels, all logits, no engine."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import torch
from naive import NaiveCache, denoise, encode
from torch import Tensor

from dgemma.config import GenerationConfig
from dgemma.diffusion.noise import draw_uniforms, first_canvas, step_noise
from dgemma.diffusion.protocol import Noise, Rows, Stats
from dgemma.diffusion.samplers import get_sampler
from dgemma.diffusion.schedule import temperature
from dgemma.diffusion.stop import History, StopRule, should_stop
from dgemma.kernels import reference
from dgemma.model import DiffusionGemma


def added(config: GenerationConfig, answer: list[int], vocab: int) -> Tensor:
    """What bias and penalties add to the logits, token by token."""
    row, counts = torch.zeros(vocab), Counter(answer)
    for token in range(vocab):
        for biased, bias in config.logit_bias:
            if token == biased:
                row[token] += -math.inf if bias <= -100 else bias
        if counts[token]:
            row[token] -= config.presence_penalty + config.frequency_penalty * counts[token]
    return row


@torch.no_grad()
def canvases(model: DiffusionGemma, prompt: list[int], config: GenerationConfig) -> Iterator[tuple[list[int], Tensor]]:
    """Of each canvas the committed tokens, and the logits of its last step before anything was done to them.

    Whole canvases only: the budget must be a multiple of their width, and no token may end the answer.
    """
    width, vocab, cap = (
        config.canvas_length or model.config.canvas_length,
        model.config.vocab_size,
        model.config.softcap,
    )
    answer: list[int] = []
    for index in range(config.max_new_tokens // width):
        cache = NaiveCache(model.config)
        encode(model, cache, torch.tensor(prompt + answer))
        ids, soft = first_canvas(config.seed, config.choice, index, width, vocab), None
        history, bias = History.start(ids[None]), added(config, answer, vocab)
        for step in range(config.max_denoising_steps, 0, -1):
            hidden = denoise(model, cache, ids, soft)
            key = (config.seed, config.choice, index, step, width, vocab)
            heat = temperature(step, config.max_denoising_steps, config.t_min, config.t_max).expand(width)
            out = reference.vocab(
                hidden, model.embed.weight, cap, heat, draw_uniforms(*key),
                torch.full((width,), config.temperature), torch.full((width,), config.top_k), bias=bias,
                top_p=torch.full((width,), config.top_p, dtype=torch.float64),
            )  # fmt: skip
            names = ("entropy", "argmax", "top_logprob", "draw", "draw_logprob")
            stats = Stats(**{name: getattr(out, name)[None] for name in names})
            tokens, uniforms = step_noise(*key)
            rows = Rows.single(ids[None], config, step, vocab)
            done, history = should_stop(stats, rows, history, StopRule.of([config]))
            ids = get_sampler(config.sampler)(stats, rows, Noise(tokens[None], uniforms[None])).canvas[0]
            soft = out.soft
            if bool(done):
                break
        answer += out.argmax.tolist()
        yield out.argmax.tolist(), model.logits(hidden)
