"""P2, P3, P7, P8, P9, P11, P12, P23: storms of random faults; `python -m tests.chaos` lets them pass for hours."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.chaos.storm import ALL, CLIENTS, LOSSES, PROCESSES, REDIS, Fault, folder_of, storm
from tests.conftest import Launcher
from tests.kit.scale import scaled


@pytest.mark.parametrize(
    "faults", [PROCESSES + CLIENTS, REDIS + PROCESSES, LOSSES, ALL], ids=["processes", "redis", "losses", "all"]
)
async def test_after_a_storm_all_readers_agree_with_the_log(faults: Sequence[Fault], tmp_path: Path) -> None:
    for _ in range(scaled(10)):
        seed = random.randrange(2**32)
        print(f"seed {seed}")
        launch = Launcher(folder_of(tmp_path, seed))
        try:
            report = await storm(launch, faults, seed)
        finally:
            launch.close()
        print(report)
        assert report.sound, report
