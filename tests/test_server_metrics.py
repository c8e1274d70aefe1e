"""What a server tells Prometheus equals what its engine and routes did, and the shipped board asks for nothing else."""

from __future__ import annotations

import itertools
import json
import math
import re
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import dgemma.server
from dgemma.api import LLM
from dgemma.config import EngineConfig
from dgemma.server.metrics import Metrics

BOARD = json.loads(Path(next(iter(dgemma.server.__path__)), "grafana.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("default", engine=EngineConfig(kv_bytes=1_000_000_000))


def read(metrics: Metrics) -> dict[str, float]:
    """`name{label=value,...}` to value, as a scraper sees them."""
    out = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            out[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return out


def added(before: Mapping[str, float], after: Mapping[str, float], name: str) -> float:
    return after[name] - before[name]


def test_the_engine_s_counts_add_up(llm: LLM) -> None:
    metrics = Metrics(llm)
    before = read(metrics)
    answers = llm.generate(["Once upon a time", "A dog", "The sun"], max_new_tokens=24, seed=3)
    after = read(metrics)
    assert added(before, after, "dgemma_requests_admitted_total") == 3
    assert added(before, after, "dgemma_committed_tokens_total") == sum(len(one.token_ids) for one in answers)
    assert added(before, after, "dgemma_prompt_tokens_total") == sum(len(one.prompt_token_ids) for one in answers)
    assert added(before, after, "dgemma_canvases_total") == sum(len(one.steps) for one in answers)
    steps = sum(sum(one.steps) for one in answers)
    assert added(before, after, "dgemma_forward_rows_total{kind=denoise}") == steps
    passes = added(before, after, "dgemma_forward_passes_total{kind=denoise}")
    assert max(sum(one.steps) for one in answers) <= passes < steps
    assert added(before, after, "dgemma_forward_tokens_total{kind=denoise}") >= 16 * steps
    assert (after["dgemma_requests_running"], after["dgemma_requests_waiting"]) == (0, 0)
    assert (after["dgemma_kv_reserved_bytes"], after["dgemma_kv_limit_bytes"]) == (0, 1_000_000_000)


def test_reuse_is_counted(llm: LLM) -> None:
    metrics = Metrics(llm)
    ids = [2, *range(100, 190)]
    llm.generate(ids, max_new_tokens=4)
    before = read(metrics)
    llm.generate(ids, max_new_tokens=4)
    after = read(metrics)
    assert added(before, after, "dgemma_prefix_hits_total") == 1
    assert added(before, after, "dgemma_prefix_reused_tokens_total") == 64
    assert after["dgemma_prefix_tokens"] >= 64


def test_while_a_request_runs_it_shows(llm: LLM) -> None:
    metrics = Metrics(llm)
    events = llm.stream("Once upon a time", max_new_tokens=512, stop_tokens=())
    for _ in range(3):
        next(events)
    during = read(metrics)
    events.close()
    assert during["dgemma_requests_running"] == 1
    assert 0 < during["dgemma_kv_reserved_bytes"] < 1_000_000_000


def test_what_the_routes_report(llm: LLM) -> None:
    metrics = Metrics(llm)
    chat = "/v1/chat/completions"
    metrics.started(chat)
    metrics.started("/health")
    metrics.finished("/health", 200, 0.001)
    assert read(metrics)["dgemma_requests_open"] == 1
    metrics.first_text(0.03)
    metrics.canvas(0.03, 5)
    metrics.canvas(0.2, 48)
    metrics.finished(chat, 200, 0.23)
    metrics.rejected("full")
    metrics.rejected("full")
    metrics.rejected("key")
    metrics.cancelled()
    seen = read(metrics)
    assert seen["dgemma_requests_open"] == 0
    assert seen[f"dgemma_requests_total{{route={chat},status=200}}"] == 1
    assert seen["dgemma_requests_total{route=/health,status=200}"] == 1
    assert seen[f"dgemma_request_seconds_sum{{route={chat}}}"] == pytest.approx(0.23)
    assert seen["dgemma_first_text_seconds_bucket{le=0.025}"] == 0
    assert seen["dgemma_first_text_seconds_bucket{le=0.05}"] == 1
    assert (seen["dgemma_canvas_steps_count"], seen["dgemma_canvas_steps_sum"]) == (2, 53)
    assert seen["dgemma_canvas_steps_bucket{le=4.0}"] == 0
    assert seen["dgemma_canvas_steps_bucket{le=6.0}"] == 1
    assert seen["dgemma_canvas_seconds_sum"] == pytest.approx(0.23)
    assert (seen["dgemma_rejected_total{reason=full}"], seen["dgemma_rejected_total{reason=key}"]) == (2, 1)
    assert seen["dgemma_cancelled_total"] == 1
    assert seen["process_resident_memory_bytes"] > 10_000_000


def test_servers_in_one_process_share_nothing(llm: LLM) -> None:
    one, other = Metrics(llm), Metrics(llm)
    one.cancelled()
    assert (read(one)["dgemma_cancelled_total"], read(other)["dgemma_cancelled_total"]) == (1, 0)


def test_any_thread_may_report(llm: LLM) -> None:
    metrics = Metrics(llm)

    def report() -> None:
        for number in range(200):
            metrics.started("/x")
            metrics.canvas(0.01, 1 + number % 48)
            metrics.finished("/x", 200, 0.01)

    threads = [threading.Thread(target=report) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        metrics.render()
    for thread in threads:
        thread.join()
    seen = read(metrics)
    assert seen["dgemma_requests_total{route=/x,status=200}"] == 800
    assert (seen["dgemma_requests_open"], seen["dgemma_canvas_steps_count"]) == (0, 800)


def asked() -> dict[str, set[str]]:
    """Metric names in the board, each with the panels that ask for it."""
    out: dict[str, set[str]] = {}
    for panel in BOARD["panels"]:
        for target in panel["targets"]:
            for name in re.findall(r"\b(?:dgemma|process)_\w+", target["expr"]):
                out.setdefault(name, set()).add(panel["title"])
    return out


def used(llm: LLM) -> Metrics:
    """With every label in use: a counter with labels shows only the values it has seen."""
    metrics = Metrics(llm)
    metrics.started("/x")
    metrics.finished("/x", 200, 0.1)
    metrics.rejected("full")
    return metrics


def test_the_board_asks_only_for_what_there_is(llm: LLM) -> None:
    there = {name.partition("{")[0] for name in read(used(llm))}
    missing = {name: panels for name, panels in asked().items() if name not in there}
    assert not missing
    assert len(asked()) > 20


def test_the_board_shows_everything_there_is(llm: LLM) -> None:
    text = used(llm).render().decode()
    families = {f.name for f in text_string_to_metric_families(text) if f.name.startswith("dgemma")}
    shown = " ".join(asked())
    # Positions of passes follow from rows, shared passes from canvases; sums and counts are in the quantiles.
    unseen = {name for name in families if name not in shown and not name.endswith("_created")}
    assert unseen == {"dgemma_forward_tokens", "dgemma_shared_passes"}


def test_the_board_is_one_that_grafana_reads() -> None:
    assert BOARD["title"] and BOARD["schemaVersion"] >= 36
    names = {variable["name"] for variable in BOARD["templating"]["list"]}
    ids, places = [], []
    for panel in BOARD["panels"]:
        assert panel["type"] == "timeseries" and panel["targets"] and panel["fieldConfig"]["defaults"]["unit"]
        ids.append(panel["id"])
        places.append((panel["gridPos"]["x"], panel["gridPos"]["y"]))
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        for target in panel["targets"]:
            expr = target["expr"]
            assert expr.count("(") == expr.count(")") and expr.count("[") == expr.count("]")
            assert set(re.findall(r"\$(\w+)", expr)) <= names | {"__rate_interval"}
    assert len(set(ids)) == len(ids) and len(set(places)) == len(places)


@pytest.mark.parametrize("name", ["dgemma_first_text_seconds", "dgemma_canvas_seconds", "dgemma_canvas_steps"])
def test_histogram_bounds_are_close_enough_for_quantiles(llm: LLM, name: str) -> None:
    bounds = [float(match) for match in re.findall(rf"{name}_bucket{{le=([\d.+Inf]+)}}", "\n".join(read(Metrics(llm))))]
    finite = [bound for bound in bounds if math.isfinite(bound)]
    assert len(finite) > 10 and bounds[-1] == math.inf
    assert all(low < high <= 2.51 * low for low, high in itertools.pairwise(finite))
