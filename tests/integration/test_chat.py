"""The agent `chat` from its client to its model: a real gateway and worker, and the stand-in provider."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from broker.events import Entry
from tests.conftest import Launcher
from tests.kit.agents import VARIETY
from tests.kit.checker import check_log, check_poll, check_reader, entries_of, surviving_text
from tests.kit.http import Client
from tests.kit.model_stub import ModelStub
from tests.kit.processes import Worker, wait_for
from tests.kit.scale import LONG

CORPUS = Path(__file__).parents[1] / "corpus"
SYSTEM = "You are a test."
ROUNDS = 4
LONE_SURROGATE = "\ud800"
VARIANTS: list[dict[str, Any]] = [{}, {"agent_processes": 2}, {"model_api": "completions"}] if LONG else [{}]


@dataclass
class Stage:
    stub: ModelStub
    worker: Worker
    client: Client
    url: str

    def asked(self, query: str) -> list[dict[str, Any]]:
        """What the model was sent for a query."""
        return self.stub.journal(query)


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    launcher = Launcher(tmp_path_factory.mktemp("chat"))
    try:
        with ModelStub() as stub, pytest.MonkeyPatch.context() as patched:
            for name, value in stub.environment.items():
                patched.setenv(name, value)
            server = launcher.redis()
            gateway = launcher.gateway(server.url)
            worker = launcher.worker(
                server.url,
                model="stub",
                models="other",
                tools="tests.kit.tools",
                docs=CORPUS,
                max_rounds=ROUNDS,
                system_prompt=SYSTEM,
                history_tokens=200,
                model_stall_seconds=1,
                **request.param,
            )
            with Client(gateway.url) as client:
                yield Stage(stub, worker, client, gateway.url)
    finally:
        launcher.close()


@dataclass
class Ended:
    run: dict[str, Any]
    log: list[Entry]

    def data(self, *types: str) -> list[dict[str, Any]]:
        return [json.loads(entry.data) for entry in self.log if entry.type in types]

    @property
    def types(self) -> list[str]:
        """Of its events, text of several pieces once."""
        kinds = [entry.type for entry in self.log]
        return [kind for n, kind in enumerate(kinds) if n == 0 or kind != kinds[n - 1] or kind.startswith("tool")]


def chat(stage: Stage, query: str, *, status: str = "completed", client: Client | None = None, **body: Any) -> Ended:
    """The run when it has ended. Its log is whole, a reader sees it, and polling equals streaming (P3, P8, P23)."""
    client = client or stage.client
    posted = client.post(
        "/api/v1/query",
        content=json.dumps({"query": query, "agent": "chat", **body}),  # ASCII: a lone surrogate has no UTF-8
        headers={"Content-Type": "application/json"},
    )
    request_id = posted.json()["request_id"]
    run = client.finished(request_id)
    log = client.log(request_id)
    check_log(log)
    check_poll(run, log)
    check_reader(entries_of(list(client.events(request_id))), log)
    assert run["status"] == status, run
    assert run["answer"] == (surviving_text(log) or None)
    return Ended(run, log)


# -- answers ----------------------------------------------------------------------------------------------------------


def test_an_answer_comes_as_the_model_makes_it(stage: Stage) -> None:
    ended = chat(stage, "hello [[tokens=20]] [[pace=100]]")
    assert ended.run["answer"] == " ".join(f"w{n}" for n in range(1, 21))
    assert len(ended.data("token")) > 5, "in pieces"
    assert ended.types == ["start", "attempt", "token", "final"]
    [asked] = stage.asked("hello [[")
    assert [(message["role"], message["content"]) for message in asked["messages"]] == [
        ("system", SYSTEM),
        ("user", "hello [[tokens=20]] [[pace=100]]"),
    ]
    assert asked["model"] == "stub"


def test_reasoning_is_told_apart_from_the_answer(stage: Stage) -> None:
    ended = chat(stage, "why [[reasoning=let me think]] [[say=because]]")
    assert "".join(data["text"] for data in ended.data("reasoning")) == "let me think"
    assert ended.run["answer"] == "because"
    assert ended.types == ["start", "attempt", "reasoning", "token", "final"]


def test_usage_is_what_the_model_server_has_counted(stage: Stage) -> None:
    usage = chat(stage, "count [[cached=3]] [[reasoning=one two]] [[say=a b c]]").run["usage"]
    assert usage == {
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": 5,
        "total_tokens": usage["prompt_tokens"] + 5,
        "cached_tokens": 3,
        "reasoning_tokens": 2,
        "rounds": 1,
        "model": "stub",
        "finish_reason": "stop",
    }
    assert usage["prompt_tokens"] > 3
    assert chat(stage, "uncounted [[usage=none]]").run["usage"] == {
        "rounds": 1, "model": "stub", "finish_reason": "stop"}  # fmt: skip


def test_an_answer_that_was_cut_says_so(stage: Stage) -> None:
    ended = chat(stage, "short [[tokens=50]]", parameters={"max_tokens": 5})
    assert (ended.run["answer"], ended.run["usage"]["finish_reason"]) == ("w1 w2 w3 w4 w5", "length")


@pytest.mark.parametrize("text", [text for text in VARIETY if text != LONE_SURROGATE])
def test_text_is_lossless_on_the_whole_way(stage: Stage, text: str) -> None:
    """P18: from the query to the model, and from the model, its reasoning and its tools to the client."""
    arguments = json.dumps({"text": text})
    ended = chat(stage, f"variety {text!r} [[reasoning=.{text}.]] [[tool=repeat {arguments}]] [[say=.{text}.]]")
    assert ended.run["answer"] == f".{text}.\n\n.{text}."
    assert "".join(data["text"] for data in ended.data("reasoning")) == f".{text}." * 2
    assert ended.data("tool_call")[0]["args"] == {"text": text}
    assert ended.data("tool_result")[0]["result"] == text
    [_, asked] = stage.asked(f"variety {text!r} ")
    assert asked["messages"][-1]["content"] == text


def test_a_lone_surrogate_reaches_the_model_as_what_utf8_can_carry(stage: Stage) -> None:
    ended = chat(stage, f"surrogate {LONE_SURROGATE} [[tool=repeat {json.dumps({'text': LONE_SURROGATE})}]]")
    assert ended.data("tool_result")[0]["result"] == LONE_SURROGATE
    [_, asked] = stage.asked("surrogate ")
    assert asked["messages"][1]["content"].startswith("surrogate \ufffd ")
    assert asked["messages"][-1]["content"] == "\ufffd"


# -- tools ------------------------------------------------------------------------------------------------------------


def test_tools_are_called_and_the_model_is_told_what_they_said(stage: Stage) -> None:
    ended = chat(stage, 'tools [[tool=weather {"city": "Bern"}]] [[tool2=who]]')
    assert ended.types == ["start", "attempt", *["tool_call", "tool_result"] * 2, "token", "final"]
    calls, results = ended.data("tool_call"), ended.data("tool_result")
    assert [(call["tool"], call["args"]) for call in calls] == [("weather", {"city": "Bern"}), ("who", {})]
    assert [result["id"] for result in results] == [call["id"] for call in calls]
    assert [result["result"] for result in results] == [
        {"city": "Bern", "days": 1, "sky": "clear"},
        "alice of alice",
    ]
    first, second, third = stage.asked("tools [[tool=")
    assert "weather" in first["tools"] and "search_documents" in first["tools"]
    assert second["messages"][-1]["content"] == '{"city":"Bern","days":1,"sky":"clear"}'
    assert third["messages"][-1]["content"] == "alice of alice"
    assert third["messages"][: len(second["messages"])] == second["messages"], "what a server has cached stays"
    usage = ended.run["usage"]
    assert usage["rounds"] == 3
    assert 'A tool answered: {"city"' in ended.run["answer"]


def test_the_calls_of_a_round_run_at_the_same_time(stage: Stage, tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    asked = [json.dumps({"folder": str(tmp_path), "name": name, "others": names}) for name in names]
    ended = chat(stage, "meet " + " ".join(f"[[tool=meet {arguments}]]" for arguments in asked))
    assert ended.types == ["start", "attempt", *["tool_call"] * 3, *["tool_result"] * 3, "token", "final"]
    assert [call["args"]["name"] for call in ended.data("tool_call")] == names, "in the model's order"
    assert sorted(result["result"] for result in ended.data("tool_result")) == [f"{n} has met 3" for n in names]


def test_text_of_several_rounds_is_parted(stage: Stage) -> None:
    ended = chat(stage, "parted [[say=Let me see.]] [[tool=who]]")
    assert ended.run["answer"] == "Let me see.\n\nLet me see."
    assert ended.types == ["start", "attempt", "token", "tool_call", "tool_result", "token", "final"]
    [_, second] = stage.asked("parted [[")
    assert second["messages"][-2]["content"] == "Let me see.", "the model is told what it said"


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("weather {broken", "The arguments are not JSON"),
        ('weather {"town": "Bern"}', "city: Field required; town: Extra inputs are not permitted"),
        ("fails", "RuntimeError: this city has no weather"),
        ("dawdles", "The tool did not answer within 0.3 seconds."),
        ("nowhere", "There is no tool of this name. Tools: search_documents, weather, "),
    ],
)
def test_what_goes_wrong_with_a_tool_goes_to_the_model_and_does_not_end_the_run(
    stage: Stage, call: str, error: str
) -> None:
    ended = chat(stage, f"wrong [[tool={call}]] [[tool=who]]")
    assert ended.run["usage"]["rounds"] == 2
    told = {result["tool"]: result["result"] for result in ended.data("tool_result")}
    assert error in told[call.partition(" ")[0]]["error"]
    assert told["who"] == "alice of alice", "the others are not disturbed"
    asked = stage.asked(f"wrong [[tool={call}]]")[-1]
    assert any(error in json.loads(m["content"])["error"] for m in asked["messages"] if "error" in str(m["content"]))
    if call == "fails":
        [line] = stage.worker.logged("a tool failed", tool="fails")
        assert "Traceback" in json.dumps(line) and line["request_id"] == ended.run["request_id"]
    assert "Traceback" not in json.dumps(ended.run) + "".join(entry.data for entry in ended.log)


def test_arguments_that_are_no_json_are_shown_as_the_text_that_they_are(stage: Stage) -> None:
    ended = chat(stage, "raw [[tool=weather {broken]] [[tool=weather [1]]]")
    assert [call["args"] for call in ended.data("tool_call")] == ["{broken", [1]]


def test_a_large_result_is_cut_for_the_log_and_for_the_model(stage: Stage) -> None:
    ended = chat(stage, 'large [[tool=repeat {"text": "0123456789", "times": 10000}]]')
    [result] = ended.data("tool_result")
    assert "[cut: these are the first " in result["result"] and len(result["result"]) < 33_000
    assert stage.asked("large [[")[-1]["messages"][-1]["content"] == result["result"]


def test_the_last_round_has_no_tools_so_that_there_is_an_answer(stage: Stage) -> None:
    ended = chat(stage, 'again [[tool*=weather {"city": "Bern"}]]')
    assert [bool(asked["tools"]) for asked in stage.asked("again [[")] == [True] * (ROUNDS - 1) + [False]
    assert (len(ended.data("tool_call")), ended.run["usage"]["rounds"]) == (ROUNDS - 1, ROUNDS)
    assert ended.run["answer"]


def test_the_documents_are_a_tool(stage: Stage) -> None:
    ended = chat(stage, 'docs [[tool=search_documents {"query": "How do coral reefs grow?", "limit": 2}]]')
    [result] = ended.data("tool_result")
    assert 1 <= len(result["result"]) <= 2
    for passage in result["result"]:
        lines = (CORPUS / passage["path"]).read_text().splitlines()
        assert passage["text"].split()[0] in lines[passage["line"] - 1]


# -- parameters -------------------------------------------------------------------------------------------------------


def test_a_run_may_choose_its_model_its_sampling_and_its_tools(stage: Stage) -> None:
    chosen = {"model": "other", "temperature": 0.25, "tools": ["who", "weather"]}
    ended = chat(stage, "choose", parameters=chosen)
    [asked] = stage.asked("choose")
    assert (asked["model"], asked["parameters"]["temperature"]) == ("other", 0.25)
    assert asked["tools"] == ["who", "weather"] and ended.run["usage"]["model"] == "other"
    chat(stage, "none at all", parameters={"tools": False})
    assert stage.asked("none at all")[0]["tools"] == []
    narrowed = chat(stage, "narrow [[tool=who]]", parameters={"tools": ["weather"]})
    assert narrowed.data("tool_result")[0]["result"] == {"error": "There is no tool of this name. Tools: weather."}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"temperatur": 1, "x": 2}, "chat has no parameter temperatur, x; it has model, temperature, top_p, "),
        ({"temperature": "hot"}, "temperature must be a number from 0 to 2"),
        ({"model": "gpt-99"}, "model must be one of stub, other"),
        ({"tools": "who"}, "tools must be a list of names, or false for none"),
        ({"tools": ["who", "nobody"]}, "tools: there is no nobody; there is search_documents, weather, "),
    ],
)
def test_a_wrong_parameter_ends_the_run_and_says_what_is_allowed(
    stage: Stage, parameters: dict[str, Any], message: str
) -> None:
    ended = chat(stage, f"wrong parameter {parameters}", status="failed", parameters=parameters)
    assert ended.run["error"]["code"] == "invalid_parameter"
    assert ended.run["error"]["message"].startswith(message)
    assert stage.asked(f"wrong parameter {parameters}") == []


# -- sessions ---------------------------------------------------------------------------------------------------------


def _said(asked: dict[str, Any]) -> list[str]:
    return [message["content"] for message in asked["messages"] if message["role"] != "system"]


def test_a_follow_up_question_has_the_session_before_it(stage: Stage) -> None:
    """Whichever agent answered; not what was cancelled, failed or is under way, and not another owner's."""
    body: dict[str, Any] = {"session_id": "a session"}
    chat(stage, "first [[say=one]]", **body)
    echoed = stage.client.submit("echoed words", agent="echo", **body)
    stage.client.finished(echoed)
    chat(stage, "failing [[fail=401]]", status="failed", **body)
    cancelled = stage.client.submit("cancelled", agent="hangs", **body)
    stage.client.post(f"/api/v1/runs/{cancelled}/cancel")
    stage.client.submit("under way", agent="hangs", **body)
    with Client(stage.url, subject="bob") as bob:
        chat(stage, "bobs own [[say=bob]]", client=bob, **body)
        assert _said(stage.asked("bobs own")[-1]) == ["bobs own [[say=bob]]"], "another owner's session is empty"
    chat(stage, "elsewhere [[say=three]]", session_id="another")
    chat(stage, "and then? [[say=two]]", **body)
    assert _said(stage.asked("and then?")[-1]) == [
        "first [[say=one]]",
        "one",
        "echoed words",
        "echoed words",
        "and then? [[say=two]]",
    ]


