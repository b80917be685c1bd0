"""P2, P3, P7, P8, P9, P11, P12, P23: storms of random faults; `python -m tests.chaos` lets them pass for hours."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.chaos.pair_site import LOSSES, REDIS, PairSite
from tests.chaos.site import Fault
from tests.chaos.storm import CLIENTS, PROCESSES, folder_of, storm
from tests.kit.scale import scaled

ALL: tuple[Fault[PairSite], ...] = (*PROCESSES, *REDIS, *LOSSES, *CLIENTS)


@pytest.mark.parametrize(
    "faults",
    [(*PROCESSES, *CLIENTS), (*REDIS, *PROCESSES), LOSSES, ALL],
    ids=["processes", "redis", "losses", "all"],
)
async def test_after_a_storm_all_readers_agree_with_the_log(faults: Sequence[Fault[PairSite]], tmp_path: Path) -> None:
    for _ in range(scaled(10)):
        seed = random.randrange(2**32)
        print(f"seed {seed}")
        async with PairSite(folder_of(tmp_path, seed), random.Random(seed).choice(["fast", "replicated"])) as site:
            report = await storm(site, faults, seed)
        print(report)
        assert report.sound, report
