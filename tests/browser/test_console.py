"""The console, in a real Chromium."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from broker.events import Entry, Sources
from broker.fold import fold
from broker.ids import EventId
from tests.conftest import Launcher, Service
from tests.kit import sse
from tests.kit.browser import Browser, Page
from tests.kit.checker import check_log, check_reader, surviving_text
from tests.kit.http import Client, token
from tests.kit.needs import needs
from tests.kit.scribe import Scribe

XSS = """<img src=x onerror="window.hit=1"><script>window.hit=1</script>'"</title><svg onload=window.hit=1>"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(needs("chromium"), tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser: Browser, service: Service, subject: str) -> Iterator[Page]:
    """The console of the first gateway, with the owner's token."""
    with browser.page(service.gateways[0].url) as page:
        page.write("#token", token(subject))
        yield page
        assert page.complaints == []


def send(page: Page, query: str, *, agent: str = "", session: str = "", **parameters: Any) -> str:
    """Fills in the form and presses Send. Returns the request_id of the run that the page then shows."""
    before = page.evaluate("location.hash")
    page.write("#query", query)
    page.write("#agent", agent)
    page.write("#session", session)
    page.write("#parameters", json.dumps(parameters) if parameters else "")
    page.click("#form button")
    shown: str = page.until(f"location.hash !== {json.dumps(before)} && location.hash")
    return shown.removeprefix("#run=")


def state(page: Page, name: str, seconds: float = 20) -> None:
    """Waits until the page says so; nothing but the status in words tells it to a user."""
    page.until(f"document.querySelector('#state').innerText.startsWith({json.dumps(name)})", seconds)


def answer(page: Page) -> str:
    text: str = page.evaluate("document.querySelector('#answer').textContent")
    return text


def answer_has(page: Page, characters: int) -> None:
    page.until(f"document.querySelector('#answer').textContent.length >= {characters}")


def fact(page: Page, name: str) -> str:
    rows = f"[...document.querySelectorAll('#facts div')].find(d => d.firstChild.textContent === {json.dumps(name)})"
    text: str = page.evaluate(f"{rows}?.lastChild.innerText ?? ''")
    return text


def streams(page: Page) -> list[dict[str, Any]]:
    return [request for request in page.requests if request["url"].endswith("/stream")]


def check_shown(page: Page, log: list[Entry]) -> None:
    """Each event of the log once, what was taken back left out; and their text is the answer."""
    check_log(log)
    shown = page.evaluate("run.entries.filter(entry => entry.type !== 'attempt').map(entry => entry.id)")
    assert shown == [str(entry.id) for entry in fold(log)]
    assert fact(page, "last event") == str(log[-1].id)


# -- a run, from its query to its end --------------------------------------------------------------------------


def test_a_query_is_sent_and_its_answer_grows_to_the_end(page: Page, alice: Client) -> None:
    request_id = send(page, "count", agent="tokens", session="mine", count=60, pause=0.05)
    answer_has(page, 5)
    first = answer(page)
    state(page, "Completed")
    log = alice.log(request_id)
    check_shown(page, log)
    assert answer(page) == surviving_text(log) == alice.run(request_id)["answer"]
    assert answer(page).startswith(first)
    assert first != answer(page)
    assert (fact(page, "session"), fact(page, "agent"), fact(page, "attempt")) == ("mine", "tokens", "1")
    assert page.evaluate("document.querySelector('#state').getAttribute('role')") == "status"


def test_everything_that_an_agent_says_is_shown(page: Page) -> None:
    send(page, "words", agent="speaks", text="a word")
    state(page, "Completed")
    shown = {name: page.text(f"#{name}") for name in ("answer", "citations", "sources", "reasoning", "activity")}
    assert all("a word" in text for text in shown.values()), shown
    assert "Sources discovered: 1" in shown["sources"]
    assert "Tool a word" in shown["activity"]
    assert "Result of a word" in shown["activity"]
    assert page.text("#progress") == ""
    assert "a word" in fact(page, "usage")


