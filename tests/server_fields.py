"""The fields of OpenAI's request schemas and what the server makes of each: data of test_server_fields.py."""

from __future__ import annotations

from typing import Any

PROMPT = "Once upon a time"
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"

# Field -> values that leave the answer as it is, values that are refused. A field with an effect has a check above.
Table = dict[str, tuple[list[Any], list[Any]]]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
BOOKS: Table = {
    "metadata": ([None, {"a": "b"}], [{"a": 1}, "a"]),
    "safety_identifier": ([None, "x"], [1]),
    "prompt_cache_key": ([None, "x"], [1]),
    "user": (["x"], [1]),
}
SHARED: Table = {
    "model": ([], [None, 1]),
    "temperature": ([None, 1, 1.0], [-0.1, 2.1, "1", True]),
    "top_p": ([None, 1, 1.0], [-1, 0, 1.1, "1"]),
    "stream": ([None, False], [1, "true"]),
}
GENERATION: Table = {
    "seed": ([5], [1.5, "1", True, 2**63, -(2**63) - 1]),
    "n": ([None, 1], [0, 129, 1.5, True]),
    "stop": ([None, [], "never §"], ["", [""], ["a"] * 5, [1], 1, ["x" * 1001]]),
    "logit_bias": ([None, {}], [{"a": 1}, {"1": 101}, {"1": "1"}, {"100000": 1}, {"-1": 1}, [1], {"1": None}]),
    "presence_penalty": ([None, 0, 0.0], [-2.1, 2.1, "0"]),
    "frequency_penalty": ([None, 0, 0.0], [-2.1, 2.1, "0"]),
    "max_tokens": ([24], [0, -1, 1.5, "1"]),
    "stream_options": ([None], [{"include_usage": True}, {"unknown": 1}, 1]),
}
UNSUPPORTED: Table = {
    "moderation": ([None], [{"model": "m"}]),
    "parallel_tool_calls": ([True, False], [1]),
    "prompt_cache_options": ([None], [{"mode": "explicit"}]),
    "prompt_cache_retention": ([None, "in_memory"], ["24h"]),
    "service_tier": ([None, "auto", "default"], ["flex", "priority"]),
    "store": ([None, False], [True, 0]),
    "tool_choice": ([None, "none", "auto"], ["required", {"type": "function", "function": {"name": "f"}}]),
    "tools": ([None, []], [[TOOL]]),
}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
TABLES: dict[str, Table] = {
    CHAT: {
        **SHARED,
        **GENERATION,
        **BOOKS,
        **UNSUPPORTED,
        "messages": (
            [[{"role": "user", "content": [{"type": "text", "text": PROMPT}], "name": None}]],
            [
                [], "a", [{"role": "user"}], [{"content": "a"}], [{"role": "tool", "content": "a"}],
                [{"role": "user", "content": [IMAGE]}], [{"role": "user", "content": 1}],
                [{"role": "user", "content": "a", "name": "Lily"}], [{"role": "assistant", "tool_calls": [TOOL]}],
                [{"role": "user", "content": "a", "unknown": 1}],
            ],
        ),
        "audio": ([None], [{"voice": "alloy", "format": "wav"}]),
        "function_call": ([None, "none", "auto"], [{"name": "f"}]),
        "functions": ([None, []], [[{"name": "f"}]]),
        "logprobs": ([None, False], [1, "true"]),
        "max_completion_tokens": ([None, 24], [0, "1"]),
        "modalities": ([None, ["text"]], [["text", "audio"], "text"]),
        "prediction": ([None], [{"type": "content", "content": "a"}]),
        "reasoning_effort": ([None, "none"], ["minimal", "low", "high", "xhigh", "max"]),
        "response_format": ([None, {"type": "text"}], [{"type": "xml"}, {"type": "json_schema"}, "text"]),
        "top_logprobs": ([None], [1, 21]),  # without logprobs
        "verbosity": ([None, "medium"], ["low", "high"]),
        "web_search_options": ([None], [{}]),
    },
    COMPLETIONS: {
        **{name: case for name, case in SHARED.items()},
        **GENERATION,
        "user": BOOKS["user"],
        "prompt": ([PROMPT, [PROMPT]], [None, [], 1, [[]], [1, "a"], [1.5], [[1], 2], ["a"] * 129, [100_000], [-1]]),
        "best_of": ([None, 1], [2, "1"]),
        "echo": ([None, False], [True]),
        "logprobs": ([None], [-1, 21, True]),
        "suffix": ([None, ""], [1, ["end"]]),
    },
    RESPONSES: {
        **SHARED,
        **BOOKS,
        **UNSUPPORTED,
        "access_programs": ([None], [{"cyber": "standard"}]),
        "background": ([None, False], [True]),
        "background_options": ([None], [{}]),
        "context_management": ([None, []], [[{"type": "compaction"}]]),
        "conversation": ([None], ["conv_1"]),
        "image": ([None], [{}]),
        "include": ([None, []], [["file_search_call.results"], ["message.output_text.logprobs", "other"], "all"]),
        "input": (
            [
                PROMPT, [{"role": "user", "content": PROMPT}],
                [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": PROMPT}]}],
            ],
            [
                None, [], 1, [1], [{"role": "tool", "content": "a"}], [{"type": "item_reference", "id": "x"}],
                [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}],
                [{"role": "user", "content": "a", "unknown": 1}],
            ],
        ),
        "instructions": ([None], [1]),
        "max_output_tokens": ([24], [0, "1"]),
        "max_tool_calls": ([None], [1]),
        "previous_response_id": ([None], ["resp_1"]),
        "prompt": ([None], [{"id": "p"}]),
        "reasoning": (
            [None, {}, {"effort": None}, {"effort": "none", "summary": None}],
            [{"effort": "high"}, {"summary": "auto"}, {"unknown": 1}, {"mode": "pro"}, {"context": "all_turns"}],
        ),
        "stream_options": ([None, {}, {"include_obfuscation": False}], [{"include_obfuscation": True}]),
        "text": (
            [None, {}, {"format": {"type": "text"}}, {"verbosity": "medium"}],
            [{"format": {"type": "xml"}}, {"format": {"type": "json_schema"}}, {"verbosity": "low"}, {"unknown": 1}],
        ),
        "top_logprobs": ([None, 0], [1, 21, "1"]),  # without include
        "truncation": ([None, "disabled"], ["auto"]),
    },
}  # fmt: skip

