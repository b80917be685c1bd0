"""Does with an unmodified `openai` package what a plan says, and tells what it saw, a line of JSON each.

The plan is JSON on stdin: `base_url`, `api_key`, `max_retries`, and `steps`, each with a `do` and `args` for it. In the
arguments "$id" is the id of the last response. Needs nothing but `openai`, of whichever version is on the path.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import openai


def say(**line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


class Driver:
    def __init__(self, plan: dict[str, Any]) -> None:
        self.client = openai.OpenAI(
            base_url=plan["base_url"], api_key=plan["api_key"], max_retries=plan.get("max_retries", 2), timeout=60
        )
        self.id = ""

    def step(self, do: str, args: dict[str, Any], position: Sequence[str]) -> None:
        args = {name: self.id if value == "$id" else value for name, value in args.items()}
        position = [self.id if value == "$id" else value for value in position]
        try:
            getattr(self, do)(*position, **args)
        except Exception as error:
            facts = {name: getattr(error, name, None) for name in ("status_code", "code", "param", "type")}
            kinds = [kind.__name__ for kind in type(error).__mro__]
            say(error=kinds[0], kinds=kinds, message=str(error), **facts)

    def create(self, **args: Any) -> None:
        self._tell(self.client.responses.create(**args))

    def retrieve(self, response_id: str, **args: Any) -> None:
        self._tell(self.client.responses.retrieve(response_id, **args))

    def cancel(self, response_id: str) -> None:
        self._tell(self.client.responses.cancel(response_id))

    def delete(self, response_id: str) -> None:
        self.client.responses.delete(response_id)
        say(deleted=True)

    def input_items(self, response_id: str) -> None:
        say(items=[item.to_dict() for item in self.client.responses.input_items.list(response_id)])

    def models(self) -> None:
        say(models=[model.id for model in self.client.models.list()])

    def helper(self, **args: Any) -> None:
        """`responses.stream`: its events, then what it has put together."""
        with self.client.responses.stream(**args) as stream:
            for event in stream:
                self._event(event)
            self._response(stream.get_final_response())

    def poll(self, response_id: str) -> None:
        """Until it has ended."""
        while True:
            response = self.client.responses.retrieve(response_id)
            if response.status not in ("queued", "in_progress"):
                self._response(response)
                return
            time.sleep(0.05)

    def _tell(self, told: Any) -> None:
        if isinstance(told, openai.Stream):
            for event in told:
                self._event(event)
            say(ended=True)
        else:
            self._response(told)

    def _event(self, event: Any) -> None:
        if event.type == "response.created":
            self.id = event.response.id
        say(event=event.to_dict())

    def _response(self, response: Any) -> None:
        self.id = response.id
        say(response=response.to_dict(), output_text=response.output_text)


def main() -> None:
    plan = json.load(sys.stdin)
    say(version=openai.__version__)
    driver = Driver(plan)
    for step in plan["steps"]:
        driver.step(step["do"], step.get("args", {}), step.get("position", ()))
    say(over=True)


main()
