"""Who has the floor: what branches of a graph say at once is told one message after the other."""

from __future__ import annotations

from collections.abc import Iterator

from worker.agents.foreign.telling import BETWEEN_ANSWERS


class Floor:
    """The text of one attempt. A task, of which a node is one execution, is named as the graph does:
    `node:id`, below those of the graphs around it, parted by `|`.
    """

    def __init__(self) -> None:
        self._task: str | None = None
        """Whose message is being told."""
        self._held: dict[str, list[tuple[str, str]]] = {}
        """What others have said meanwhile: texts, with their messages' ids."""
        self._over: set[str] = set()
        """Those of them whose message is whole."""
        self._last = ""
        self._begun: set[str] = set()
        """The ids of messages of which the first piece has been told: it is parted from what was before."""

    @property
    def used(self) -> bool:
        """Whether something has been told."""
        return bool(self._last)

    def say(self, task: str, id: str, text: str) -> Iterator[str]:
        """What may be told of it now. `id` is the message's, or empty."""
        self._over.discard(task)
        if self._task in (None, task):
            self._task = task
            yield self._told(id, text)
        else:
            self._held.setdefault(task, []).append((id, text))

    def end(self, task: str) -> Iterator[str]:
        """The task's message is whole: the next one has the floor."""
        if task != self._task:
            self._over.add(task)
            return
        self._task = None
        while self._held and self._task is None:
            task = next(iter(self._held))
            for id, text in self._held.pop(task):
                yield self._told(id, text)
            if task not in self._over:
                self._task = task

    def end_all(self, graph: tuple[str, ...] = ()) -> Iterator[str]:
        """No task of this graph is under way, whether it has told its message's end or not."""
        begins = "".join(f"{part}|" for part in graph)
        self._over.update(task for task in self._held if task.startswith(begins))
        if self._task is not None and self._task.startswith(begins):
            yield from self.end(self._task)

    def _told(self, id: str, text: str) -> str:
        parted = self._last and self._last != id and id not in self._begun
        self._last = id or "nobody"
        self._begun.add(id)
        return BETWEEN_ANSWERS + text if parted else text
