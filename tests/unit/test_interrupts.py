"""Ctrl-C interrupts waiting, never the printing of an event."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from broker.cli import interrupts as module
from broker.cli.interrupts import Interrupts


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_waiting_is_interrupted() -> None:
    with Interrupts(), pytest.raises(KeyboardInterrupt):
        ctrl_c()
        time.sleep(1000)


def test_what_is_held_ends_first() -> None:
    done = []
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        with interrupts.held():
            ctrl_c()
            time.sleep(0.01)
            done.append("printed")
        done.append("too late")
    assert done == ["printed"]


def test_a_second_one_interrupts_also_what_is_held() -> None:
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt), interrupts.held():
        ctrl_c()
        ctrl_c()
        time.sleep(1000)


def test_an_error_in_what_is_held_is_not_lost_behind_ctrl_c() -> None:
    with Interrupts() as interrupts, pytest.raises(ValueError, match="mine"), interrupts.held():
        ctrl_c()
        time.sleep(0.01)
        raise ValueError("mine")


def test_afterwards_the_handler_is_the_one_that_was_there() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts():
            ctrl_c()
            time.sleep(0.01)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def interrupted(interrupts: Interrupts) -> None:
    with pytest.raises(KeyboardInterrupt):
        ctrl_c()
        time.sleep(1000)


def test_a_second_ctrl_c_counts_within_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECOND_SECONDS", 1000)
    with Interrupts() as interrupts:
        interrupted(interrupts)
        timer = threading.Timer(0.05, ctrl_c)
        timer.start()
        assert interrupts.again()
        timer.join()


def test_without_a_second_ctrl_c_there_was_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECOND_SECONDS", 0.01)
    with Interrupts() as interrupts:
        interrupted(interrupts)
        assert not interrupts.again()


def test_a_second_ctrl_c_that_comes_early_breaks_nothing_off_and_counts() -> None:
    with Interrupts() as interrupts:
        interrupted(interrupts)
        ctrl_c()
        with interrupts.held():
            ctrl_c()
        assert interrupts.again()


def test_the_one_after_the_second_interrupts_again() -> None:
    with Interrupts() as interrupts:
        interrupted(interrupts)
        ctrl_c()
        assert interrupts.again()
        interrupted(interrupts)
