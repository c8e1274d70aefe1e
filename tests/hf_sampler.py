"""transformers' own denoising step, fed with our logits, draws and fresh tokens: no network, no generator."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationMixin,
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
    LinearTemperatureScheduleLogitsProcessor,
    StableAndConfidentStoppingCriteria,
)

from dgemma.config import GenerationConfig


class HfSampler:
    """The state of `generate` inside one canvas: rows `[R, C]` that share one configuration."""

    def __init__(self, canvas: Tensor, config: GenerationConfig, vocab: int) -> None:
        self.canvas = self.argmax = canvas
        self.finished = torch.zeros(len(canvas), dtype=torch.bool)
        self.logits: Tensor | None = None
        self.sampler = EntropyBoundSampler(
            EntropyBoundSamplerConfig(entropy_bound=config.entropy_bound),
            canvas_length=canvas.shape[1],
            vocab_size=vocab,
            max_denoising_steps=config.max_denoising_steps,
        )
        self.processors = LogitsProcessorList(
            [
                LinearTemperatureScheduleLogitsProcessor(
                    t_min=config.t_min, t_max=config.t_max, max_denoising_steps=config.max_denoising_steps
                )
            ]
        )
        stops = DiffusionGemmaGenerationMixin._prepare_diffusion_stopping_criteria
        self.stop: StableAndConfidentStoppingCriteria | None = stops(None, config)
        weight = torch.zeros(1)
        self._model = SimpleNamespace(
            config=SimpleNamespace(text_config=SimpleNamespace(vocab_size=vocab)),
            model=SimpleNamespace(decoder=SimpleNamespace(embed_tokens=SimpleNamespace(weight=weight))),
        )

    @property
    def accepted(self) -> Tensor:
        return self.sampler.accepted_token_mask

    def step(self, number: int, logits: Tensor, draw: Tensor, fresh: Tensor) -> None:
        """Step `number` (N..1) with raw `logits [R, C, V]`, the `draw` and the `fresh` tokens `[R, C]`."""
        self.sampler.initialize_canvas = lambda batch_size, device: fresh
        with mock.patch.object(torch, "multinomial", lambda probs, num_samples: draw.reshape(-1, 1)):
            self.canvas, self.argmax, self.logits, self.finished = DiffusionGemmaGenerationMixin._denoising_step(
                self._model,
                decoder_forward=lambda **inputs: SimpleNamespace(logits=logits),
                current_canvas=self.canvas,
                argmax_canvas=self.argmax,
                input_ids=None,
                decoder_position_ids=None,
                self_conditioning_logits=self.logits,
                mask_mapping=None,
                past_key_values=None,
                finished_denoising=self.finished.clone(),
                cur_step=number,
                sampler=self.sampler,
                logits_processor=self.processors,
                diffusion_stopping_criteria=self.stop,
            )
