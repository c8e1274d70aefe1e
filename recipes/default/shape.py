"""The shape of the model that dgemma ships as `default`, and the sampler settings fitted for it (see fit.py)."""

from __future__ import annotations

from dgemma.config import GenerationConfig, LayerConfig, ModelConfig

EOS, TURN_END, PAD = 1, 6, 0


def model_config() -> ModelConfig:
    """About 10 M parameters: 6 layers, both attention kinds, 8 experts of which 2 work on a token."""
    sliding = LayerConfig(kind="sliding", num_kv_heads=2, head_dim=64)
    full = LayerConfig(kind="full", num_kv_heads=1, head_dim=128)
    return ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_heads=4,
        layers=(sliding, sliding, full, sliding, sliding, full),
        num_experts=8,
        top_k_experts=2,
        expert_size=128,
        sliding_window=128,
        canvas_length=16,
        max_positions=2048,
        eos_tokens=(EOS, TURN_END),
    )


def generation_config() -> GenerationConfig:
    """What `fit.py` found best, with the width above: of widths 16 to 64, bounds 0.05 to 0.3, three ranges of T."""
    return GenerationConfig(
        t_min=0.6,
        t_max=1.0,
        entropy_bound=0.3,
        confidence_threshold=0.05,
        stop_tokens=(EOS, TURN_END),
        pad_token=PAD,
    )
