"""LoRA: small trained deltas beside frozen weights, dense ones and fused experts."""

from dgemma.train.lora.adapter import TARGETS, LoraConfig, add_lora, is_adapted, load_adapter, merge, save_adapter

__all__ = ["TARGETS", "LoraConfig", "add_lora", "is_adapted", "load_adapter", "merge", "save_adapter"]
