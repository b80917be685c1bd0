"""Every name that the broker uses in Redis. `{rid}` is a hash tag: a run's keys live in one slot."""

from __future__ import annotations

import hashlib

from broker.ids import Owner

QUEUE = "sb:queue"
DOORBELL = "sb:doorbell"
LEASES = "sb:leases"
PRIMARIES = "sb:server"
WORKERS = "sb:workers"


def run(request_id: str) -> str:
    return f"sb:{{{request_id}}}:run"


def log(request_id: str) -> str:
    return f"sb:{{{request_id}}}:log"


def channel(request_id: str) -> str:
    """Each append is published here."""
    return f"sb:{{{request_id}}}"


def control(request_id: str) -> str:
    """What the run's worker must hear: that the run was closed or erased by somebody else."""
    return f"sb:{{{request_id}}}:control"


def beside(key: str) -> str:
    """Another key in the same slot of a Cluster."""
    return f"{key}:wait" if "{" in key else f"{{{key}}}:wait"


def request_id_of(channel_name: str) -> str:
    """The run of a `channel` or `control`."""
    return channel_name[4:36]


def worker(worker_id: str) -> str:
    """What a worker says of itself."""
    return f"sb:worker:{worker_id}"


def _digest(*parts: str) -> str:
    """Parts cannot run into each other: each goes in with its length."""
    data = b"".join(b"%d:%s" % (len(raw), raw) for raw in (part.encode("utf-8", "surrogatepass") for part in parts))
    return hashlib.sha256(data).hexdigest()


def idempotency(owner: Owner, kind: str, value: str) -> str:
    """`kind` is `key` (an Idempotency-Key) or `query` (the query's digest)."""
    return f"sb:idem:{_digest(*owner, kind, value)}"


def runs_of(owner: Owner) -> str:
    """The owner's runs by time of submission."""
    return f"sb:runs:{_digest(*owner)}"


def session_of(owner: Owner, session_id: str) -> str:
    """The same, of one session."""
    return f"sb:session:{_digest(*owner)}:{_digest(session_id)}"


def scratch(number: int) -> str:
    """In the place of a request_id: for keys that show what may be done, and are gone again at once."""
    return f"doctor-{number}"


def scratch_index(name: str) -> str:
    """A zset of the same purpose, in the slot of that name."""
    return f"sb:{{{name}}}:index"
