"""Submitters (PROTOCOL 3)."""

from __future__ import annotations

from broker.runs.scripts import Answer
from tests.model.core import Core
from tests.model.processes import Job, KeyClaim, Mode, Submitter
from tests.model.rules import Rule
from tests.model.scripts import LIVE


class Submitting(Core):
    """A submit is four calls; each can be repeated, by whoever comes next."""

    def step_submit(self) -> None:
        if len(self.submitters) < 4:
            self.submitters.append(Submitter())

    def step_submitter(self, n: int, mode: Mode) -> None:
        if self.submitters:
            submitter = self.submitters[n % len(self.submitters)]
            if submitter.state in ("claim", "claim anew"):
                self._claim_key(submitter, mode)
            elif submitter.state == "index":
                self._write_index(submitter, mode)
            elif submitter.state == "create":
                self._create(submitter, mode)
            else:
                self._submit_job(submitter, mode)

    def _claim_key(self, submitter: Submitter, mode: Mode) -> None:
        self.now += 1
        replace = submitter.claim if submitter.state == "claim anew" else None
        if mode in ("lost request", "late"):
            return
        held = self.keys.state.get("key")
        if held is None or held == replace:
            held = KeyClaim(f"run {self.unique()}", self.now + self.keys.clock_offset)
            self.keys.put("key", held)
        if mode == "ok":
            submitter.claim = held
            submitter.state = "create" if Rule.INDEX_FIRST in self.dropped else "index"

    def _write_index(self, submitter: Submitter, mode: Mode) -> None:
        self.now += 1
        assert submitter.claim is not None
        if mode in ("ok", "lost reply"):
            self.index.put(submitter.claim.request_id, self.index_time + 2000)
        if mode == "ok":
            submitter.state = "enqueue" if Rule.INDEX_FIRST in self.dropped else "create"

    def _create(self, submitter: Submitter, mode: Mode) -> None:
        assert submitter.claim is not None
        request_id, claimed_at = submitter.claim
        reply = self.call(mode, self.runs, lambda: self.scripts.create(request_id, claimed_at))
        if reply is None:
            return
        if reply.answer is Answer.STALE or reply.status not in LIVE:
            submitter.state = "claim anew"
        else:
            submitter.state = "index" if Rule.INDEX_FIRST in self.dropped else "enqueue"

    def _submit_job(self, submitter: Submitter, mode: Mode) -> None:
        assert submitter.claim is not None
        request_id = submitter.claim.request_id
        if self.enqueue(mode, Job(request_id, 1, 0)):
            self.submitters.remove(submitter)
            for reader in self.readers:
                reader.request_id = reader.request_id or request_id

    def step_submitter_dies(self, n: int) -> None:
        if self.submitters:
            self.submitters.pop(n % len(self.submitters))
