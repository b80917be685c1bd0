"""The rules that the model can drop, one by one, to show that it notices (planted.py)."""

from __future__ import annotations

from enum import StrEnum


class Rule(StrEnum):
    """Each says its number in PROTOCOL.

    Two are missing, since the model does not notice their loss: an append is fenced by another token of its own epoch
    (no epoch is used twice), and a heartbeat puts a run back into the index (the scan does it too, later).
    """

    EPOCH_BASE = "1.3 an epoch is at least the milliseconds since the key was claimed"
    CLAIMED_AT = "1.3 those milliseconds count from the key's claim, not from the record's creation"
    FENCED_EPOCH = "2 an append is fenced by a later epoch"
    DUP = "2 what is there already is a success, also on a closed run"
    CLOSED = "2 nothing is appended after a terminal"
    LOST = "2 an epoch does not go on where the log ends below what it stands on"
    LOST_VOID = "2 an epoch does not take over where another has voided what it stands on"
    GAP = "2 a hole is not written"
    STALE = "3.3 nothing is created from a key that was claimed long ago"
    QUEUED_ONLY = "4.1 only a queued run is claimed"
    NEXT_ATTEMPT = "4.1 a run is claimed for the attempt of its job"
    INDEX_FIRST = "4.2 the index is written before the record"
    SCAN = "4.2 reapers scan all records"
    FORGET_LATE = "4.2 an ended run leaves the index only after 120 s"
    REQUEUE = "4.3 a queued run whose job is gone is enqueued again"
    HAND_OVER_IS_FREE = "4.4 a hand-over does not count as a loss"
    SETTLED = "4.6 nobody opens an epoch just after a failover"
    PATIENCE = "4.7 nothing is fenced for one lease after a failover"
    OWN_EPOCH = "5.1 a cancel opens an epoch of its own"
    KEEP = "5.2 closings are kept and sent again"
    KEEP_ERASURE = "5.2 and so are erasures"
    CLOSE_ANEW = "5.2 a closing that does not fit any more is made anew"
    TOMBSTONE = "5.4 an erasure leaves a tombstone"
    CHECKPOINT_IN_TAIL = "5.7 a checkpoint is sent again with its tail"
    CHECKPOINT_RISES = "5.7 a batch that comes late does not set the checkpoint back"
    CHECKPOINT_NOT_VOID = "5.7 what takes the record over drops a checkpoint that it voids"
    RESUME = "1.4 the entry of an attempt says from where its agent goes on"
    PREV = "6.1 a message must follow the ring's end"
    BEAT = "6.2 each heartbeat reads the log's end"
    EMPTY_PAGE = "6.3 an empty page is not the end"
    CURSOR_LOST = "6.5 a cursor beyond the end is lost in the end"
    KNOWN_EPOCH = "6.5 a cursor goes on only where the log has its epoch"
    LOST_ID = "6.5 the frame that tells a loss has the id 0-0"
    STRICT_204 = "6.5 204 only if the cursor is the terminal's id"
