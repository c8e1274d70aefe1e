"""Golden trajectories of one canvas: `python tests/make_golden.py` writes tests/golden/trajectory_*.json.

Each file names its convention and holds every step in full (what was read, drawn, accepted, renoised), so another
implementation can replay it without our random numbers. The denoiser is a stand-in whose logits are multiples of
1/256, hardly two alike in a row: it names a fixed text the more clearly, the more of that text the canvas holds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgemma.config import GenerationConfig
from dgemma.diffusion.noise import draw_uniforms, first_canvas, step_noise
from dgemma.diffusion.protocol import Noise, Rows, Stats
from dgemma.diffusion.samplers import get_sampler
from dgemma.diffusion.schedule import temperature
from dgemma.diffusion.stop import History, StopRule, should_stop
from dgemma.kernels import DRAW_BLOCK, reference

FOLDER = Path(__file__).parent / "golden"
CAP = 30.0
VOCAB = DRAW_BLOCK + 76  # two draw blocks
TEXT = [5, 1023, 1024, 7, 1099, 0, 512, 7, 88, 1030, 3, 1]

CASES = {
    "hf": GenerationConfig(seed=2, max_denoising_steps=20),
    "hf_cap": GenerationConfig(seed=4, max_denoising_steps=16),
    "hf_three_equal": GenerationConfig(seed=1, max_denoising_steps=48, stability_threshold=2),
    "hf_confidence": GenerationConfig(seed=3, max_denoising_steps=24, sampler="confidence"),
    "hf_ancestral": GenerationConfig(seed=2, max_denoising_steps=24, sampler="ancestral"),
    "jax": GenerationConfig(seed=2, max_denoising_steps=20, convention="jax"),
    "jax_cap": GenerationConfig(seed=3, max_denoising_steps=16, convention="jax"),
}


def denoiser(canvas: Tensor) -> Tensor:
    """Hidden states `[C, V]` for a canvas `[C]`; with the identity as embedding they are the logits before the cap."""
    text, place, token = torch.tensor(TEXT), torch.arange(len(TEXT)), torch.arange(VOCAB)
    held = (canvas == text).long()
    near = held + held.roll(1) + held.roll(-1)
    peak = (56 + 16 * int(held.sum()) + 14 * near) / 16
    wobble = (place[:, None] * 31 + token * 17 + canvas[:, None] * 13 + canvas.roll(1)[:, None] * 7) % 1103 / 256
    return wobble + torch.nn.functional.one_hot(text, VOCAB) * peak[:, None]


def trajectory(config: GenerationConfig) -> dict[str, Any]:
    """One canvas from noise to commit, in the slow obvious way: one row, one step at a time, reference kernels."""
    width, steps = len(TEXT), config.max_denoising_steps
    canvas = first_canvas(config.seed, config.choice, 0, width, VOCAB)
    history, rule = History.start(canvas[None]), StopRule.of([config])
    done, argmax, record = False, canvas, []
    for step in range(steps, 0, -1):
        key = (config.seed, config.choice, 0, step, width, VOCAB)
        tau = temperature(step, steps, config.t_min, config.t_max)
        out = reference.vocab(denoiser(canvas), torch.eye(VOCAB), CAP, tau.expand(width), draw_uniforms(*key))
        stats = Stats(*(x[None] for x in (out.entropy, out.argmax, out.top_logprob, out.draw, out.draw_logprob)))
        rows = Rows.single(canvas[None], config, step, VOCAB)
        noise = Noise(*(x[None] for x in step_noise(*key)))
        made = get_sampler(config.sampler)(stats, rows, noise)
        stop, history = should_stop(stats, rows, history, rule)
        done, argmax = bool(stop), out.argmax
        record.append(
            {
                "step": step,
                "temperature": round(float(tau), 6),
                "read": canvas.tolist(),
                "entropy": [round(x, 5) for x in out.entropy.tolist()],
                "argmax": argmax.tolist(),
                "draw": out.draw.tolist(),
                "fresh": noise.tokens[0].tolist(),
                "accepted": made.accepted[0].int().tolist(),
                "next": made.canvas[0].tolist(),
                "stop": done,
            }
        )
        canvas = made.canvas[0]
        if done:
            break
    # HF commits the prediction, JAX what the sampler made of it.
    committed = canvas if config.convention == "jax" else argmax
    fields = ("seed", "sampler", "max_denoising_steps", "t_min", "t_max", "entropy_bound", "accept_confidence")
    settings = {name: getattr(config, name) for name in (*fields, "stability_threshold", "confidence_threshold")}
    return {
        "convention": config.convention,
        "settings": settings,
        "vocab": VOCAB,
        "steps": record,
        "stopped": "stable" if done else "cap",
        "committed": committed.tolist(),
    }


def text_of(golden: dict[str, Any]) -> str:
    """JSON with one step's field a line."""
    lines = json.dumps(golden | {"steps": ["@"]}, indent=1)
    steps = ",\n".join(
        "  {\n" + ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in step.items()) + "\n  }"
        for step in golden["steps"]
    )
    committed = json.dumps(golden["committed"])
    lines = lines.replace('  "@"', steps).replace(json.dumps(golden["committed"], indent=1), committed)
    return lines[: lines.index('"committed"')] + f'"committed": {committed}\n}}\n'


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, config in CASES.items():
        golden = trajectory(config)
        path = FOLDER / f"trajectory_{name}.json"
        path.write_text(text_of(golden), encoding="utf-8")
        assert json.loads(path.read_text(encoding="utf-8")) == golden
        print(f"{path.name}: {len(golden['steps'])} steps, {golden['stopped']}")


if __name__ == "__main__":
    main()