def test_a_failed_run_shows_its_error_and_what_it_has_said(page: Page) -> None:
    send(page, "fail", agent="raises")
    state(page, "Failed")
    assert "agent failed" in page.text("#failure")
    assert answer(page) == "so far "
    assert "secret" not in page.text("body")


def test_progress_and_scored_sources_are_shown_while_the_run_goes_on(browser: Browser, launch: Launcher) -> None:
    (launch.folder / "rivers.md").write_text("# Rivers\n\nThe Elbe flows from the Giant Mountains to the North Sea.\n")
    redis = launch.redis()
    gateway = launch.gateway(redis.url, docs=launch.folder, default_agent="research")
    launch.worker(redis.url, docs=launch.folder)
    with browser.page(gateway.url) as page:
        page.write("#token", token())
        send(page, "Where does the Elbe flow?", pace=4)
        page.until(
            "document.querySelector('#progress').checkVisibility() && document.querySelector('.source .bar b') !== null"
        )
        assert page.evaluate("Number(document.querySelector('#progress').ariaValueNow)") > 0
        assert "rivers.md" in page.text("#sources")
        assert float(page.text("#sources details[open] .score")) > 0
        state(page, "Completed")
        assert "rivers.md" in page.text("#citations")
        assert page.text("#progress") == ""


# -- cuts ------------------------------------------------------------------------------------------------------


def test_a_reload_in_the_middle_of_a_run_resumes_and_shows_the_whole_answer(page: Page, alice: Client) -> None:
    request_id = send(page, "reload", agent="tokens", count=80, pause=0.05)
    answer_has(page, 20)
    page.reload()
    assert page.evaluate("location.hash") == f"#run={request_id}"
    state(page, "Completed")
    log = alice.log(request_id)
    check_shown(page, log)
    assert answer(page) == surviving_text(log)
    assert [run["request_id"] for run in alice.get("/api/v1/runs").json()["runs"]] == [request_id]


@pytest.mark.parametrize("way", ["SIGTERM", "SIGKILL"])
def test_a_restart_of_the_gateway_under_the_page_loses_and_doubles_nothing(
    browser: Browser, launch: Launcher, way: str
) -> None:
    """P9, P17, seen from a page."""
    redis = launch.redis()
    gateway = launch.gateway(redis.url)
    launch.worker(redis.url)
    with browser.page(gateway.url) as page:
        page.write("#token", token())
        request_id = send(page, "restart", agent="tokens", count=120, pause=0.04)
        answer_has(page, 20)
        if way == "SIGTERM":
            assert gateway.stop() == 0
        else:
            gateway.kill()
        state(page, "Cut off")
        launch.gateway(redis.url, port=gateway.port)
        state(page, "Completed", 30)
        with Client(gateway.url) as client:
            log = client.log(request_id)
        check_shown(page, log)
        assert answer(page) == surviving_text(log)
        first, *later = streams(page)
        assert "Last-Event-ID" not in first["headers"]
        assert later
        assert all(request["headers"]["Last-Event-ID"] in {str(entry.id) for entry in log} for request in later)
        assert page.complaints == []


def test_the_page_waits_at_least_as_long_as_the_gateway_says(browser: Browser, launch: Launcher) -> None:
    redis = launch.redis()
    gateway = launch.gateway(redis.url, max_stream_seconds=0.5)
    launch.worker(redis.url)
    with browser.page(gateway.url) as page:
        page.write("#token", token())
        page.evaluate(
            """window.changes = []; const state = document.querySelector("#state");
            new MutationObserver(() => changes.push([state.innerText, performance.now(), run.retry]))
              .observe(state, { childList: true });"""
        )
        send(page, "quiet", agent="sleeper", seconds=30)
        page.until("changes.filter(([text]) => text === 'Connecting').length >= 2")
        changes = page.evaluate("changes")
        cut = next(index for index, (text, _, _) in enumerate(changes) if text.startswith("Cut off"))
        waited, retry = changes[cut + 1][1] - changes[cut][1], changes[cut][2]
        assert 1000 <= retry <= 3000
        assert retry - 5 <= waited


