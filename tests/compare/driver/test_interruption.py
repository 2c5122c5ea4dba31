"""Signals that end a driver."""

import os
import signal
import threading

import pytest

from stiefel.compare import cli
from stiefel.compare.driver import interruption
from stiefel.compare.driver.interruption import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in SIGNALS} == before, "handlers are given back"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_raises_or_calls_and_the_inner_one_has_it(number):
    def twice():
        with interruption.raising():
            with interruption.calling(called.append):
                os.kill(os.getpid(), number)
            assert [error.number for error in called] == [number]
            os.kill(os.getpid(), number)

    called = []
    with pytest.raises(Interrupted) as caught:
        twice()
    assert caught.value.number == number
    assert isinstance(caught.value, KeyboardInterrupt)


def test_what_the_user_has_set_is_left_alone():
    got, before = [], signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with interruption.calling(got.append):
            os.kill(os.getpid(), signal.SIGHUP)
        assert not got
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_set_no_handlers():
    def enter():
        with interruption.raising():
            found.append(signal.getsignal(signal.SIGTERM))

    found = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize(("number", "words"), [(signal.SIGINT, "Interrupted."), (signal.SIGTERM, "Ended by SIGTERM.")])
def test_the_exit_status_is_that_of_a_shell_and_a_sentence_says_what_is_kept(number, words, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_dispatch", lambda arguments: os.kill(os.getpid(), number))
    assert cli.main(["report", "x"]) == 128 + number
    assert capsys.readouterr().err.strip() == f"{words} Finished runs are kept; run the same command again to continue."
