"""P11: a power cut takes the end of the append-only file, at any byte. What was confirmed since is mended or told."""

from __future__ import annotations

import asyncio
import random
from functools import partial

import pytest

from tests.chaos.loss import BULKY, CHATTING, TURNS, Stage, errors_of
from tests.conftest import Launcher


@pytest.mark.parametrize("turn", TURNS)
async def test_after_a_power_cut_all_readers_the_poll_and_the_log_agree(launch: Launcher, turn: int) -> None:
    server = launch.redis()
    stage = Stage(launch, server.url, random.randrange(2**32))
    async with stage.load(CHATTING, BULKY):
        await stage.until_under_way()
        written = server.aof.stat().st_size
        await stage.cancel_and_erase_for(stage.chance.uniform(0.2, 1.8))
        cut = stage.chance.randint(1, server.aof.stat().st_size - written)
        await stage.lose(f"{cut} bytes cut", partial(asyncio.to_thread, server.restart, cut=cut))
        judgement = await stage.judge()
    print(judgement)
    assert not judgement.violations
    assert not errors_of([*stage.gateways, *stage.workers])
    assert judgement.lost_anything or cut < 10_000
