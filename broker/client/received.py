"""Events as a client receives them: typed as far as this version knows them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from broker.events import NATIVE, TERMINAL, Event
from broker.ids import EventId

_TYPES = {event.type: event for event in NATIVE}


class Unknown(Event):
    """An event of a newer broker: of a type that this version does not know, or with a value that it does not know."""

    type = "unknown"
    name: str
    """Its type, as the broker names it."""
    data: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Received:
    """One event of a run's log."""

    id: EventId
    """Also the cursor: `after=` this id, a stream goes on with what follows. `str(id)` is its text."""
    type: str
    data: dict[str, Any]
    """All that came, fields that this version does not know too."""
    event: Event
    """One of the classes of broker.events, or Unknown."""

    @property
    def terminal(self) -> bool:
        """Whether nothing follows it."""
        return self.type in TERMINAL


def typed(event_type: str, data: dict[str, Any]) -> Event:
    """The event of a type and its data; fields that its class does not have are left out."""
    cls = _TYPES.get(event_type)
    if cls is not None:
        try:
            return cls.model_validate({name: data[name] for name in cls.model_fields if name in data})
        except ValidationError:
            pass
    return Unknown(name=event_type, data=data)


def received(event_id: str, event_type: str, text: str) -> Received:
    """From the parts of a frame. Raises ValueError or BadCursor where they cannot be an event's."""
    data = json.loads(text)
    if not isinstance(data, dict):
        raise ValueError("the data of an event is a JSON object")
    return Received(id=EventId.parse(event_id), type=event_type, data=data, event=typed(event_type, data))
