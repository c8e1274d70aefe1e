"""POST /v1/systemone: the public shape, the same numbers as `LLM.decide`, faults as 400, turns and limits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from server_kit import Running, running, until
from text_kit import save_model

from dgemma.api import LLM
from dgemma.control.decide import choice, score, yes_no
from dgemma.server import systemone

STATE = "Lily lived by the river and was little."
CLOZES: dict[str, Any] = {
    "old": {"type": "noul", "instructions": "Is she old? [[answer]]."},
    "where": {"type": "choice", "instructions": "By the [[answer]].", "criteria": {"river": None, "café": "a house"}},
    "size": {"type": "score", "instructions": "Size [[answer]]!", "criteria": ["small", "middling", {"much": 1}]},
}
PLAIN: dict[str, Any] = {
    "old": {"type": "noul", "instructions": "Is she old?", "criteria": {"true": "not young"}},
    "where": {"type": "choice", "instructions": ["Where?"], "criteria": {"river": None, "house": "of a café"}},
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM.load(save_model(tmp_path_factory.mktemp("models") / "tiny", max_positions=512), device="cpu")


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Running]:
    with running(llm) as one:
        yield one


def ask(server: Running, questions: Any = CLOZES, state: Any = STATE, **fields: Any) -> Any:
    response = server.post("/v1/systemone", {"state": state, "questions": questions, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def fault(server: Running, **fields: Any) -> dict[str, Any]:
    response = server.post("/v1/systemone", {"state": STATE, "questions": CLOZES} | fields)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


def test_the_answers_have_the_public_shape(server: Running) -> None:
    told = ask(server, model="jev-latest")
    assert told["model"] == server.llm.name and told["id"].startswith("sysone-")
    answers = told["answers"]
    assert list(answers) == list(CLOZES)
    assert set(answers["old"]) == {"type", "noul"} and answers["old"]["type"] == "noul"
    assert 0 < answers["old"]["noul"] < 1
    where = answers["where"]
    assert set(where) == {"type", "choice", "probabilities", "confidence"}
    assert set(where["probabilities"]) == {"river", "café"} and sum(where["probabilities"].values()) == pytest.approx(1)
    peak = max(where["probabilities"].values())
    assert where["probabilities"][where["choice"]] == peak
    assert where["confidence"] == pytest.approx(2 * peak - 1, abs=2e-6)  # probabilities are told rounded
    size = answers["size"]
    assert set(size) == {"type", "score", "legend", "probabilities", "confidence"}
    assert size["legend"] == {"0": "small", "1": "middling", "2": {"much": 1}}
    assert size["score"] == pytest.approx(sum(int(at) * p for at, p in size["probabilities"].items()), abs=1e-5)
    assert told["usage"]["output_tokens"] == 0 < told["usage"]["input_tokens"]


def test_the_numbers_are_those_of_decide(server: Running) -> None:
    how = {"draws": 3, "seed": 9, "temperature": 2.0, "encoder": True}
    told = ask(server, dgemma=how)
    template = f"{STATE}\n\n[[question]]"
    questions = [
        yes_no("Is she old? [[answer]]."),
        choice(("river", "café"), "By the [[answer]]."),
        score(1, 3, "Size [[answer]]!"),
    ]
    old, where, size = server.llm.decide(template, questions, **how)
    assert told["answers"]["old"]["noul"] == pytest.approx(old.probabilities["yes"], abs=1e-6)
    assert told["answers"]["where"]["probabilities"] == pytest.approx(where.probabilities, abs=1e-6)
    assert told["answers"]["size"]["score"] == pytest.approx((size.value or 0) - 1, abs=1e-5), "levels count from 0"
    ours = told["dgemma"]
    assert (ours["draws"], ours["seed"]) == (3, 9)
    assert ours["answers"]["old"]["spread"] == pytest.approx(old.spread, abs=1e-6)
    assert ours["answers"]["old"]["encoder"] == pytest.approx(old.encoder, abs=1e-6)
    assert ours["answers"]["size"]["temperature"] == 2.0
    assert ask(server, dgemma=how)["answers"] == told["answers"] != ask(server)["answers"]


def test_a_question_without_a_hole_is_asked_as_a_message(server: Running) -> None:
    told = ask(server, PLAIN)
    text = "<|turn>user\n" + STATE + "\n\n{}<turn|>\n<|turn>model\n[[answer]]<turn|>\n"
    (old,) = server.llm.decide(text.format("Is she old?\nyes: not young\nAnswer yes or no."), yes_no())
    (where,) = server.llm.decide(text.format('["Where?"]\nriver\nhouse: of a café'), choice(("river", "house")))
    assert told["answers"]["old"]["noul"] == pytest.approx(old.probabilities["yes"], abs=1e-6)
    assert told["answers"]["where"]["probabilities"] == pytest.approx(where.probabilities, abs=1e-6)


def test_without_a_chat_template_a_question_is_plain_text(tmp_path: Path) -> None:
    llm = LLM.load(save_model(tmp_path / "plain", template=None), device="cpu")
    body = systemone.SystemOneRequest.model_validate({"state": {"who": "Lily"}, "questions": PLAIN})
    told = systemone.decide(llm, body)
    text = '{"who": "Lily"}\n\nIs she old?\nyes: not young\nAnswer yes or no.\nAnswer: [[answer]]\n'
    (old,) = llm.decide(text, yes_no())
    assert told["answers"]["old"]["noul"] == pytest.approx(old.probabilities["yes"], abs=1e-6)


def test_words_of_ones_own(server: Running) -> None:
    questions = {
        "girl": {"type": "noul", "instructions": "[[answer]] sat.", "labels": ["She", "He"]},
        "who": {
            "type": "choice",
            "instructions": "[[answer]].",
            "labels": ["A", "B"],
            "criteria": {"one": None, "two": None},
        },
    }
    told = ask(server, questions)
    (girl, who) = server.llm.decide(
        f"{STATE}\n\n[[question]]", [yes_no("[[answer]] sat.", yes="She", no="He"), choice("AB", "[[answer]].")]
    )
    assert told["answers"]["girl"]["noul"] == pytest.approx(girl.probabilities["She"], abs=1e-6)
    assert told["answers"]["who"]["choice"] == {"A": "one", "B": "two"}[who.answer]
    assert told["answers"]["who"]["probabilities"]["two"] == pytest.approx(who.probabilities["B"], abs=1e-6)


def test_joint_answers_share_a_canvas(server: Running) -> None:
    two = {name: {"type": "noul", "instructions": f"{name} [[answer]].", "labels": ["a", "b"]} for name in ("x", "y")}
    assert ask(server, two, dgemma={"joint": True})["answers"]["x"] != ask(server, two)["answers"]["x"]
    error = fault(server, questions=PLAIN, dgemma={"joint": True})
    assert error["param"] == "questions.old.instructions"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"questions": {}}, "at least 1"),
        ({"state": 3}, "state"),
        ({"state": "a [[answer]] b"}, "the state must not have"),
        ({"questions": {"q": {"type": "maybe"}}}, "questions.q"),
        ({"questions": {"q": {"type": "choice", "criteria": {"a": None}}}}, "at least 2"),
        ({"questions": {"q": {"type": "score", "criteria": ["a"]}}}, "at least 2"),
        ({"questions": {"q": {"type": "noul", "labels": ["a"]}}}, "must have 2 words, got 1"),
        ({"questions": {"q": {"type": "noul", "labels": ["a", "a"]}}}, "the label 'a' twice"),
        ({"questions": {"q": {"type": "noul", "instructions": "[[answer]] [[answer]]"}}}, "got 2"),
        ({"questions": {"q": {"type": "noul", "instructions": "[[question]]"}}}, "must not have"),
        ({"questions": {"q": {"type": "noul", "why": "x"}}}, "unknown field"),
        ({"dgemma": {"draws": 0}}, "greater than or equal to 1"),
        ({"dgemma": {"temperature": 0}}, "greater than 0"),
        ({"state": "x" * 5000}, "positions; the model has 512"),
        ({"stream": True}, "unknown field 'stream'"),
    ],
)
def test_faults_are_400(server: Running, fields: dict[str, Any], said: str) -> None:
    error = fault(server, **fields)
    assert said in error["message"] or said in str(error["param"]), error


def test_another_model_is_404(server: Running) -> None:
    response = server.post("/v1/systemone", {"state": STATE, "questions": CLOZES, "model": "gpt-4"})
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"
    assert ask(server, model=server.llm.name)["answers"] == ask(server)["answers"]


def test_it_needs_the_key_and_is_counted(llm: LLM) -> None:
    with running(llm, api_keys=("secret",)) as server:
        body = {"state": STATE, "questions": CLOZES}
        assert server.post("/v1/systemone", body).status_code == 401
        headers = {"authorization": "Bearer secret"}
        assert server.post("/v1/systemone", body, headers=headers).status_code == 200
        metrics = server.get("/metrics", headers=headers).text
        assert 'dgemma_requests_total{route="/v1/systemone",status="200"} 1.0' in metrics
        until(lambda: server.service.answers == 0)


def test_reads_beside_answers_change_nothing(server: Running) -> None:
    alone, text = ask(server)["answers"], server.chat().json()["choices"]
    with ThreadPoolExecutor(6) as pool:
        reads = [pool.submit(ask, server) for _ in range(6)]
        chats = [pool.submit(server.chat) for _ in range(4)]
        assert all(one.result()["answers"] == alone for one in reads)
        assert all(one.result().json()["choices"] == text for one in chats)
    assert server.service.answers == 0


def test_too_late_is_504_and_the_next_one_is_answered(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    decide = systemone.decide

    def slow(*arguments: Any) -> Any:
        time.sleep(2)
        return decide(*arguments)

    with running(llm, timeout_s=0.3) as server:
        with monkeypatch.context() as patch:
            patch.setattr(systemone, "decide", slow)
            response = server.post("/v1/systemone", {"state": STATE, "questions": CLOZES})
        assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
        assert server.service.answers == 0
    with running(llm) as server:
        ask(server)