async def test_a_rewind_takes_text_back(page: Page, service: Service, subject: str, alice: Client) -> None:
    """P11: the fold, in the page."""
    async with Scribe(service.redis.url) as scribe:
        run = await scribe.running(subject, "rewind", tokens=5)
        page.evaluate(f"location.hash = 'run={run.request_id}'")
        page.until("document.querySelector('#answer').textContent === '0 1 2 3 4 '")
        await run.attempt(resume_from=EventId(run.epoch, 3))
        page.until("document.querySelector('#answer').textContent === '0 1 '")
        assert "Rewind (worker lost): 3 events" in page.text("#activity .rewind")
        assert fact(page, "attempt") == "2"
        await run.tokens(2)
        page.until("document.querySelector('#answer').textContent === '0 1 5 6 '")
        await run.end()
        state(page, "Completed")
        check_shown(page, alice.log(run.request_id))


async def test_a_cursor_that_a_failover_lost_starts_the_page_again(
    page: Page, service: Service, subject: str, alice: Client
) -> None:
    """PROTOCOL 6.5."""
    async with Scribe(service.redis.url) as scribe:
        run = await scribe.running(subject, "failover", tokens=5)
        page.evaluate(f"location.hash = 'run={run.request_id}'")
        page.until("document.querySelector('#answer').textContent === '0 1 2 3 4 '")
        page.click("#disconnect")
        state(page, "Disconnected")
        await run.roll_back(EventId(0, 1))
        await run.attempt()
        await run.tokens(2)
        page.click("#resume")
        page.until("document.querySelector('#answer').textContent === '5 6 '")
        await run.end()
        state(page, "Completed")
        check_shown(page, alice.log(run.request_id))


def test_an_event_source_in_a_page_reads_to_the_end_and_stays_closed(browser: Browser, launch: Launcher) -> None:
    """P13, P24: heartbeats are no events, and a 204 after the end stops it."""
    redis = launch.redis()
    gateway = launch.gateway(redis.url, auth="none", jwt_secret=None, heartbeat_seconds=0.3)
    launch.worker(redis.url)
    with browser.page(gateway.url) as page, Client(gateway.url, None) as client:
        request_id = send(page, "beats", agent="tokens", count=4, pause=0.9)
        page.evaluate(
            """(id => {
              window.seen = []; window.beats = new Set();
              window.source = new EventSource(`api/v1/runs/${id}/stream`);
              const take = e => { if ("data" in e) seen.push([e.lastEventId, e.type, e.data]); };
              for (const type of ["start", "attempt", "token", "final", "error", "message"])
                source.addEventListener(type, take);
              new MutationObserver(() => beats.add(document.querySelector("#facts").innerText))
                .observe(document.querySelector("#facts"), {subtree: true, childList: true});
            })"""
            f"('{request_id}')"
        )
        page.until("source.readyState === EventSource.CLOSED")
        log = client.log(request_id)
        check_log(log)
        seen = page.evaluate("seen")
        check_reader([Entry(EventId.parse(event_id), kind, data) for event_id, kind, data in seen], log)
        state(page, "Completed")
        own = [request for request in streams(page) if "text/event-stream" in request["headers"].get("Accept", "")]
        assert [request["status"] for request in own] == [200, 204]
        assert own[1]["headers"]["Last-Event-ID"] == str(log[-1].id)
        asked = len(page.requests)
        browser.read_events(3.5)
        assert len(page.requests) == asked, "it asks again"
        assert page.evaluate("source.readyState") == 2
        beats = {text.partition("heartbeat")[2] for text in page.evaluate("[...beats]") if "heartbeat" in text}
        assert len(beats) > 2, "there were no heartbeats"
        assert any("lease" in text for text in beats)


# -- the buttons -----------------------------------------------------------------------------------------------


