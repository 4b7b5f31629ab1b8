"""Energy of a call: a counter of the machine where it has one, else stated power times time; CO2e and price by stated rates.

    joules = counter after - counter before,    or watts x seconds, marked "estimated"
"""

import importlib
import os
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

POWERCAP = pathlib.Path("/sys/class/powercap")
LEAST_CALLS = 3


class Meter(NamedTuple):
    """A counter of energy: what it counts, in words, and a function that reads the joules so far."""

    source: str
    read: Callable[[], float]


def meter(device, powercap: pathlib.Path = POWERCAP) -> tuple[Meter | None, str]:
    """The meter of a device, and why there is none.

    A GPU's is NVIDIA's NVML (package nvidia-ml-py), of the whole board. A CPU's is Linux's RAPL, of all packages and
    their memory, which only the superuser may read on most systems. Both count idle power and what other programs do.

    Args:
        device: a `jax.Device`.
        powercap: the folder of RAPL's counters.
    """
    try:
        found = _nvml(device) if device.platform == "gpu" else _rapl(powercap)
        found.read()  # refused by boards before Volta, and to all but the superuser
        return found, ""
    except Exception as error:  # a library that is absent, a driver that does not know the counter, a file not to be read
        return None, f"{type(error).__name__}: {error}".strip()


def _nvml(device) -> Meter:
    nvml = importlib.import_module("pynvml")
    nvml.nvmlInit()
    visible = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    name = visible[device.local_hardware_id] if visible else str(device.local_hardware_id)
    handle = nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)
    return Meter("NVML, the whole board, idle power included", lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)


def _rapl(powercap: pathlib.Path) -> Meter:
    # A package holds its cores and its graphics, but not its memory; psys holds the packages again.
    zones = [z for z in powercap.glob("intel-rapl:*") if re.match(r"package-\d+$|dram$", (z / "name").read_text().strip())]
    if not zones:
        raise FileNotFoundError(f"no RAPL counters in {powercap}")
    joules = lambda: sum(int((zone / "energy_uj").read_text()) for zone in zones) / 1e6
    return Meter("RAPL, all packages, idle power included", joules)


def per_call(
    call: Callable[[], Any], counter: Meter, seconds: float = 2.0, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Joules of one call: calls are made for so many seconds, three at least, between two readings of the counter.

    NVML's counter moves about ten times a second, so that a shorter time would be read wrong by more than a tenth.

    Raises: ValueError: the counter started again at 0 meanwhile, as RAPL's does every hour or so.
    """
    began, before, calls = clock(), counter.read(), 0
    while calls < LEAST_CALLS or clock() - began < seconds:
        call()
        calls += 1
    spent = counter.read() - before
    if spent < 0:
        raise ValueError("the counter started again at 0 meanwhile")
    return spent / calls


def cost(
    seconds: float, joules: float | None, source: str | None, *, watts: float | None = None,
    grid_intensity: float | None = None, price_per_hour: float | None = None, currency: str = "USD",
) -> dict[str, float | str]:  # fmt: skip
    """What a call of `seconds` costs beside time, as columns of a row: each number with what it rests on.

    Args:
        joules, source: as a meter measured them; None: estimated from `watts`, where that is given.
        watts: power of the whole machine or device.
        grid_intensity: grams of CO2 equivalent per kilowatt-hour. None: not computed.
        price_per_hour: of the machine, in `currency`. None: not computed.
    Example:
        >>> cost(2.0, None, None, watts=350.0)
        {'energy_joules': 700.0, 'energy_source': 'estimated from 350 W'}
    """
    found: dict[str, float | str] = {}
    if joules is None and watts is not None:
        joules, source = watts * seconds, f"estimated from {watts:g} W"
    if joules is not None:
        found |= dict(energy_joules=joules, energy_source=source)
        if grid_intensity is not None:
            grams = joules / 3.6e6 * grid_intensity
            found |= dict(co2e_grams=grams, co2e_assumption=f"{grid_intensity:g} g CO2e per kWh")
    if price_per_hour is not None:
        found |= dict(price=seconds / 3600 * price_per_hour, price_assumption=f"{price_per_hour:g} {currency} per hour")
    return found
