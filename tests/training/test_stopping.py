"""Signals that end a run: what the first one says, and a second one whatever the process is waiting for."""

import ctypes
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from processes import forked

import wmtp.training.stopping
from wmtp.errors import clear_errors
from wmtp.training.stopping import StopFlag, stopping

STUCK_FOR = 60  # seconds, then SIGALRM ends what SIGTERM did not


def wait_in_c():
    """Where Python runs no handler: for a mutex that nobody gives back."""
    signal.alarm(STUCK_FOR)
    wmtp.training.stopping._SECONDS_ONE_SIGNAL = 0.1
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)

    def signal_again_and_again():
        while ctypes.c_int.from_buffer(mutex).value != 2:  # glibc's word for: somebody waits
            time.sleep(0.01)
        while True:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)

    with clear_errors(), stopping():
        threading.Thread(target=signal_again_and_again, daemon=True).start()
        libc.pthread_mutex_lock(mutex)


def test_a_second_signal_ends_a_process_that_waits_in_c():
    assert forked(wait_in_c) == (-signal.SIGTERM, "")


def ignore_ctrl_c():
    """As a shell starts what runs in the background."""
    signal.alarm(STUCK_FOR)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wmtp.training.stopping._SECONDS_ONE_SIGNAL = 0.01
    masks = lambda name: int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0], 16)
    with clear_errors(), stopping():
        flag = StopFlag()
        assert not flag.wanted()
        os.kill(os.getpid(), signal.SIGTERM)
        while masks("SigCgt") & 1 << signal.SIGTERM - 1:
            time.sleep(0.01)
        assert flag.wanted()
        assert masks("SigIgn") & 1 << signal.SIGINT - 1
        os.kill(os.getpid(), signal.SIGINT)


def test_what_is_ignored_stays_ignored_after_the_first_signal():
    status, said = forked(ignore_ctrl_c)
    assert status == 0 and "SIGTERM: stopping after this step" in said


def stop_at_once(number, **options):
    signal.signal(number, signal.default_int_handler)
    with clear_errors(), stopping(**options):
        os.kill(os.getpid(), number)
        time.sleep(STUCK_FOR)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_recipe_that_cannot_go_on_does_not_advise_it(number):
    line = f"stopped by {number.name}"
    assert forked(lambda: stop_at_once(number, resumes=False)) == (128 + number, f"{line}\n")
    status, said = forked(stop_at_once, number)
    assert status == 75 and said == f"{line}; to go on from what is saved: the same command with resume=auto\n"


def test_signals_of_a_forked_child_are_not_its_parents():
    with stopping():
        assert forked(lambda: os.kill(os.getpid(), signal.SIGTERM))[0] == 99  # Stopped, to the interpreter's own hook
        assert signal.set_wakeup_fd(-1) >= 0