# Field of `dgemma` -> a value with an effect, values that are refused.
EXTENSION: dict[str, tuple[Any, list[Any]]] = {
    "mode": ("ar", ["other", 1]),
    "verify_draft": ("sample", ["other", 1]),
    "verify_pace": ("fixed", ["other", 1]),
    "steps": (2, [0, 1.5, "2"]),
    "canvas_length": (8, [0, 1000]),
    "narrow": ("adaptive", ["other"]),
    "sampler": ("ancestral", ["other", 1]),
    "entropy_bound": (50.0, [0, -1, "1"]),
    "accept_confidence": (0.02, [0, 1.1]),
    "t_min": (0.79, [-1, 0.9]),
    "t_max": (5.0, [0, 0.1]),
    "stability_threshold": (0, [-1, 1.5]),
    "confidence_threshold": (9.0, [0, -1]),
    "convention": ("jax", ["other"]),
    "trace": (True, [1, "yes"]),
    "confidence": (True, [1, "yes"]),
}
# What must be so for the field to matter.
SETTING: dict[str, dict[str, Any]] = {
    "accept_confidence": {"sampler": "confidence"},
    "narrow": {"canvas_length": 32},
    "verify_draft": {"mode": "verified", "verify_pace": "fixed"},
    "verify_pace": {"mode": "verified"},
    "stability_threshold": {"confidence_threshold": 9.0},
    "confidence_threshold": {"stability_threshold": 0},
}
