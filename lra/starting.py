"""Ctrl-C while a command's libraries load, which takes seconds: one line and an exit code instead of a trace."""

import os
import signal

INTERRUPTED = 130


def begin(program: str) -> None:
    """Until `done` Ctrl-C ends the process at once. A script calls it before it imports anything else.

    Where Ctrl-C is ignored, as in a shell's background job, it stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return

    def end(number, frame):
        os.write(2, f"{program}: Interrupted before it began.\n".encode())
        os._exit(INTERRUPTED)

    end.of_begin = True
    signal.signal(signal.SIGINT, end)


def done() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt again."""
    if hasattr(signal.getsignal(signal.SIGINT), "of_begin"):
        signal.signal(signal.SIGINT, signal.default_int_handler)
