"""The floor: however branches take turns, each message is told in one piece, and nothing is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from worker.agents.foreign.floor import Floor

TURNS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["piece", "end", "step"])), max_size=40)


@given(TURNS)
def test_each_message_is_told_in_one_piece(turns: list[tuple[str, str]]) -> None:
    floor, told = Floor(), ""
    number, said = dict.fromkeys("abc", 0), dict[str, str]()
    """How many messages of each task are over; the text of each message."""
    for task, turn in turns:
        if turn == "piece":
            id = f"{task}{number[task]}"
            said[id] = f"{said.get(id, '')}{id}."
            told += "".join(floor.say(f"{task}:1", id, f"{id}."))
        else:
            tasks = task if turn == "end" else "abc"
            told += "".join(floor.end(f"{task}:1") if turn == "end" else floor.end_all())
            for each in tasks:
                number[each] += 1
    told += "".join(floor.end_all())
    assert sorted(told.split("\n\n") if told else []) == sorted(said.values())
    assert floor.used == bool(said)


def test_who_has_the_floor_waits_for_nobody() -> None:
    floor = Floor()
    assert list(floor.say("a:1", "m", "x")) == ["x"]
    assert list(floor.say("b:1", "n", "held")) == []
    assert list(floor.say("a:1", "m", "y")) == ["y"]
    assert list(floor.end("a:1")) == ["\n\nheld"]
    assert list(floor.say("b:1", "n", "z")) == ["z"], "it has the floor now"


def test_the_end_of_a_step_of_another_graph_takes_the_floor_from_nobody() -> None:
    floor = Floor()
    assert list(floor.say("inner:1|a:1", "m", "x")) == ["x"]
    assert list(floor.say("b:1", "n", "held")) == []
    assert list(floor.end_all(("other:1",))) == []
    assert list(floor.end_all(("inner:1",))) == ["\n\nheld"]
