"""Messages between a worker and its agent processes, as bytes."""

from __future__ import annotations

import os
import pickle
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from broker.events import Token
from broker.settings import Settings
from worker.agent import Run
from worker.processes.frames import Decoder, encode
from worker.processes.messages import Begun, Call, Closed, Ended, Execute, Load, Pong, Ready, Result, Saved, Yielded

TEXT = st.text(st.characters(exclude_categories=()), max_size=50)
NUMBER = st.integers(0, 2**70)
UPWARD = st.one_of(
    st.builds(Ready, st.lists(TEXT).map(tuple)),
    st.builds(Begun, NUMBER),
    st.builds(Yielded, NUMBER, TEXT, TEXT),
    st.builds(Saved, NUMBER, TEXT),
    st.builds(Ended, NUMBER, TEXT, TEXT),
    st.builds(Call, NUMBER, NUMBER, TEXT, TEXT),
    st.builds(Closed, NUMBER),
    st.just(Pong()),
)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    ends = sorted({min(n, len(data)) for n in at} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(ends)]


@given(st.lists(UPWARD, max_size=8), st.lists(st.integers(0, 2000), max_size=20), st.booleans())
def test_messages_arrive_as_they_were_sent_however_their_bytes_are_cut(
    messages: list[NamedTuple], at: list[int], upward: bool
) -> None:
    decoder = Decoder(upward=upward)
    found = [message for part in cut(b"".join(map(encode, messages)), at) for message in decoder.feed(part)]
    assert found == messages
    assert [type(message) for message in found] == [type(message) for message in messages]


def test_a_run_and_the_settings_go_down_whole() -> None:
    run = Run(request_id="ab" * 16, query="\ud800", parameters={"a": [1, None, {"b": 0.5}]}, restored={"done": 1})
    settings = Settings(jwt_secret=SecretStr("x" * 40), agents=("mine=a.b:c",))
    [load, execute, result] = Decoder(upward=False).feed(
        encode(Load(settings)) + encode(Execute(3, "mine", run)) + encode(Result(3, 0, [run], None))
    )
    assert load.settings == settings
    assert (execute.number, execute.agent, execute.run) == (3, "mine", run)
    assert result.value == [run]


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


FOREIGN = {
    "evil": Evil(),
    "event": Token(text="x"),
    "function": os.system,
    "run": Run(request_id="", query=""),
    "class": Load,
}


@pytest.mark.parametrize("value", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_worker_reads_nothing_from_a_process_but_messages_of_texts_and_numbers(value: Any) -> None:
    with pytest.raises(pickle.UnpicklingError, match="does not come from an agent process"):
        Decoder(upward=True).feed(encode(Saved(1, value)))
    with pytest.raises(pickle.UnpicklingError):
        Decoder(upward=True).feed(encode((value,)))  # type: ignore[arg-type]
