"""Random schedules: how they are made, played and shortened."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from tests.model.closing import RETENTION_MS
from tests.model.judge import Violation
from tests.model.model import World
from tests.model.processes import Mode, Step
from tests.model.rules import Rule

MODES: Sequence[Mode] = ("ok",) * 8 + ("lost reply", "lost reply", "lost request", "late")
SERVERS = ("runs", "runs", "runs", "keys", "index", "queue")
WAITS = (300, 1000, 1000, 5000, 16_000, 16_000, RETENTION_MS)
BEGIN: list[Step] = [("submit",), *[("submitter", 0, "ok")] * 4, ("connect", 0, 0), ("connect", 1, 1)]

CREATED_AGAIN: list[Step] = [
    *[("submit",)] * 2,
    *[("submitter", 0, "ok"), ("submitter", 1, "ok")] * 2,
    *[("submitter", 0, "ok")] * 2,
    *[("worker", 0, 0, 0, 0, "ok")] * 2,
    ("fail_over", "runs", 30, 0),
    ("wait", 5000),
    *[("submitter", 0, "ok")] * 2,
    *[("worker", 1, 0, 0, 0, "ok")] * 2,
]
"""Two submit the same; the record and its claim are lost, and who comes second makes the record again."""
CLAIMED_AGAIN: list[Step] = [
    *BEGIN,
    ("fail_over", "runs", 0, -2000),
    *[("worker", 0, 0, 0, 0, "ok")] * 2,
    ("fail_over", "runs", 1, -2000),
    ("fail_over", "queue", 1, 0),
    *[("worker", 1, 0, 0, 0, "ok")] * 2,
]
"""A claim and the taking of its job are lost, and the clock goes back."""

Make = Callable[[random.Random, Callable[[], Mode], bool], Step]
"""Makes a step of: chance, how calls fare, whether clocks jump."""

STEPS: dict[str, tuple[float, Make]] = {
    "worker": (
        34,
        lambda chance, mode, _: (
            "worker",
            chance.randrange(3),
            chance.choice((0, 1, 1, 1, 2)),
            int(chance.random() < 0.35),
            int(chance.random() < 0.08),
            mode(),
        ),
    ),
    "reap": (10, lambda chance, mode, _: ("reap", chance.randrange(2), chance.randrange(2), mode())),
    "wait": (5, lambda chance, *_: ("wait", chance.choice(WAITS))),
    "deliver": (8, lambda chance, *_: ("deliver", chance.randrange(2), chance.choice((1, 1, 2, 9)))),
    "pump": (8, lambda chance, *_: ("pump", chance.randrange(2))),
    "beat": (3, lambda chance, *_: ("beat", chance.randrange(2))),
    "connect": (3, lambda chance, *_: ("connect", chance.randrange(2), chance.randrange(2))),
    "cut": (2, lambda chance, *_: ("cut", chance.randrange(2))),
    "submitter": (4, lambda chance, mode, _: ("submitter", chance.randrange(4), mode())),
    "submit": (1.5, lambda *_: ("submit",)),
    "scan": (1.5, lambda *_: ("scan",)),
    "send_again": (2, lambda chance, mode, _: ("send_again", chance.randrange(4), mode())),
    "replicate": (1.5, lambda chance, *_: ("replicate", chance.choice(SERVERS))),
    "drain": (1.5, lambda chance, *_: ("drain", chance.randrange(3))),
    "expire": (1.0, lambda *_: ("expire",)),
    # Faults.
    "lose_message": (2, lambda chance, *_: ("lose_message", chance.randrange(2))),
    "worker_dies": (2, lambda chance, *_: ("worker_dies", chance.randrange(3))),
    "submitter_dies": (1, lambda *_: ("submitter_dies", 0)),
    "reaper_dies": (0.5, lambda chance, *_: ("reaper_dies", chance.randrange(2))),
    "gateway_dies": (0.5, lambda chance, *_: ("gateway_dies", chance.randrange(2))),
    "arrive": (1.5, lambda chance, *_: ("arrive", chance.randrange(3))),
    "trim": (1.5, lambda chance, *_: ("trim", chance.randrange(3))),
    "cancel": (1.5, lambda chance, mode, _: ("cancel", chance.randrange(2), mode())),
    "erase": (0.5, lambda chance, mode, _: ("erase", 0, mode())),
    "fail_over": (
        4,
        lambda chance, _, jumps: (
            "fail_over",
            chance.choice(SERVERS),
            chance.choice((1, 2, 3, 5, 9, 30)),
            chance.choice((0, 0, -2000, 2000, -700)) if jumps else 0,
        ),
    ),
}


def _next_attempt(chance: random.Random, mode: Callable[[], Mode], _: bool) -> list[Step]:
    """A lease expires, and another worker takes the run."""
    reaper, worker = chance.randrange(2), chance.randrange(3)
    reaps: list[Step] = [("reap", reaper, 0, "ok")] * 3
    works: list[Step] = [("worker", worker, 1, int(chance.random() < 0.5), 0, mode()) for _ in range(3)]
    return [("wait", 16_000), *reaps, *works]


def _write_and_fail_over(chance: random.Random, mode: Callable[[], Mode], jumps: bool) -> list[Step]:
    """What was just written, and read, is lost."""
    written, gateway, reader = chance.randrange(1, 5), chance.randrange(2), chance.randrange(2)
    works: list[Step] = [
        ("worker", chance.randrange(3), 1, int(chance.random() < 0.3), int(chance.random() < 0.2), "ok")
        for _ in range(written)
    ]
    reads: list[Step] = [("connect", reader, gateway), *[("pump", gateway)] * written, ("deliver", reader, 9)]
    lost = ("fail_over", "runs", chance.randrange(1, written + 4), chance.choice((0, -2000, 2000)) if jumps else 0)
    return [*works, *reads, lost, *([("wait", 5000)] if chance.random() < 0.5 else [])]


def _two_owners(chance: random.Random, mode: Callable[[], Mode], jumps: bool) -> list[Step]:
    """A claim is lost, its worker lives, and so does the one before it, which may even end the run."""
    old, new, reaper, reader = *chance.sample(range(3), 2), chance.randrange(2), chance.randrange(2)
    fenced: list[Step] = [("worker", old, 1, 1, 0, "ok"), ("wait", 16_000), *[("reap", reaper, 0, "ok")] * 2]
    claimed: list[Step] = [("worker", new, 0, 0, 0, "ok")] * chance.choice((2, 2, 3))
    read: list[Step] = [("beat", 0), ("connect", reader, 0), ("deliver", reader, 9), ("cut", reader)]
    lost = ("fail_over", "runs", chance.choice((1, 2, 3)), chance.choice((0, -2000, 2000)) if jumps else 0)
    written: list[Step] = [
        (
            "worker",
            chance.choice((old, old, new)),
            chance.randrange(2),
            chance.randrange(2),
            int(chance.random() < 0.1),
            mode(),
        )
        for _ in range(chance.randrange(3, 7))
    ]
    return [*fenced, *claimed, *read, lost, *written, ("worker", new, 1, 0, 0, "ok")]


def _three_owners(chance: random.Random, mode: Callable[[], Mode], _: bool) -> list[Step]:
    """Two claims are lost, one after the other, and the first owner wrote on before each."""
    first, *others = chance.sample(range(3), 3)
    steps: list[Step] = []
    for other in others:
        steps += [("worker", first, 1, 1, 0, "ok")] * chance.choice((1, 2))
        steps += [("wait", 16_000), ("reap", 0, 0, "ok"), ("reap", 0, 0, "ok")]
        steps += [*[("worker", other, 0, 0, 0, "ok")] * 2, ("fail_over", "runs", 2, 0)]
    return steps + [("worker", other, 1, 0, 0, mode()) for other in others for _ in range(3)]


def _late_copy(chance: random.Random, *_: object) -> list[Step]:
    """A batch is slow, so it is sent again, and another after it; then the first one comes."""
    worker = chance.randrange(3)
    batch, empty = ("worker", worker, 1, 1, 0), ("worker", worker, 0, 0, 0)
    return [(*batch, "late"), (*empty, "ok"), (*batch, "ok"), ("arrive", 0)]


def _come_back(chance: random.Random, *_: object) -> list[Step]:
    """A reader reads a little, and comes back to another gateway."""
    reader = chance.randrange(2)
    return [("deliver", reader, 1), ("cut", reader), ("connect", reader, chance.randrange(2)), ("deliver", reader, 2)]


def _submit_what_expired(chance: random.Random, *_: object) -> list[Step]:
    return [("wait", RETENTION_MS), ("expire",), ("submit",), *[("submitter", 0, "ok")] * chance.randrange(2, 6)]


SCENES: Sequence[Callable[[random.Random, Callable[[], Mode], bool], list[Step]]] = (
    _next_attempt,
    _write_and_fail_over,
    _two_owners,
    _three_owners,
    _late_copy,
    _come_back,
    _submit_what_expired,
)
"""Steps in a row that single ones would rarely make."""
FAULTY = (_write_and_fail_over, _two_owners, _three_owners, _late_copy)
RARE = {"trim": 0.3, "erase": 0.2, "expire": 0.2, "cancel": 0.5, "submit": 0.6, "replicate": 0.6, "gateway_dies": 0.5}
"""Steps that many schedules do without, and the share of those that have them."""
CALM = frozenset(
    {"lose_message", "worker_dies", "submitter_dies", "reaper_dies", "gateway_dies", "arrive", "fail_over"}
)
"""What a schedule without faults does not have."""


def schedule(chance: random.Random, spared: str = "") -> list[Step]:
    """Each leaves out some kinds of steps and has others more often: so rare mixtures come up too. The server `spared`
    never fails over.
    """
    faults, jumps = chance.random() < 0.85, chance.random() < 0.6
    weights = {
        name: weight * chance.choice((0.3, 1, 1, 1, 3))
        for name, (weight, _) in STEPS.items()
        if chance.random() < RARE.get(name, 1) and (faults or name not in CALM)
    }

    def mode() -> Mode:
        return chance.choice(MODES) if faults else "ok"

    begins = (BEGIN, BEGIN[:1], CREATED_AGAIN, CLAIMED_AGAIN) if faults else (BEGIN,)
    steps = list(chance.choices(begins, (75, 15, 5, 5)[: len(begins)])[0])
    if chance.random() < 0.6:
        steps.append(("replicate", "runs"))
    if chance.random() < 0.1:
        steps.append(("nobody_reads",))
    scenes = [scene for scene in SCENES if chance.random() < 0.6 and (faults or scene not in FAULTY)]
    names = chance.choices(list(weights), list(weights.values()), k=chance.choice((25, 50, 90)))
    for name in names:
        if scenes and chance.random() < 0.08:
            steps += chance.choice(scenes)(chance, mode, jumps)
        steps.append(STEPS[name][1](chance, mode, jumps))
    return [step for step in steps if step[:2] != ("fail_over", spared)]


def play(steps: Sequence[Step], dropped: Collection[Rule] = ()) -> Violation | None:
    world = World(dropped)
    try:
        for step in steps:
            world.step(step)
        world.settle()
    except Violation as violation:
        return violation
    return None


class Found(NamedTuple):
    seed: int
    steps: list[Step]
    violation: Violation

    def __str__(self) -> str:
        return "\n".join([f"seed {self.seed}: {self.violation}", *map(repr, self.steps)])


def explore(seeds: range, dropped: Collection[Rule] = (), spared: str = "") -> Found | None:
    """Plays a schedule for each seed until one violates something."""
    for seed in seeds:
        steps = schedule(random.Random(seed), spared)
        violation = play(steps, dropped)
        if violation is not None:
            return Found(seed, steps, violation)
    return None


def shortened(found: Found, dropped: Collection[Rule] = ()) -> Found:
    """A schedule with fewer steps that violates the same."""
    steps, violation = found.steps, found.violation
    size = max(1, len(steps) // 2)
    while size:
        at, shorter = 0, False
        while at < len(steps):
            fewer = steps[:at] + steps[at + size :]
            again = play(fewer, dropped)
            if again is not None and again.kind == violation.kind:
                steps, violation, shorter = fewer, again, True
            else:
                at += size
        size = size // 2 if size > 1 else int(shorter)
    return Found(found.seed, steps, violation)
