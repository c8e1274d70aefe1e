"""The tiny network of the training tests: both layer kinds, experts, a window shorter than the canvas."""

from dgemma.config import LayerConfig, ModelConfig

CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    layers=(
        LayerConfig(kind="sliding", num_kv_heads=2, head_dim=16),
        LayerConfig(kind="full", num_kv_heads=1, head_dim=32),
    ),
    num_experts=4,
    top_k_experts=2,
    expert_size=16,
    sliding_window=5,
    canvas_length=8,
)
