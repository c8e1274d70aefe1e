"""The peer: `transformers`' DiffusionGemma on the same checkpoint, through its public interface only.

A streamer tells when each denoising step is over; forward hooks count and time the network's passes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgemma.bench.machine import Memory, allocator, synchronise
from dgemma.bench.runs import Run, metered
from dgemma.config import GenerationConfig, ModelConfig
from dgemma.diffusion.finalise import finalise
from dgemma.errors import ConfigError

_HINT = "Install it with: pip install 'dgemma[dev]'; or measure dgemma alone with --no-peer"


class Peer:
    """A loaded `DiffusionGemmaForBlockDiffusion`: default attention, experts and cache."""

    def __init__(
        self,
        source: Path | torch.nn.Module,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        width: int,
    ) -> None:
        """`source` is a checkpoint's folder or a model of theirs; `width` is the canvas of requests that name none."""
        transformers = peer_library(config)
        self.name = "transformers"
        self.version: str = transformers.__version__
        self._device = device
        self._bound = transformers.models.diffusion_gemma.generation_diffusion_gemma.EntropyBoundSamplerConfig
        settings = transformers.models.diffusion_gemma.generation_diffusion_gemma.DiffusionGemmaGenerationConfig()
        transformers.utils.logging.disable_progress_bar()
        # Its own generation_config.json is not read: every setting comes with the request.
        if isinstance(source, torch.nn.Module):
            model: Any = source
            model.generation_config = settings
        else:
            model = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(
                source, dtype=dtype, generation_config=settings
            )
        self._model = model.to(device).eval().requires_grad_(False)
        self._width = width
        self._clock = _Clock(device)
        encoder, decoder = self._model.model.encoder, self._model.model.decoder
        encoder.register_forward_pre_hook(lambda *_: self._clock.encode_begins())
        encoder.register_forward_hook(lambda *_: self._clock.encode_ends())
        decoder.register_forward_hook(lambda *_: self._clock.denoised())

    @property
    def settings(self) -> dict[str, str]:
        """What it runs with; all as `transformers` and torch choose."""
        config = self._model.config.text_config
        return {
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "attention": str(config._attn_implementation),
            "experts": str(getattr(config, "_experts_implementation", None)),
            "cache": str(self._model.generation_config.cache_implementation or "dynamic"),
            "matmul precision": torch.get_float32_matmul_precision(),
            "allocator": allocator(),
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(weight.nbytes for weight in self._model.parameters())

    def run(self, prompt: Sequence[int], config: GenerationConfig) -> Run:
        clock = self._clock = _Clock(self._device)
        ids = torch.tensor([list(prompt)], device=self._device)
        torch.manual_seed(config.seed)
        # `transformers` has the width in the model's configuration, not in the request's.
        self._model.config.canvas_length = config.canvas_length or self._width
        cpu, begun = time.process_time(), time.perf_counter()
        out = self._model.generate(input_ids=ids, streamer=clock, **self._options(config))
        new = out.sequences[0, len(prompt) :].tolist()
        seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
        kept, _ = finalise(new, config.stop_tokens)
        return Run(
            prompt_tokens=len(prompt),
            tokens=min(len(kept), config.max_new_tokens),
            seconds=seconds,
            cpu_seconds=cpu,
            prompt_seconds=clock.encodes[0],
            step_seconds=tuple(clock.steps),
            denoise_passes=clock.passes,
            later_encodes=len(clock.encodes) - 1,
            canvases=clock.canvases,
        )

    def rehearse(self, prompt: Sequence[int], config: GenerationConfig) -> Memory:
        return metered(self, prompt, config)

    @torch.inference_mode()
    def encode(self, prompt: Sequence[int]) -> Tensor:
        ids = torch.tensor([list(prompt)], device=self._device)
        hidden: Tensor = self._model.model.encoder(input_ids=ids).last_hidden_state[0]
        return hidden.float().cpu()

    def _options(self, config: GenerationConfig) -> dict[str, Any]:
        threshold = config.confidence_threshold
        return {
            "max_new_tokens": config.max_new_tokens,
            "max_denoising_steps": config.max_denoising_steps,
            "sampler_config": self._bound(entropy_bound=float(config.entropy_bound)),
            "t_min": config.t_min,
            "t_max": config.t_max,
            "stability_threshold": config.stability_threshold,
            "confidence_threshold": None if threshold is None else float(threshold),
            "eos_token_id": list(config.stop_tokens) or None,
            "pad_token_id": config.pad_token,
        }


class MediumPeer:
    """The same loaded peer with torch's matmul precision "medium": oneDNN products in place of MKL's."""

    def __init__(self, peer: Peer) -> None:
        self.name, self.version = f"{peer.name} (medium)", peer.version
        self._peer = peer

    @property
    def settings(self) -> dict[str, str]:
        return {**self._peer.settings, "matmul precision": "medium"}

    @property
    def nbytes(self) -> int:
        return self._peer.nbytes

    def run(self, prompt: Sequence[int], config: GenerationConfig) -> Run:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            return self._peer.run(prompt, config)
        finally:
            torch.set_float32_matmul_precision(before)

    def rehearse(self, prompt: Sequence[int], config: GenerationConfig) -> Memory:
        return metered(self, prompt, config)

    def encode(self, prompt: Sequence[int]) -> Tensor:
        return self._peer.encode(prompt)


class _Clock:
    """A streamer of `generate`: `put_draft` comes after each denoising step, `put` with the prompt and each canvas."""

    def __init__(self, device: torch.device) -> None:
        self.encodes: list[float] = []
        self.steps: list[float] = []
        self.passes = 0
        self.canvases = -1  # the prompt is put, too
        self._device = device
        self._first = True
        self._last = 0.0

    def encode_begins(self) -> None:
        self._last = time.perf_counter()

    def encode_ends(self) -> None:
        synchronise(self._device)
        self.encodes.append(time.perf_counter() - self._last)
        self._first = True

    def denoised(self) -> None:
        self.passes += 1

    def put_draft(self, value: Tensor) -> None:
        now = time.perf_counter()
        if not self._first:
            self.steps.append(now - self._last)
        self._first, self._last = False, now

    def put(self, value: Tensor) -> None:
        self.canvases += 1

    def end(self) -> None:
        pass


def peer_library(config: ModelConfig) -> Any:
    """The library, or a `ConfigError`: not installed, too old, or unable to build this model."""
    if not config.num_experts:
        raise ConfigError("transformers cannot build a dense DiffusionGemma; measure dgemma alone with --no-peer")
    if config.canvas_positions:
        raise ConfigError("transformers does not know canvas positions; measure dgemma alone with --no-peer")
    try:
        import transformers
    except ImportError:
        raise ConfigError(f"the peer of this benchmark, transformers, is not installed. {_HINT}") from None
    if not hasattr(transformers, "DiffusionGemmaForBlockDiffusion"):
        raise ConfigError(f"transformers {transformers.__version__} has no DiffusionGemma. {_HINT}")
    return transformers
