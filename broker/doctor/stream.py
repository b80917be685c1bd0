"""Whether anything between a gateway and us holds a stream back, cuts it, or changes it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from broker.doctor.finding import Finding, error, note, ok, warning
from broker.doctor.probe import AGENT, Arrival, Recording
from broker.words import count

LATE_SECONDS = 1.0
"""An event that was in the log for so long and has not arrived is held back."""
SLOW_START_SECONDS = 2.0
MARGIN_SECONDS = 1.0
"""What a heartbeat may take beyond its interval."""

_DO_NOT_BUFFER = (
    "nginx: proxy_buffering off, proxy_http_version 1.1, and no proxy_ignore_headers X-Accel-Buffering "
    "(deploy/nginx.conf has it all). Apache: flushpackets=on. HAProxy, Envoy, Traefik: no filter that buffers or "
    "compresses. Cloudflare: no Workers or rules that read the body. AWS: an ALB does not buffer; CloudFront and API "
    "Gateway may."
)
_DO_NOT_CUT = (
    "nginx: proxy_read_timeout 75s. AWS ALB: idle timeout 75 s or more. HAProxy: timeout server and timeout tunnel. "
    "Envoy, Istio: route timeout 0s, stream_idle_timeout 75s or more. Cloudflare and Heroku: their limits are fixed. "
    "Where it cannot be changed: BROKER_HEARTBEAT_SECONDS below a half of it; and where a whole request may last only "
    "so long, BROKER_MAX_STREAM_SECONDS below that, so that clients are sent away properly."
)
_DO_NOT_COMPRESS = (
    "A compressor waits until it has enough. nginx: text/event-stream must not be in gzip_types. Cloudflare and "
    "others: they must heed Cache-Control: no-transform."
)
_PASS_THE_HEADER = (
    "Clients that reconnect would get everything again. The proxy must pass the request header Last-Event-ID on "
    "(CloudFront: put it into the origin request policy)."
)


def judge_head(recording: Recording) -> list[Finding]:
    """What the response says before its first byte. An error means that there was no stream."""
    way = _way(recording.headers)
    if recording.status is None:
        if recording.failure:
            return [error("stream_status", f"no stream was opened: {recording.failure}", "See the log of the proxy.")]
        waited = recording.until - recording.began
        return [
            error("stream_buffering", f"a stream was asked for, and nothing came for {waited:.0f} s", _DO_NOT_BUFFER)
        ]
    if recording.status != 200:
        return [
            error(
                "stream_status",
                f"a stream is answered with {recording.status}{way}: {recording.detail}",
                "502, 503 or 504: the proxy reached no gateway, or gave it up. Else see the gateway's log.",
            )
        ]
    found = []
    headers = recording.headers
    content_type = headers.get("content-type", "")
    if not content_type.startswith("text/event-stream"):
        found.append(
            error(
                "stream_headers",
                f"a stream comes as {content_type or 'nothing named'}{way}, not as text/event-stream",
                "An EventSource closes for good. The proxy must leave Content-Type alone.",
            )
        )
    encoding = headers.get("content-encoding", "identity")
    if encoding not in ("", "identity"):
        found.append(warning("stream_compression", f"the stream is compressed ({encoding}){way}", _DO_NOT_COMPRESS))
    if not {"no-cache", "no-store"} & set(_directives(headers.get("cache-control", ""))):
        shown = headers.get("cache-control") or "none"
        found.append(
            warning(
                "stream_headers",
                f"the stream may be cached{way} (Cache-Control: {shown})",
                "Somebody would get another one's old stream. The proxy must leave Cache-Control: no-cache, "
                "no-transform alone.",
            )
        )
    if "content-length" in headers:
        found.append(
            error("stream_buffering", f"the stream has a Content-Length{way}: it was gathered first", _DO_NOT_BUFFER)
        )
    if recording.http_version == "HTTP/1.0":
        found.append(
            warning(
                "stream_http_version",
                f"the stream comes over HTTP/1.0{way}",
                "A client cannot tell its end from a cut. nginx: proxy_http_version 1.1.",
            )
        )
    return found or [ok("stream_headers", f"the stream's headers arrive as they are sent ({recording.http_version})")]


def _directives(value: str) -> list[str]:
    return [part.strip().lower() for part in value.split(",")]


def _way(headers: Mapping[str, str]) -> str:
    """Who answered, as far as it says so."""
    names = [headers[name] for name in ("server", "via") if headers.get(name)]
    return f" (by {', '.join(names)})" if names else ""


def judge_flow(recording: Recording, log: Sequence[Arrival]) -> list[Finding]:
    """Of a run that says a word now and then, and ends; `log` is all of it."""
    if not recording.polls or (recording.polls[-1].end.seq <= 1 and recording.polls[-1].end.epoch == 0):
        return [
            error(
                "probe_not_taken",
                f"no worker took the probe run within {recording.until - recording.began:.0f} s",
                "Start workers with the gateway's settings: run broker doctor where they are set.",
            )
        ]
    found = []
    late = lateness(recording)
    if late > LATE_SECONDS:
        when = "until the run ended" if _came_at_once(recording) else "and delivers it in bursts"
        found.append(
            error(
                "stream_buffering",
                f"something holds the stream back{_way(recording.headers)} {when}: an event came {late:.1f} s after it "
                "was in the log",
                _DO_NOT_BUFFER,
            )
        )
    if recording.ended is not None and not recording.finished:
        return [*found, _cut(recording)]
    found += _compare(recording.events, log, "the stream")
    if found:
        return found
    if recording.events[-1].type != "final":
        said = recording.events[-1].data.get("message", recording.events[-1].type)
        return [note("probe_agent", f"the agent {AGENT} did not answer as usual: {said}")]
    start = (recording.reads[0] if recording.reads else recording.until) - recording.began
    if start > SLOW_START_SECONDS:
        found.append(
            warning(
                "stream_start",
                f"the first byte came after {start:.1f} s",
                "The gateway sends one at once: look for a slow proxy, or one that waits for the first kilobytes.",
            )
        )
    return [
        *found,
        ok("stream_buffering", f"events arrive as they are produced; the first byte came in {start * 1e3:.0f} ms"),
    ]


def lateness(recording: Recording) -> float:
    """For how long, at least, an event was in the log before it came: seconds.

    A poll that shows it proves that it was there, whenever it was written.
    """
    arrivals = [(event.id, event.at) for event in recording.events]
    late = 0.0
    for seen in recording.polls:
        came = next((at for event_id, at in arrivals if event_id >= seen.end), recording.until)
        late = max(late, came - seen.at)
    return late


def _came_at_once(recording: Recording) -> bool:
    """Whether everything came when the run was over."""
    return not recording.events or recording.events[-1].at - recording.events[0].at < LATE_SECONDS / 2


def _compare(got: Sequence[Arrival], log: Sequence[Arrival], what: str) -> list[Finding]:
    """Whether it has all of the log, once and in order."""
    if [event[1:] for event in got] == [event[1:] for event in log]:
        return []
    ids, logged = [event.id for event in got], [event.id for event in log]
    lost, more = len(set(logged) - set(ids)), len(ids) - len(set(ids) & set(logged))
    return [
        error(
            "stream_content",
            f"{what} differs from the run's log: {lost} events are missing, {more} too many, of {len(log)}",
            "Something on the way changes the bytes, or answers from a cache.",
        )
    ]


def judge_resume(recording: Recording, log: Sequence[Arrival], at: int) -> list[Finding]:
    """Of a response to a Last-Event-ID, the id of `log[at]`."""
    if recording.status == 200 and recording.events and recording.events[0].id <= log[at].id:
        return [
            error("stream_resume", "a stream with Last-Event-ID begins from the beginning", _PASS_THE_HEADER),
        ]
    if recording.status != 200 or not recording.finished:
        how = f"answered with {recording.status}" if recording.status != 200 else "cut before its end"
        return [
            error(
                "stream_resume",
                f"a stream with Last-Event-ID is {how}: {recording.detail or recording.failure or 'without a reason'}",
                "Clients that reconnect would not get the rest: see the logs of the proxy and the gateway.",
            )
        ]
    if differs := _compare(recording.events, log[at + 1 :], "a resumed stream"):
        return differs
    return [
        ok("stream_resume", f"a stream resumes exactly ({len(recording.events)} of {len(log)} events after the id)")
    ]


def judge_idle(recording: Recording, *, heartbeat: float, held_back: bool) -> list[Finding]:
    """Of a run that says nothing; `held_back` is whether it is known already that bytes are."""
    if recording.finished:
        return [note("probe_agent", f"the agent {AGENT} ended its run, so that an idle stream could not be watched")]
    if recording.ended is not None:
        return [_cut(recording)]
    watched = recording.left - recording.began
    silence = _longest_silence(recording)
    if silence > heartbeat + MARGIN_SECONDS and not held_back:
        return [
            warning(
                "stream_heartbeats",
                f"nothing came for {silence:.1f} s, though heartbeats come every {heartbeat:g} s",
                "Either the gateway's BROKER_HEARTBEAT_SECONDS is longer than here, or small pieces are held back. "
                + _DO_NOT_BUFFER,
            )
        ]
    if not recording.heartbeats:
        if held_back:
            return [note("stream_heartbeats", "heartbeats were not judged: the stream is held back")]
        return [
            note(
                "stream_heartbeats",
                f"an idle stream lived for the {watched:.0f} s that it was watched; no heartbeat was due",
                f"Heartbeats come every {heartbeat:g} s at most: use --seconds {heartbeat + 5:g} or more.",
            )
        ]
    return [
        ok(
            "stream_heartbeats",
            f"an idle stream lived for the {watched:.0f} s that it was watched, with "
            f"{count(len(recording.heartbeats), 'heartbeat')} and at most {silence:.1f} s of silence",
        )
    ]


def _longest_silence(recording: Recording) -> float:
    times = [recording.began, *recording.reads, recording.until]
    return max(after - before for before, after in itertools.pairwise(times))


def _cut(recording: Recording) -> Finding:
    alive = recording.until - recording.began
    idle = recording.until - max([recording.began, *recording.reads])
    if recording.told_to_return and not recording.failure:
        return warning(
            "stream_cut",
            f"the gateway ended a stream in mid-run, and it arrived as a proper end{_way(recording.headers)}",
            "Several clients take it for the end of the run. The proxy must speak HTTP/1.1 to the gateways, and pass a "
            "cut on as one. nginx: proxy_http_version 1.1.",
        )
    if recording.told_to_return:
        return note(
            "stream_cut",
            f"the gateway itself ended a stream after {alive:.1f} s, and told the client to come back",
            "It was being replaced, or has BROKER_MAX_STREAM_SECONDS. Clients come back and miss nothing.",
        )
    how = recording.failure or "as if it was complete"
    return error(
        "stream_cut",
        f"a stream was cut after {alive:.1f} s, {idle:.1f} s after its last byte{_way(recording.headers)}: {how}",
        _DO_NOT_CUT,
    )
