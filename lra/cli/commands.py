"""What the commands in scripts/ share: options with one-line errors, and the way from an error to an exit code."""

import argparse
import ast
import dataclasses
import inspect
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, get_type_hints

from subquad.kernels.dispatch import nearest
from subquad.lra import interrupts
from subquad.lra.checkpoints import Interrupted
from subquad.lra.data.sources import DatasetError
from subquad.lra.files import RunError, one_line
from subquad.lra.run import known_words

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
USAGE, FAILED, INTERRUPTED, TERMINATED = 2, 1, interrupts.INTERRUPTED, interrupts.TERMINATED
BROKEN_PIPE = 128 + 13  # as a shell has it of a command that SIGPIPE ended


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest known option."""

    def __init__(self, **words):
        super().__init__(allow_abbrev=False, exit_on_error=False, **words)

    def parse_args(self, arguments=None, namespace=None):
        try:
            found, unknown = self.parse_known_args(arguments, namespace)
        except argparse.ArgumentError as error:
            self.error(" ".join(str(error).removeprefix("argument ").split()))
        if unknown:
            known = [word for action in self._actions for word in action.option_strings]
            self.error(f"option must be a known one, got {unknown[0]!r}. {nearest(unknown[0].split('=')[0], known)}")
        return found

    def error(self, message: str):
        self.exit(USAGE, f"{self.prog}: {message}\n")


def add_options(parser: Parser, record: type, leave_out: tuple[str, ...] = (), **helps: str) -> None:
    """An option for every field of a frozen dataclass: --learning-rate for learning_rate. Absent if not given.

    A field that is true or false is an option without a value: --remat, --no-remat. Others are read as Python's values, or
    else as words; whoever makes the record refuses wrong ones. Its help is that in `helps`, else what `field_descriptions`
    finds.
    """
    helps = field_descriptions(record) | helps
    for name, kind in get_type_hints(record).items():
        if name in leave_out:
            continue
        given = dict(type=value_or_none, metavar="|".join(known_words(kind)) or None)
        if kind is bool:
            given = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=helps[name], **given)


def value_or_none(text: str):
    """The value of a field's option: "none" is None."""
    return None if text.lower() == "none" else literal(text)


def literal(text: str):
    """A number, list or other literal of Python, true and false in any case; what is none is a word.

    Example:
        >>> literal("1e-3"), literal("(1, 2)"), literal("false"), literal("cosine")
        (0.001, (1, 2), False, 'cosine')
    """
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def field_descriptions(record: type) -> dict[str, str]:
    """What a dataclass's docstring says of each field under "Attributes", on one line, as argparse takes it."""
    section = inspect.getdoc(record).partition("Attributes:\n")[2]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()).replace("%", "%%") for name, text in found}


def split_words(text: str) -> list[str]:
    """Words between spaces or commas, each once.

    Example:
        >>> split_words("softmax,local softmax")
        ['softmax', 'local']
    """
    return list(dict.fromkeys(word for word in text.replace(" ", ",").split(",") if word))


class Words(argparse.Action):
    """Of an option with nargs="+": words between spaces or commas, at least one."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, split_words(" ".join(values)))
        if not getattr(namespace, self.dest):
            parser.error(f"{option_string} must name at least one, got {' '.join(values)!r}. Leave it out.")


def parse_size(text: str) -> int:
    """A count as argparse takes it: 4096, 16K or 2G."""
    unit = UNITS.get(text[-1:].upper(), 1)
    try:
        value = int(float(text[:-1]) * unit) if unit > 1 else int(text)
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a number such as 4096, 16K or 2G, got {text!r}.")
    return value


def parse_lengths(text: str) -> list[int]:
    """Several of them, with commas between, at least one."""
    found = list(dict.fromkeys(parse_size(word) for word in split_words(text)))
    if not found:
        raise argparse.ArgumentTypeError(f"must name at least one, got {text!r}. Leave it out.")
    return found


def number(kind: type, least: float, *, above: bool = False, below: float = math.inf) -> Callable:
    """The type, as argparse takes it, of a finite number that is at least `least`, or above it, and below `below`."""

    def read(text: str):
        value = kind(text)
        if not least <= value < below or (above and value == least):
            bound = "" if below == math.inf else f" and < {below}"
            raise argparse.ArgumentTypeError(f"must be {'>' if above else '>='} {least}{bound}, got {text}. Leave it out.")
        return value

    read.__name__ = kind.__name__  # argparse says it in its error
    return read


def assignments(words: list[str], name: str = "layer_options", example: str = "num_heads=4") -> dict:
    """{"num_landmarks": 32} of ["num_landmarks=32"]; the error names the option `name`, and gives an example.

    Raises: ValueError: a word without a name or "=".
    Example:
        >>> assignments(["num_landmarks=32", "sharing=none"])
        {'num_landmarks': 32, 'sharing': 'none'}
    """
    found = {}
    for word in words:
        left, equals, value = word.partition("=")
        if not equals or not left:
            raise ValueError(f"{name} must be written name=value, got {word!r}. For example {example}.")
        found[left] = literal(value)
    return found


def run(program: str, main: Callable[[], int | None]) -> NoReturn:
    """Ends the process with the exit code of `exit_code_of`; the last line of a script.

    After Ctrl-C and SIGTERM at once: a compiler that is at work does not live through the interpreter's own end.
    """
    code = exit_code_of(program, main)
    if code in (INTERRUPTED, TERMINATED):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def exit_code_of(program: str, main: Callable[[], int | None]) -> int:
    """Runs a command; what a user can cure becomes one line on stderr and an exit code.

    Returns: 0, or what `main` returns; 1 for a run, folder or data set that failed; 2 for a wrong argument; 130 for
        Ctrl-C; 143 for SIGTERM; 141 where nobody reads on what is printed.
    """
    try:
        interrupts.startup_done()
        return main() or 0
    except KeyboardInterrupt as stopped:
        code, message = 128 + getattr(stopped, "number", signal.SIGINT), "Interrupted; what was saved before is kept."
    except Interrupted as stopped:
        code, message = 128 + stopped.number, str(stopped)
    except BrokenPipeError:  # who reads what is printed, as `head` does, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's end would complain
        return BROKEN_PIPE
    except (RunError, DatasetError) as error:
        code, message = FAILED, str(error)
    except (ValueError, TypeError, NotImplementedError) as error:
        code, message = USAGE, " ".join(str(error).split())
    except ModuleNotFoundError as error:
        if (error.name or "subquad").startswith("subquad"):
            raise
        code, message = FAILED, f"package {error.name} must be installed, got none. Run pip install 'subquad[lra]'."
    except Exception as error:
        reason = memory_error(error)
        if reason is None:
            raise
        code, message = FAILED, reason
    # The function's name, where it is the command's, is said once.
    print(f"{program}: {message.removeprefix(f'{program.split()[-1]}: ')}", file=sys.stderr)
    return code


def memory_error(error: Exception) -> str | None:
    """One line for a device that ran out of memory; None for other errors."""
    if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
        cure = "Use a smaller --batch-size, or a larger --accumulate."
        return f"memory must hold the training step, got {one_line(error)}. {cure}"
    return None


def given_fields(record: type, arguments: argparse.Namespace) -> dict:
    """The values of a dataclass's fields that were given as options."""
    given = vars(arguments)
    return {one.name: given[one.name] for one in dataclasses.fields(record) if one.name in given}
