"""Run, serve, train and measure block-diffusion language models of the DiffusionGemma class.

`import dgemma` is cheap: torch is imported with the first use of `dgemma.LLM`.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["LLM", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from dgemma.api import LLM

        return LLM
    raise AttributeError(f"module 'dgemma' has no attribute {name!r}")
