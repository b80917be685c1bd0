"""Does what it is told with an unmodified `openai` package, of whichever version is on the path.

On stdin comes a line of JSON for each call: {"id", "call", …}. On stdout go {"id", "seen"} for each event, and at last
{"id", "value"} or {"id", "error"}. Calls run at the same time. It needs nothing but `openai`.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import openai

Tell = Callable[[Any], None]
TRANSPORT: Any = importlib.import_module(openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0])
"""The library that it has for HTTP: not the same one in each version."""
_writing = threading.Lock()


def say(**line: Any) -> None:
    with _writing:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


def client(url: str, token: str, lose: int = 0, options: dict[str, Any] | None = None) -> openai.OpenAI:
    """`lose`: so many answers get lost on their way to the client."""
    left = [None] * lose

    def losing(response: Any) -> None:
        if left:
            left.pop()
            response.close()
            raise TRANSPORT.ReadError("lost", request=response.request)

    http = openai.DefaultHttpxClient(verify=False, timeout=60, event_hooks={"response": [losing]})
    return openai.OpenAI(base_url=f"{url}/v1", api_key=token, http_client=http, **(options or {}))


def heard(events: Iterable[Any], tell: Tell) -> None:
    for event in events:
        tell(plain(event))


def plain(model: Any) -> Any:
    """Without the warnings of the SDK's own models about each other."""
    return model.model_dump(mode="json", exclude_unset=True, warnings=False)


def whole(response: Any) -> Any:
    return {**plain(response), "output_text": response.output_text}


def version(tell: Tell, **how: Any) -> Any:
    return openai.__version__


def create(tell: Tell, body: dict[str, Any], **how: Any) -> Any:
    return whole(client(**how).responses.create(**body))


def stream(tell: Tell, body: dict[str, Any], **how: Any) -> None:
    heard(client(**how).responses.create(**body, stream=True), tell)


def retrieve(tell: Tell, response: str, **how: Any) -> Any:
    return whole(client(**how).responses.retrieve(response))


def poll(tell: Tell, response: str, **how: Any) -> Any:
    """Until it has ended."""
    asking = client(**how)
    while (found := asking.responses.retrieve(response)).status in ("queued", "in_progress"):
        tell(found.status)
        time.sleep(0.05)
    return whole(found)


def resume(tell: Tell, response: str, after: int | None, **how: Any) -> None:
    given: dict[str, Any] = {} if after is None else {"starting_after": after}
    heard(client(**how).responses.retrieve(response, stream=True, **given), tell)


def cancel(tell: Tell, response: str, **how: Any) -> Any:
    return whole(client(**how).responses.cancel(response))


def delete(tell: Tell, response: str, **how: Any) -> None:
    client(**how).responses.delete(response)


def items(tell: Tell, response: str, **how: Any) -> Any:
    return [plain(item) for item in client(**how).responses.input_items.list(response)]


def models(tell: Tell, **how: Any) -> Any:
    return [model.id for model in client(**how).models.list()]


def help(tell: Tell, body: dict[str, Any], **how: Any) -> Any:
    """The helper, which builds the response from its events: a new one's, or of one that is there (`response_id`)."""
    with client(**how).responses.stream(**body) as events:
        heard(events, tell)
        return whole(events.get_final_response())


CALLS: dict[str, Callable[..., Any]] = {
    made.__name__: made
    for made in (version, create, stream, retrieve, poll, resume, cancel, delete, items, models, help)
}


def serve(id: int, call: str, **arguments: Any) -> None:
    try:
        say(id=id, value=CALLS[call](lambda seen: say(id=id, seen=seen), **arguments))
    except Exception as error:
        facts = {name: getattr(error, name, None) for name in ("code", "param", "type")}
        kinds = [kind.__name__ for kind in type(error).__mro__]
        status = getattr(error, "status_code", None)
        say(id=id, error={"class": kinds[0], "kinds": kinds, "message": str(error), "status": status, **facts})


def main() -> None:
    for line in sys.stdin:
        threading.Thread(target=serve, kwargs=json.loads(line), daemon=True).start()


if __name__ == "__main__":
    main()