def test_cancel_stops_the_run(page: Page, alice: Client) -> None:
    request_id = send(page, "stop me", agent="hangs")
    answer_has(page, 5)
    page.click("#cancel")
    state(page, "Cancelled")
    assert alice.run(request_id)["status"] == "cancelled"
    assert answer(page) == "waiting "
    assert page.evaluate("['disconnect', 'resume', 'cancel'].every(id => document.getElementById(id).disabled)")


def test_a_run_goes_on_while_the_page_is_disconnected(page: Page, alice: Client) -> None:
    request_id = send(page, "apart", agent="tokens", count=60, pause=0.05)
    answer_has(page, 5)
    page.click("#disconnect")
    state(page, "Disconnected")
    assert page.evaluate("document.activeElement.id") == "resume"
    assert alice.finished(request_id)["status"] == "completed"
    held = answer(page)
    assert held != surviving_text(alice.log(request_id))
    page.click("#resume")
    state(page, "Completed")
    check_shown(page, alice.log(request_id))
    assert answer(page) == surviving_text(alice.log(request_id))


def test_a_poll_shows_the_run_as_it_is(page: Page, alice: Client) -> None:
    request_id = send(page, "poll this", agent="echo")
    state(page, "Completed")
    page.click("#poll")
    page.until("document.querySelector('#polled').checkVisibility()")
    assert json.loads(page.text("#polled")) == alice.run(request_id)


def test_a_deleted_run_is_gone_from_the_page_and_the_service(page: Page, alice: Client) -> None:
    request_id = send(page, "delete this", agent="hangs")
    answer_has(page, 5)
    page.click("#delete")
    page.until("document.querySelector('#welcome').checkVisibility()")
    assert page.dialogs == ["Delete this run and its log for good?"]
    assert alice.get(f"/api/v1/runs/{request_id}").status_code == 404
    page.until("document.querySelector('#runs li') === null")


def test_a_run_that_somebody_else_deletes_is_told(page: Page, alice: Client) -> None:
    request_id = send(page, "deleted elsewhere", agent="hangs")
    answer_has(page, 5)
    alice.delete(f"/api/v1/runs/{request_id}")
    state(page, "Gone")
    assert "This run no longer exists." in page.text("#failure")


def test_recent_runs_can_be_opened(page: Page) -> None:
    send(page, "the first", agent="echo")
    state(page, "Completed")
    send(page, "the second", agent="echo")
    state(page, "Completed")
    page.until("document.querySelectorAll('#runs a').length === 2")
    assert page.text("#runs li:first-child b") == "the second"
    page.click("#runs li:last-child a")
    page.until("document.querySelector('#answer').textContent === 'the first'")
    page.evaluate("history.back()")
    page.until("document.querySelector('#answer').textContent === 'the second'")
    assert page.text("#runs a[aria-current=true] b") == "the second"


# -- problems --------------------------------------------------------------------------------------------------


def test_a_problem_is_shown_with_its_title_and_detail(page: Page) -> None:
    page.write("#query", "anything")
    page.write("#agent", "nobody")
    page.click("#form button")
    page.until("document.querySelector('#refusal').checkVisibility()")
    assert page.text("#refusal strong").endswith("(422)")
    assert "Unknown agent; this service has: research, chat, echo" in page.text("#refusal")


@pytest.mark.parametrize("parameters", ["{", "[1]", "null", "3"])
def test_parameters_that_are_no_json_object_are_not_sent(page: Page, parameters: str) -> None:
    page.write("#query", "anything")
    page.write("#parameters", parameters)
    page.click("#form button")
    page.until("document.querySelector('#refusal').checkVisibility()")
    assert "not a JSON object" in page.text("#refusal")
    assert not [request for request in page.requests if request["method"] == "POST"]


