"""What an agent puts into a checkpoint, and what a later attempt gets back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from broker.events import dumps
from worker.agent import MAX_EVENT_BYTES, Checkpoint

logger = logging.getLogger(__name__)

Kind = TypeVar("Kind", bound=BaseModel)


def restored(kind: type[Kind], state: Any) -> Kind | None:
    """`run.restored` as what it was; None where there is none, or it is another version's."""
    try:
        return kind.model_validate(state) if state is not None else None
    except ValidationError:
        return None


class Saver:
    """The checkpoints of one attempt."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._too_large = False

    def checkpoint(self, state: BaseModel) -> Iterator[Checkpoint]:
        """One, or none once the conversation is too large, as it only grows: a later attempt then begins at an earlier
        one.
        """
        if self._too_large:
            return
        value = state.model_dump(mode="json")
        size = len(dumps(value))
        if size <= MAX_EVENT_BYTES:
            yield Checkpoint(state=value)
        else:
            self._too_large = True
            logger.warning(
                "a conversation is too large for a checkpoint; a later attempt would call its last tools again",
                extra={"request_id": self._request_id, "bytes": size},
            )
