"""What a worker and its agent processes tell each other. `number` names an execution of a run in its process."""

from __future__ import annotations

from typing import Any, NamedTuple

from broker.settings import Settings
from worker.agent import Run

WINDOW = 32
"""So many events of a run may be on their way from the agent to the log; then the agent waits."""


# From the worker.
class Load(NamedTuple):
    settings: Settings


class Execute(NamedTuple):
    number: int
    agent: str
    run: Run


class Credit(NamedTuple):
    """So many more events may come."""

    number: int
    events: int


class Close(NamedTuple):
    """Nothing of the run is wanted any more: its agent is to be closed."""

    number: int


class Result(NamedTuple):
    """Of a Call. `error` is what it raised."""

    number: int
    call: int
    value: Any
    error: str | None


class Ping(NamedTuple):
    """Whether the process' event loop turns."""


# From the process. Their fields are numbers and texts, nothing that an agent has made (frames.py).
class Ready(NamedTuple):
    agents: tuple[str, ...]


class Misfit(NamedTuple):
    """The agents cannot be loaded."""

    reason: str


class Begun(NamedTuple):
    """The agent begins now. What is closed before it has begun never does."""

    number: int


class Yielded(NamedTuple):
    """`data` is JSON."""

    number: int
    type: str
    data: str


class Saved(NamedTuple):
    """A checkpoint. `state` is JSON."""

    number: int
    state: str


class Ended(NamedTuple):
    """The run's terminal event; nothing follows."""

    number: int
    type: str
    data: str


class Closed(NamedTuple):
    """The agent has been closed; the number is free."""

    number: int


class Call(NamedTuple):
    """Asks the worker for something that only it can do for the run. `arguments` are a JSON array."""

    number: int
    call: int
    name: str
    arguments: str


class Pong(NamedTuple):
    pass


UPWARD = (Ready, Misfit, Begun, Yielded, Saved, Ended, Closed, Call, Pong)
