"""P11: a failover that loses what was confirmed ends in a repaired log, or in a new attempt with its rewind; never in
two clients with different truths."""

from __future__ import annotations

import random

import pytest

from tests.chaos.loss import BULKY, CHATTING, TURNS, Stage, errors_of
from tests.conftest import Launcher


@pytest.mark.parametrize("turn", TURNS)
async def test_after_a_failover_that_lost_entries_all_readers_the_poll_and_the_log_agree(
    launch: Launcher, turn: int
) -> None:
    pair = launch.pair()
    stage = Stage(launch, pair.url, random.randrange(2**32))
    async with stage.load(CHATTING, BULKY):
        await stage.until_under_way()
        pair.link.pause()
        await stage.cancel_and_erase_for(stage.chance.uniform(0.2, 1.8))
        await stage.lose("failover", pair.fail_over)
        await pair.rejoin()
        judgement = await stage.judge()
    print(judgement)
    assert not judgement.violations
    assert not errors_of([*stage.gateways, *stage.workers])
    assert judgement.lost_anything
