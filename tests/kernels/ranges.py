"""Which 32-bit integers of a kernel may overflow: interval arithmetic on its source as Triton has it (TTIR)."""

import re

# What an index that is read from memory is below, in size: a position in the sequence.
LONGEST = 1 << 20
INT32 = -(1 << 31), (1 << 31) - 1

_DEFINITION = re.compile(r"%(\S+?)(?::\d+)? = (?:arith|tt)\.(\w+) (.*)")
_LOOP = re.compile(r"scf\.for %(\S+) = %(\S+) to %(\S+) step")
_CONSTANT = re.compile(r"(?:dense<)?(-?\d+)>? :")
_MADE = re.compile(r"\{end = (\d+) : i32, start = (\d+) : i32\}")
_ARGUMENT = re.compile(r"%([^\s:=,()]+)(?: =|:)")  # of a loop or of a reduction: known from outside, by another name
_NARROW = re.compile(r"(?:\bi32|xi32>)(?: loc\(.*)?$")
_SHAPES = ("splat", "broadcast", "expand_dims", "reshape", "trans")
_SAME = ("extsi", "extui", "trunci", *_SHAPES)


def overflows(code: str, programs: int) -> tuple[str, ...]:
    """The lines that compute a 32-bit integer which may need more bits.

    Args:
        code: of one kernel.
        programs: how many are launched.
    """
    ranges, sums, found = {}, {}, []
    for line in map(str.strip, code.splitlines()):
        if loop := _LOOP.search(line):
            index, first, end = (ranges.get(name, (-LONGEST, LONGEST)) for name in loop.groups())
            for name in _ARGUMENT.findall(line.partition("iter_args")[2]):
                ranges.pop(name, None)
            ranges[loop[1]] = first[0], max(end[1] - 1, first[0])
            continue
        if line.startswith("^"):
            for name in _ARGUMENT.findall(line):
                ranges.pop(name, None)
        if not (definition := _DEFINITION.match(line)):
            continue
        name, operation, rest = definition.groups()
        ranges.pop(name, None)  # another region's
        operands = re.findall(r"%([^\s,:]+)", rest)
        known = [ranges.get(x, (-LONGEST, LONGEST)) for x in operands]
        sums[name], difference = _sum(operation, operands, known, sums)
        if (interval := difference or _interval(operation, known, rest, programs)) is None:
            continue
        if _NARROW.search(line) and not INT32[0] <= interval[0] <= interval[1] <= INT32[1]:
            found.append(re.sub(r" loc\(.*", "", line))
            continue
        ranges[name] = interval
    return tuple(found)


def _sum(operation: str, operands: list[str], known: list[tuple[int, int]], sums: dict):
    """A result as (a scalar, the range of what was added to it) or None; and the range of a difference of two such sums.

    What is read from the start of a block is `start + offset - start`.
    """
    parts = [sums.get(x) for x in operands]
    if operation == "splat":
        return (operands[0], (0, 0)), None
    if operation in _SHAPES:
        return parts[0], None
    if operation == "addi" and any(parts):
        (scalar, a), b = (parts[0], known[1]) if parts[0] else (parts[1], known[0])
        return (scalar, (a[0] + b[0], a[1] + b[1])), None
    if operation == "subi" and all(parts) and parts[0][0] == parts[1][0]:
        (_, a), (_, b) = parts
        return None, (a[0] - b[1], a[1] - b[0])
    return None, None


def _interval(operation: str, known: list[tuple[int, int]], rest: str, programs: int) -> tuple[int, int] | None:
    """(least, most) of a result; None where nothing is known of it."""
    if operation == "constant":
        value = _CONSTANT.match(rest)
        return value and (int(value[1]), int(value[1]))
    if operation == "make_range":
        end, start = map(int, _MADE.search(rest).groups())
        return start, end - 1
    if operation == "get_program_id":
        return 0, programs - 1
    if operation in _SAME:
        return known[0]
    if operation == "select":
        a, b = known[1:]
        return min(a[0], b[0]), max(a[1], b[1])
    if operation not in ("addi", "subi", "muli", "divsi", "remsi", "minsi", "maxsi"):
        return None
    a, b = known
    if operation == "addi":
        return a[0] + b[0], a[1] + b[1]
    if operation == "subi":
        return a[0] - b[1], a[1] - b[0]
    if operation == "muli":
        corners = [x * y for x in a for y in b]
        return min(corners), max(corners)
    if operation == "minsi":
        return min(a[0], b[0]), min(a[1], b[1])
    if operation == "maxsi":
        return max(a[0], b[0]), max(a[1], b[1])
    if b[0] <= 0:
        return None
    if operation == "divsi":  # towards 0
        corners = [abs(x) // y * (1 if x >= 0 else -1) for x in a for y in b]
        return min(corners), max(corners)
    return max(min(a[0], 0), 1 - b[1]), min(max(a[1], 0), b[1] - 1)
