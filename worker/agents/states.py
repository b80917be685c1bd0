"""What an agent has put into a checkpoint, when a later attempt gets it back."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Kind = TypeVar("Kind", bound=BaseModel)


def restored(kind: type[Kind], state: Any) -> Kind | None:
    """`run.restored` as what it was; None where there is none, or it is another version's."""
    try:
        return kind.model_validate(state) if state is not None else None
    except ValidationError:
        return None
