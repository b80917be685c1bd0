"""Submit, queue, worker, log, gateway, client, over two gateways."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from tests.conftest import Service
from tests.kit.checker import check_reader, entries_of, surviving_text
from tests.kit.http import Client
from tests.kit.whole_path import check_resume, check_stream_and_poll


def test_a_submitted_query_streams_to_its_end_and_the_poll_says_the_same(alice: Client) -> None:
    request_id = check_stream_and_poll(alice)
    log = alice.log(request_id)
    assert [entry.type for entry in log] == ["start", "attempt", "token", "token", "token", "final"]
    assert alice.run(request_id)["last_event_id"] == str(log[-1].id)


def test_a_stream_that_was_cut_resumes_on_the_other_gateway(alice: Client, alice_elsewhere: Client) -> None:
    check_resume(alice, alice_elsewhere)


def test_a_second_client_joins_the_run_under_way(alice: Client, alice_elsewhere: Client) -> None:
    body = {"agent": "tokens", "parameters": {"count": 30, "pause": 0.02}}
    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(client.submit_and_read, "join", **body) for client in (alice, alice_elsewhere)]
        one, two = (reader.result() for reader in readers)
    assert one == two
    log = alice.log(one[0].json["request_id"])
    check_reader(entries_of(one), log)
    assert surviving_text(log) == alice.run(one[0].json["request_id"])["answer"]


def test_parallel_submits_over_two_gateways_are_one_run(service: Service, subject: str) -> None:
    """P1, the thin form."""
    with service.client(subject) as one, service.client(subject, 1) as two, ThreadPoolExecutor(20) as pool:
        for n in range(10):
            jobs = [
                pool.submit((one, two)[k % 2].submit, f"same {n}", agent="sleeper", parameters={"seconds": 1})
                for k in range(20)
            ]
            assert len({job.result() for job in jobs}) == 1
