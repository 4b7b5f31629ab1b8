"""A script's command, run in the process of the tests: a new one takes seconds to import what is there already."""

import contextlib
import io
import os
import pathlib
import runpy
import signal
import subprocess
import sys
from unittest import mock

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"


def call(name: str, *words) -> subprocess.CompletedProcess:
    """`scripts/name.py words`, as `subprocess.run` gives it: exit code, and what was said on stdout and stderr."""
    command = [str(SCRIPTS / f"{name}.py"), *map(str, words)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    patched = mock.patch.object(sys, "argv", command), mock.patch.dict(os.environ)
    with patched[0], patched[1], contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
            if isinstance(code, str):
                print(code, file=err)
                code = 1
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())