def test_a_refused_run_continues_with_a_good_token(page: Page, alice: Client, subject: str) -> None:
    request_id = alice.submit("later", agent="echo")
    page.write("#token", token("somebody else"))
    page.evaluate(f"location.hash = 'run={request_id}'")
    state(page, "Refused")
    assert "(404)" in page.text("#problem strong")
    page.write("#token", "not a token")
    page.until("document.querySelector('#problem strong').innerText === 'Not a token'")
    page.write("#token", "Bearer x.y.z")
    page.until("document.querySelector('#problem strong').innerText.includes('(401)')")
    page.write("#token", token(subject))
    state(page, "Completed")
    assert page.text("#problem") == ""


def test_the_token_is_kept_in_the_session_and_nowhere_else(page: Page, service: Service) -> None:
    kept = page.evaluate("[sessionStorage.length, sessionStorage.getItem('token'), localStorage.length]")
    assert kept == [1, page.evaluate("document.querySelector('#token').value"), 0]
    send(page, "secretly", agent="echo")
    state(page, "Completed")
    assert kept[1] not in page.evaluate("location.href + document.cookie + document.body.innerText")
    assert not any(kept[1] in request["url"] for request in page.requests)
    assert all(request["url"].startswith((service.gateways[0].url, "data:")) for request in page.requests)


# -- safety ----------------------------------------------------------------------------------------------------


def test_markup_in_any_text_stays_text(page: Page) -> None:
    send(page, XSS, agent="speaks", session=XSS)
    state(page, "Completed")
    page.click("#poll")
    page.until("document.querySelector('#polled').checkVisibility()")
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    for part in ("title", "answer", "citations", "sources", "reasoning", "activity", "facts", "runs"):
        assert XSS in page.text(f"#{part}"), part
    page.reload()
    state(page, "Completed")
    assert page.evaluate("[window.hit, document.images.length, document.scripts.length]") == [None, 0, 1]
    assert page.evaluate("document.querySelectorAll('svg, iframe, [onload], [onerror]').length") == 0


async def test_only_web_addresses_of_sources_are_links(page: Page, service: Service, subject: str) -> None:
    async with Scribe(service.redis.url) as scribe:
        run = await scribe.running(subject, "links")
        urls = [
            "javascript:window.hit=1",
            "https://example.com/a",
            " javascript:window.hit=1",
            "data:text/html,x",
            "//x",
        ]
        items: list[dict[str, Any]] = [{"title": url, "url": url} for url in urls]
        odd: list[dict[str, Any]] = [{}, {"url": 3, "score": "high", "path": None, "title": {"a": []}}, {"score": -1}]
        data = Sources(stage="screened", count=len(items), items=items + odd).json_data()
        await run.append([("sources", data)])
        await run.end()
        page.evaluate(f"location.hash = 'run={run.request_id}'")
        state(page, "Completed")
    assert page.evaluate("document.querySelectorAll('.source').length") == len(items) + len(odd)
    links = page.evaluate("[...document.querySelectorAll('.source a')].map(a => [a.href, a.rel])")
    assert links == [["https://example.com/a", "noopener noreferrer"]]


def test_the_content_security_policy_is_in_force(page: Page, service: Service) -> None:
    policy = httpx.get(service.gateways[0].url).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    elsewhere = service.gateways[1].url
    page.evaluate(
        f"""(async () => {{
          window.refused = [];
          addEventListener("securitypolicyviolation", e => refused.push(e.effectiveDirective));
          await fetch("{elsewhere}/healthz", {{mode: "no-cors"}}).catch(() => {{}});
          new Image().src = "{elsewhere}/x.png";
          document.body.append(Object.assign(document.createElement("iframe"), {{src: "{elsewhere}"}}));
          document.head.append(Object.assign(document.createElement("base"), {{href: "{elsewhere}"}}));
          const form = document.createElement("form");
          form.action = "{elsewhere}/";
          document.body.append(form);
          form.submit();
          try {{ document.body.innerHTML = "<b>markup</b>"; }} catch {{}}
        }})()"""
    )
    expected = {"connect-src", "img-src", "frame-src", "base-uri", "form-action", "require-trusted-types-for"}
    page.until(f"new Set(refused).size >= {len(expected)}")
    assert set(page.evaluate("refused")) == expected
    page.complaints.clear()


