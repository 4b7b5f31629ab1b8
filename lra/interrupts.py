"""Ctrl-C and SIGTERM: one line and an exit code instead of a trace, also while a command's libraries load, for seconds.

SIGTERM is what a scheduler sends that takes a machine back. Exit codes are those of shells, 128 + the signal: 130 and 143.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception that what handles Ctrl-C handles."""

    number = signal.SIGTERM


def exit_during_startup(program: str) -> None:
    """Until `startup_done` both signals end the process at once. A script calls it before it imports anything else.

    A signal that is ignored, as Ctrl-C in a shell's background job, stays ignored.
    """

    def end(number, frame):
        os.write(2, f"{program}: Interrupted before it began.\n".encode())
        os._exit(128 + number)

    end.during_startup = True
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is usual:
            signal.signal(number, end)


def startup_done() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt again, and SIGTERM `Terminated`."""

    def end(number, frame):
        raise Terminated

    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, end)):
        if hasattr(signal.getsignal(number), "during_startup"):
            signal.signal(number, handler)


class StopRequest(threading.Event):
    """Set by a signal, whose number it keeps."""

    number = signal.SIGINT


@contextlib.contextmanager
def stop_request(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """An event that Ctrl-C and SIGTERM set; `say` gets one line then. In another than the main thread none of them does.

    A second Ctrl-C stops at once, as Python does. A second SIGTERM changes nothing: schedulers send several, and then SIGKILL.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handler(number, frame):
        if number == signal.SIGINT:
            signal.signal(number, before[number])
        if not stop.is_set():
            stop.number = number
            stop.set()
            say("Stopping after this step, to save the checkpoint; Ctrl-C again stops without.")

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, usual in before.items():
            signal.signal(number, signal.SIG_DFL if usual is None else usual)  # None: it was not set from Python
