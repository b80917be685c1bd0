"""An executable model of the run protocol: no Redis, no clock, no chance inside.

A schedule is a list of steps; each is one atomic script, one message, one fault, or a wait, so any schedule can be
played again and shortened. Modelled are submitters, workers, two reapers, gateways with their hubs, readers that come
and go, and four servers (records and logs, idempotency keys, the index of leases, the queue), each of which can fall
back to an earlier state while its clock jumps and its connections break. Requests and replies get lost or come late.

`scripts.py` has the scripts and the servers, `model.py` the processes (each part a module of its own), `judge.py` what
must hold, `explore.py` random schedules, `planted.py` the rules that are dropped one by one to see that the judge
notices. Each rule is one of docs/protocol.md: who changes one there changes it here first.

Not modelled: two primaries that serve at once, caps, `max_run_seconds`, `cancel_if_unwatched`, cursors that are counts,
several shards, `durability=replicated`, memory that is full, and that what is kept is let go after a time.
"""
