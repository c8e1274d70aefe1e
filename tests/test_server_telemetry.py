"""OpenTelemetry's own instrumentation of FastAPI on the server's application, as docs/load.md has it."""

from __future__ import annotations

import json

import pytest
from fastapi.testclient import TestClient
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from server_kit import chat_body
from text_kit import save_model

from dgemma.api import LLM
from dgemma.server import ServerConfig, create_app

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM.load(save_model(tmp_path_factory.mktemp("models") / "tiny"), device="cpu")


def spans_of(llm: LLM, path: str, **fields: object) -> list[ReadableSpan]:
    """What an instrumented application tells of one request."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = create_app(llm, ServerConfig())
    FastAPIInstrumentor.instrument_app(app, tracer_provider=provider)
    try:
        client = TestClient(app, "http://localhost")
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        if fields:
            client.post(path, json=chat_body(llm, **fields), headers=headers)  # type: ignore[arg-type]
        else:
            client.get(path, headers=headers)
    finally:
        FastAPIInstrumentor.uninstrument_app(app)
    return list(exporter.get_finished_spans())


def server_span(spans: list[ReadableSpan]) -> ReadableSpan:
    (span,) = (span for span in spans if span.kind is SpanKind.SERVER)
    assert span.context is not None and span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    return span


def status_of(span: ReadableSpan) -> object:
    attributes = span.attributes or {}
    return attributes.get("http.status_code", attributes.get("http.response.status_code"))


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_of_the_callers_trace(llm: LLM, stream: bool) -> None:
    spans = spans_of(llm, "/v1/chat/completions", max_tokens=40, stream=stream)
    span = server_span(spans)
    assert span.name == "POST /v1/chat/completions" and status_of(span) == 200
    sent = [one for one in spans if "send" in one.name]
    # Every event of the stream is sent within the span, so its duration is that of the answer.
    assert len(sent) > (4 if stream else 1)
    assert all(one.end_time <= span.end_time for one in sent if one.end_time and span.end_time)


def test_a_refusal_is_a_span_too(llm: LLM) -> None:
    assert status_of(server_span(spans_of(llm, "/v1/chat/completions", max_tokens=0))) == 400
    assert status_of(server_span(spans_of(llm, "/nothing"))) == 404


def test_spans_hold_nothing_of_a_conversation(llm: LLM) -> None:
    spans = spans_of(llm, "/v1/chat/completions", text="a secret", max_tokens=8)
    assert spans and "secret" not in json.dumps([json.loads(span.to_json()) for span in spans])
