"""Runs requests: what to encode and denoise, in which batch. Knows ids and events, no text, no HTTP."""

from dgemma.engine.likelihood import token_logprobs
from dgemma.engine.loop import Engine
from dgemma.engine.request import Request, validate
from dgemma.engine.runner import Runner
from dgemma.engine.worker import Worker

__all__ = ["Engine", "Request", "Runner", "Worker", "token_logprobs", "validate"]