# -- the reader of event streams -------------------------------------------------------------------------------

STREAM = (
    b"\xef\xbb\xbfretry: 2500\n: heartbeat 12-812 lease=1.3s\nid: 1-1\nevent: token\ndata: {}\n\n"
    b"id: 1-2\r\nevent:message\r\ndata:one\r\ndata:  two\r\n\r\n"
    b"id: 1-3\revent: x\rdata: cr\r\r"
    b"data\ndata\n\n"
    b"id: 1-4\n\n"
    b"id: 1\x005\ndata: keeps the id\n\nretry: soon\nretry\nunknown: field\n:\n"
    b"id\ndata: no id\n\n"
    + "id: 1-6\ndata: €𝄞\u2028\u0085\x0b: é\n\n\n: end\r\nevent: y\n\n\ndata: never ended\nid: 1-7\n".encode()
)


def test_the_pages_reader_agrees_with_the_standard_wherever_the_stream_is_cut(page: Page) -> None:
    """P8, P13."""
    page.evaluate(
        """window.read = async (...chunks) => {
          const body = new ReadableStream({
            start(c) { for (const chunk of chunks) if (chunk.length) c.enqueue(chunk); c.close(); },
          });
          let lastId = "";
          const seen = { events: [], comments: [], retry: null };
          for await (const event of eventsOf(body)) {
            lastId = event.id ?? lastId;
            if (event.comment !== undefined) seen.comments.push(event.comment);
            else if (event.retry !== undefined) seen.retry = event.retry;
            else if (event.data !== null) seen.events.push([lastId, event.type, event.data]);
          }
          return [seen, lastId];
        }"""
    )
    bytes_of = f"Uint8Array.from(atob('{base64.b64encode(STREAM).decode()}'), c => c.charCodeAt(0))"
    joined, beginnings, single = page.evaluate(
        f"""(async () => {{
          const all = {bytes_of}, joined = new Set(), beginnings = [];
          for (let cut = 0; cut <= all.length; cut++) {{
            joined.add(JSON.stringify(await read(all.slice(0, cut), all.slice(cut))));
            beginnings.push(await read(all.slice(0, cut)));
          }}
          return [[...joined].map(JSON.parse), beginnings, await read(...Array.from(all, b => Uint8Array.of(b)))];
        }})()"""
    )
    assert joined == [single] == [_model(STREAM)]
    assert beginnings == [_model(STREAM[:cut]) for cut in range(len(STREAM) + 1)]


def _model(data: bytes) -> list[Any]:
    stream = sse.EventStream()
    events = [[event.id, event.type, event.data] for event in stream.feed(data)]
    return [{"events": events, "comments": stream.comments, "retry": stream.retry_ms}, stream.last_event_id]


# -- screens and keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [320, 700, 1600])
def test_nothing_is_wider_than_the_screen(page: Page, width: int) -> None:
    page.look(width=width)
    send(page, "wide" * 200, agent="speaks", session="s" * 200)
    state(page, "Completed")
    page.click("#poll")
    page.until("document.querySelector('#polled').checkVisibility()")
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_is_light_or_dark_as_the_system_is(page: Page) -> None:
    ground = []
    for dark in (False, True):
        page.look(width=1000, dark=dark)
        ground.append(page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"))
    light, dark_ground = ground
    assert min(light) > 200
    assert max(dark_ground) < 60


def test_the_keyboard_is_enough(page: Page) -> None:
    page.write("#query", "keys")
    page.write("#agent", "echo")
    page.evaluate("document.querySelector('#query').focus()")
    page.press("Enter", control=True)
    state(page, "Completed")
    order = []
    for _ in range(7):
        order.append(page.evaluate("document.activeElement.id || document.activeElement.innerText"))
        page.press("Tab")
    assert order == ["query", "agent", "session", "parameters", "token", "Send", "refresh"]
    page.evaluate("document.querySelector('#poll').focus()")
    page.press("Enter")
    page.until("document.querySelector('#polled').checkVisibility()")
