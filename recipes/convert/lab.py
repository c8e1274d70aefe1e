"""One training run of the conversion experiment, and how it is measured; `proof.py` decides which runs there are.

Compute: 6 N FLOPs a token for a trained pass, 2 N for the first prediction's; N are the weights a token is multiplied
with (head included, embedding lookup not; attention scores are not counted).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from dgemma.checkpoint.autoregressive import add_diffusion_parts
from dgemma.config import LayerConfig, ModelConfig
from dgemma.diffusion.noise import corrupt
from dgemma.model import DiffusionGemma
from dgemma.train.attend import BlockAttend
from dgemma.train.data.documents import Source
from dgemma.train.data.mixture import Mixture, Phase
from dgemma.train.freeze import FreezePhase, apply_freeze
from dgemma.train.head import head_loss, soft_signal
from dgemma.train.init import new_model
from dgemma.train.objective import Batch, denoising_loss
from dgemma.train.optim import MasterOptimizer, OptimConfig, ScheduleConfig, rate

EOS, PAD, WIDTH = 1, 0, 32
NOISE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
SCHEDULE = ScheduleConfig(name="wsd", warmup=20, decay_share=0.4)
WARM = ("self_conditioning", "norms")
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Size:
    """How much is done. Shares are of `steps`, the length of the longest from-scratch run."""

    steps: int = 480
    tokens: int = 1024
    tune: float = 0.125
    scratch: tuple[float, ...] = (0.5, 1.0)
    converted: tuple[float, ...] = (0.0625, 0.25, 0.5, 1.0)
    warm: float = 0.25
    ar: float = 1.0
    held_out: int = 4
    lrs: tuple[float, ...] = (0.006, 0.012, 0.024)


QUICK = Size(steps=16, tokens=512, tune=0.25, scratch=(0.5, 1.0), converted=(0.5,), warm=0.5, held_out=1, lrs=(0.012,))


def model_config() -> ModelConfig:
    """1.2 M parameters, dense, both kinds of attention; the vocabulary is that of `default`."""
    sliding = LayerConfig(kind="sliding", num_kv_heads=2, head_dim=32)
    full = LayerConfig(kind="full", num_kv_heads=1, head_dim=64)
    return ModelConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=256,
        num_heads=4,
        layers=(sliding, sliding, sliding, full),
        num_experts=0,
        top_k_experts=0,
        expert_size=0,
        sliding_window=64,
        canvas_length=WIDTH,
        max_positions=1024,
        eos_tokens=(EOS,),
    )


@dataclass(frozen=True)
class Piece:
    """One training run. `start` is "random" or "ar"; `kind` is what is trained."""

    name: str
    kind: str
    start: str
    steps: int
    lr: float
    warm: bool = False


@dataclass(frozen=True)
class Point:
    """A finished piece: what it was, what it cost, and its held-out losses (nats a token)."""

    piece: Piece
    flops: float
    canvas_tokens: int
    seconds: float
    canvas: float
    by_t: dict[str, tuple[float, float]]
    encoder: float


@dataclass(frozen=True)
class Lab:
    """Data, folder and size; `point` runs a piece or reads its result."""

    data: Path
    out: Path
    size: Size
    seed: int
    say: Callable[[str], None]

    def _mixture(self, name: str, seed: int) -> Mixture:
        source = Source.load(self.data / name, whole=True, end_token=EOS)
        phase = Phase(first_step=0, weights=(1,), width_weights=(1,))
        return Mixture(
            sources=(source,), widths=(WIDTH,), phases=(phase,), tokens=self.size.tokens, max_prefix=32, eos=EOS,
            pad=PAD, seed=seed,
        )  # fmt: skip

    @cached_property
    def training(self) -> Mixture:
        return self._mixture("train_stories.npz", self.seed)

    @cached_property
    def held_out(self) -> list[Batch]:
        mixture = self._mixture("heldout_stories.npz", 10_007)  # the same ones for every seed of the training
        return [mixture.batch(step) for step in range(self.size.held_out)]

    def point(self, piece: Piece) -> Point:
        path = self.out / f"{piece.name}.json"
        if not path.exists():
            model, flops, tokens, seconds = self._train(piece)
            point = Point(piece, flops, tokens, seconds, *held_out_losses(model, self.held_out))
            if piece.kind == "ar":
                _replace(path.with_suffix(".pt"), lambda beside: torch.save(model.state_dict(), beside))
            _replace(path, lambda beside: beside.write_text(json.dumps(asdict(point), indent=1) + "\n"))
            self.say(f"{piece.name}: canvas {point.canvas:.3f}, encoder {point.encoder:.3f}, {seconds:.0f} s")
        read = json.loads(path.read_text())
        done = Point(**{**read, "piece": Piece(**read["piece"])})
        if done.piece != piece:
            raise SystemExit(f"{path} is of another run ({done.piece}); choose another --out")
        return done

    def _train(self, piece: Piece) -> tuple[DiffusionGemma, float, int, float]:
        model = new_model(model_config(), self.seed)
        if piece.start == "ar":
            model.load_state_dict(torch.load(self.out / "ar.pt", weights_only=True))
            add_diffusion_parts(model, self.seed)
        model.to(DTYPE)
        # As in recipes/default: AdamW's rate is a quarter of Muon's.
        optimizer = MasterOptimizer(model.named_parameters(), OptimConfig(lr=piece.lr, adam_lr=piece.lr / 4))
        phases = (
            FreezePhase(first_step=0, train=WARM),
            FreezePhase(first_step=max(1, piece.steps // 5), train=("all",)),
        )
        flops, tokens, began = 0.0, 0, time.monotonic()
        for step in range(piece.steps):
            if piece.warm:
                apply_freeze(model, phases, step)
            batch = self.training.batch(step)
            if piece.kind == "ar":
                encode(model, batch)[0].backward()
            else:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
                denoising_loss(model, batch, generator).total.backward()
                tokens += batch.layout.canvas_positions().numel()
            flops += step_flops(model, batch, piece.kind)
            optimizer.step(rate(replace(SCHEDULE, warmup=min(SCHEDULE.warmup, piece.steps // 4)), step, piece.steps))
        return model, flops, tokens, time.monotonic() - began

    def tuned(self, kind: str, start: str, name: str) -> tuple[float, list[Point]]:
        """The best learning rate in short runs, by the loss that is trained, and the runs."""
        steps = round(self.size.tune * self.size.steps)
        lrs, points = list(self.size.lrs), []

        def loss(point: Point) -> float:
            value = point.encoder if kind == "ar" else point.canvas
            return value if math.isfinite(value) else math.inf

        while lrs:
            lr = lrs.pop(0)
            points.append(self.point(Piece(f"{name}_tune_{lr:g}", kind, start, steps, lr)))
            tried = sorted(point.piece.lr for point in points)
            best = min(points, key=loss).piece.lr
            if not lrs and len(points) == len(self.size.lrs) > 1 and best in (tried[0], tried[-1]):
                lrs = [best / 2 if best == tried[0] else best * 2]
        return min(points, key=loss).piece.lr, points


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """A kill leaves no half-written result."""
    beside = path.with_name(path.name + ".part")
    write(beside)
    os.replace(beside, path)


def encode(model: DiffusionGemma, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, BlockAttend]:
    """The encoder's mean next-token loss, its losses by position, and the memory that a denoising pass reads."""
    layout = batch.layout
    attend = BlockAttend(model.config, layout, model.embed.weight.dtype)
    ids = batch.ids[:, : layout.length]
    hidden = model.encode(ids, torch.arange(layout.length).expand(len(ids), -1), attend.encode)
    loss, losses = head_loss(model, hidden[:, :-1], ids[:, 1:], batch.valid[:, 1 : layout.length].float())
    return loss, losses, attend


