"""Ctrl-C asks before it interrupts."""

import signal
import threading

import pytest

from graphtune.training.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(number):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    told = []
    with pytest.raises(KeyboardInterrupt), StopSignals(told.append) as stop:  # noqa: PT012
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        assert len(told) == 1 and number.name in told[0]
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second signal did nothing")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_an_ignored_signal_stays_ignored():
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGINT, former)


def test_outside_the_main_thread_handlers_stay_as_they_are():
    found = []

    def enter():
        with StopSignals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]
