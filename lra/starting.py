"""Ctrl-C and SIGTERM: one line and an exit code instead of a trace, even while a command's libraries load, for seconds.

SIGTERM is what a scheduler sends that takes a machine back. Exit codes are those of shells, 128 + the signal: 130 and 143.
"""

import os
import signal

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception that what handles Ctrl-C handles."""

    number = signal.SIGTERM


def interruption(number: int) -> KeyboardInterrupt:
    """The exception of SIGINT or SIGTERM."""
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


def begin(program: str) -> None:
    """Until `done` both signals end the process at once. A script calls it before it imports anything else.

    A signal that is ignored, as Ctrl-C in a shell's background job, stays ignored.
    """

    def end(number, frame):
        os.write(2, f"{program}: Interrupted before it began.\n".encode())
        os._exit(128 + number)

    end.of_begin = True
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is usual:
            signal.signal(number, end)


def done() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt again, and SIGTERM `Terminated`."""

    def end(number, frame):
        raise Terminated

    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, end)):
        if hasattr(signal.getsignal(number), "of_begin"):
            signal.signal(number, handler)
