"""Signals that end a training: the first asks it to save and stop, the next one ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_hydra.processes import end_with_parent

EXIT_CODE = os.EX_TEMPFAIL  # 75: try again later
"""Of a training that was stopped and goes on when its command is given again."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_RESTARTS = ("RESTART_COUNT", "MAX_RESTARTS")
# A scheduler, `timeout` and torchrun each hand on the same signal.
SECONDS_OF_ONE_STOP = 2.0
_SECONDS_FOR_AN_ORPHAN = 300.0


class Stops:
    """The signals that have come; a thread takes them, however busy the main thread is.

    Python runs a handler between two steps of the main thread, which may wait for other ranks for
    ever; a byte in a pipe, by `signal.set_wakeup_fd`, comes at once. Libraries that set handlers
    of their own do not change that.

    Args:
        say: Called with one sentence about what a signal leads to.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.name = ""
        """Of the first signal."""
        self._first = 0.0
        self._is_stepping = self._is_over = False
        self._lock = threading.Lock()

    def is_asked(self) -> bool:
        """Whether to stop at the end of this step. Once asked, a signal ends nothing by itself."""
        with self._lock:
            self._is_stepping = True
            return bool(self.name)

    def end(self) -> None:
        """Take no notice of signals any more: all is done, and what is left is to say so."""
        with self._lock:
            self._is_over = True

    def take(self, number: int) -> None:
        """Act on one signal; on the thread."""
        with self._lock:
            now = time.monotonic()
            is_again = bool(self.name) and now - self._first > SECONDS_OF_ONE_STOP
            if self._is_over or (self.name and not is_again):
                return
            if is_again:
                os._exit(128 + number)
            self.name, self._first = signal.Signals(number).name, now
            if self._is_stepping:
                self.say(f"{self.name}: saving after this step; a second signal ends at once")
                return
            self.say(
                f"{self.name} before a step was finished: nothing was saved; the same command "
                "begins again where this one began"
            )
            keep_from_restarting(self.name)
            os._exit(EXIT_CODE)


@contextmanager
def listening(say: Callable[[str], None]) -> Iterator[Stops]:
    """Take the signals that end a training, inside the block; on the main thread alone.

    A process whose launcher has ended, see :func:`end_with_launcher`, ends for certain some minutes
    after the signal.

    Args:
        say: As for :class:`Stops`.
    """
    stops = Stops(say)
    if threading.current_thread() is not threading.main_thread():
        yield stops
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    parent = os.getppid()
    thread = threading.Thread(target=_take_all, args=(stops, reader, parent), daemon=True)
    thread.start()
    earlier_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    earlier = {
        number: signal.signal(number, _leave_to_the_thread)
        for number in SIGNALS
        # `nohup` has it ignored; the others a launcher ignores for itself alone.
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    }
    # A process that torch forks to load data shares the pipe: it must not answer for its parent.
    os.register_at_fork(after_in_child=_forget)
    try:
        yield stops
    finally:
        stops.end()
        signal.set_wakeup_fd(earlier_fd)
        if not stops.name:  # else the process ends, and launchers may hurry it: its code must stand
            for number, handler in earlier.items():
                signal.signal(number, handler)
        os.close(writer)  # ends the thread


def keep_from_restarting(name: str) -> None:
    """Have torchrun end, where it would start ranks that have stopped anew (`--max-restarts`).

    Args:
        name: Of the signal that has come; other signals than SIGUSR1 torchrun has had itself, and
            a second one would disturb its end. Empty: another rank has had it.
    """
    restarts = [os.environ.get(f"TORCHELASTIC_{number}", "0") for number in _RESTARTS]
    if restarts[0] != restarts[1] and name in ("", "SIGUSR1"):
        os.kill(os.getppid(), signal.SIGTERM)


def end_with_launcher() -> None:
    """End with torchrun, if that has started this process; see `processes.end_with_parent`."""
    if "LOCAL_RANK" in os.environ:
        end_with_parent(os.getppid())


def _leave_to_the_thread(*_: object) -> None: ...


def _take_all(stops: Stops, reader: int, parent: int) -> None:
    while numbers := os.read(reader, 1):
        number = numbers[0]
        if number not in SIGNALS:
            continue
        if os.getppid() != parent:
            # The ranks of this machine end together; those of others may wait for it for ever.
            end = threading.Timer(_SECONDS_FOR_AN_ORPHAN, os._exit, [128 + number])
            end.daemon = True
            end.start()
        stops.take(number)
    os.close(reader)


def _forget() -> None:
    """In a forked process: SIGTERM ends it; Ctrl-C, which all processes get, is its parent's."""
    if signal.getsignal(signal.SIGTERM) is not _leave_to_the_thread:
        return
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