def test_a_session_is_told_within_its_budget_and_without_what_was_erased(stage: Stage) -> None:
    body: dict[str, Any] = {"session_id": "long session"}
    answers = ["a" * 150, "b" * 150, "c" * 150]
    runs = [chat(stage, f"turn {n} [[say={text}]]", **body).run for n, text in enumerate(answers)]
    chat(stage, "which are left?", **body)
    told = _said(stage.asked("which are left?")[-1])
    assert [text for text in told if text in answers] == answers[1:], "200 tokens"
    stage.client.delete(f"/api/v1/runs/{runs[2]['request_id']}")
    chat(stage, "and now?", **body)
    assert answers[2] not in _said(stage.asked("and now?")[-1])


def test_any_agent_may_ask_for_its_history(stage: Stage) -> None:
    before = chat(stage, "remember [[say=this]]", session_id="any").run
    request_id = stage.client.submit("what was it?", agent="recalls", session_id="any")
    stage.client.finished(request_id)
    [turn] = [json.loads(entry.data)["value"] for entry in stage.client.log(request_id) if entry.type == "data"]
    assert turn.pop("created_at") > 1_700_000_000
    assert turn == {
        "request_id": before["request_id"],
        "agent": "chat",
        "query": "remember [[say=this]]",
        "answer": "this",
        "cut": False,
    }


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "code", "answer"),
    [
        ("401", "model_unauthorized", None),
        ("404", "model_not_found", None),
        ("context", "model_context_too_long", None),
        ("break after=3", "model_broken", "w1 w2 w3"),
        ("error after=3", "model_broken", "w1 w2 w3"),
        ("stall after=3", "model_stalled", "w1 w2 w3"),
        ("filter after=3", "model_content_filter", "w1 w2 w3"),
        ("empty", "model_empty", None),
    ],
)
def test_a_model_that_fails_ends_the_run_with_its_code_and_what_was_said_stays(
    stage: Stage, failure: str, code: str, answer: str | None
) -> None:
    ended = chat(stage, f"failure [[tokens=9]] [[fail={failure}]]", status="failed")
    assert (ended.run["error"]["code"], ended.run["answer"]) == (code, answer)
    assert stage.worker.logged("a model failed", request_id=ended.run["request_id"], code=code)


def test_cancelling_a_run_closes_its_connection_to_the_model(stage: Stage) -> None:
    """So that the server stops to generate: P25."""
    request_id = stage.client.submit("cancel me [[tokens=100000]] [[pace=50]]", agent="chat")
    wait_for(lambda: "token" in [entry.type for entry in stage.client.log(request_id)])
    assert stage.client.post(f"/api/v1/runs/{request_id}/cancel").json()["status"] == "cancelled"
    stage.stub.until_ended("disconnected", "cancel me")
    assert stage.client.run(request_id)["answer"].startswith("w1")


def test_cancelling_a_run_cancels_its_tools(stage: Stage, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    request_id = stage.client.submit(f'stop [[tool=lingers {{"mark": "{mark}"}}]]', agent="chat")
    wait_for((tmp_path / "mark.begun").exists)
    stage.client.post(f"/api/v1/runs/{request_id}/cancel")
    wait_for(mark.exists)
    assert len(stage.asked(str(mark))) == 1
