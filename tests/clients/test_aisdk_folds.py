"""What AI SDK makes of the streams of any runs is what the model of it (tests/kit/ui_stream.py) makes of them."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.events import Entry
from broker.gateway.dialects.aisdk.fold import AiSdk
from tests.clients.conftest import NodeOf
from tests.kit import folds
from tests.kit.logs import REQUEST_ID, logs
from tests.kit.scale import scaled
from tests.kit.ui_stream import chunks_of, message_of

LOGS = st.one_of(logs(ended=True), logs(ended=True, repeating=True))


@pytest.mark.parametrize(("package", "reset_step"), [("ai5", False), ("ai6", False), ("ai7", False), ("ai7", True)])
def test_every_run_is_the_same_message_in_the_client_and_in_the_model_of_it(
    node_of: NodeOf, package: str, reset_step: bool
) -> None:
    node = node_of("aisdk.mjs", package)

    @settings(max_examples=scaled(300))
    @given(LOGS)
    def compare(log: list[Entry]) -> None:
        body = folds.body_of(AiSdk(REQUEST_ID, reset_step=reset_step), log)
        expected = message_of(chunks_of(body))
        made = node.call("make", body=base64.b64encode(body).decode())
        assert made["errors"] == ([expected.error] if expected.error is not None else [])
        assert made["id"] == expected.id
        parts = [part for part in made["parts"] if part["type"] != "step-start"]
        wanted = [(tool_or(part.kind), part.value) for part in expected.parts]
        assert in_javascript([shown(part) for part in parts]) == in_javascript(wanted)
        assert all(part.get("state") != "streaming" for part in parts)

    compare()


def in_javascript(value: Any) -> Any:
    """There a whole number is a double, so that 2**53 + 1 is 2**53."""
    return json.loads(json.dumps(value), parse_int=float)


def tool_or(kind: str) -> str:
    """Without the tool's name: where a call is made again under its id, ai 5 keeps the name, and later ones do not."""
    return "tool" if kind.startswith("tool-") else kind


def shown(part: dict[str, Any]) -> tuple[str, Any]:
    """As the model has it."""
    kind = part["type"]
    if kind in ("text", "reasoning"):
        return kind, part["text"]
    if kind == "source-url":
        return kind, part["url"]
    if kind.startswith("data-"):
        return kind, part["data"]
    names = {"output-available": ("output", "output"), "output-error": ("error", "errorText")}
    call = {"id": part["toolCallId"], "input": part["input"]}
    if part["state"] in names:
        name, field = names[part["state"]]
        call[name] = part[field]
    return tool_or(kind), call