@torch.no_grad()
def held_out_losses(model: DiffusionGemma, batches: list[Batch]) -> tuple[float, dict[str, tuple[float, float]], float]:
    """Canvas cross-entropy (mean over levels and both kinds of pass), by level (without, with signal), and encoder."""
    sums = {t: torch.zeros(2, dtype=torch.float64) for t in NOISE_LEVELS}
    encoder = count = next_count = 0.0
    for number, batch in enumerate(batches):
        losses, attend = encode(model, batch)[1:]
        targets = batch.valid[:, 1 : batch.layout.length]
        encoder, next_count = encoder + float(losses[targets].sum()), next_count + int(targets.sum())
        where = batch.layout.canvas_positions()
        clean, valid = batch.ids.gather(1, where), batch.valid.gather(1, where)
        count += int(valid.sum())
        for t in NOISE_LEVELS:
            generator = torch.Generator().manual_seed(1000 * number + round(100 * t))
            noisy, _ = corrupt(clean, t, model.config.vocab_size, generator)
            soft = None
            for told in (0, 1):
                hidden = model.denoise(noisy, where, attend.denoise, soft)
                sums[t][told] += head_loss(model, hidden, clean, valid.float())[1][valid].double().sum()
                soft = soft_signal(model, hidden)
    by_t = {f"{t:g}": (float(total[0]) / count, float(total[1]) / count) for t, total in sums.items()}
    canvas = sum(sum(pair) / 2 for pair in by_t.values()) / len(by_t)
    return canvas, by_t, encoder / next_count


def step_flops(model: DiffusionGemma, batch: Batch, kind: str) -> float:
    """FLOPs of one training step as the module's docstring counts them (frozen weights are counted as trained)."""
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2}
    extra = sum(n for name, n in matrices.items() if name.startswith("self_conditioning"))
    backbone, head = sum(matrices.values()) - extra, matrices["embed.weight"]
    clean, noisy = batch.ids[:, : batch.layout.length].numel(), batch.layout.canvas_positions().numel()
    if kind == "ar":
        return 6.0 * backbone * clean
    # Half of the rows make a first prediction: a forward pass, and probabilities times embedding.
    return 6.0 * backbone * (clean + noisy) + 6.0 * extra * noisy + 0.5 * noisy * 2.0 * (backbone + head)
