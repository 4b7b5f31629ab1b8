import sys
import types

import pytest

from subquad.lra.bench import energy

GPU = types.SimpleNamespace(platform="gpu", local_hardware_id=1)
CPU = types.SimpleNamespace(platform="cpu", local_hardware_id=0)


def zone(folder, name, title, joules):
    (folder / name).mkdir(parents=True)
    for file, text in (("name", title), ("energy_uj", int(1e6 * joules))):
        (folder / name / file).write_text(f"{text}\n")


def test_packages_and_memory_are_counted_once_each(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 10)
    zone(tmp_path, "intel-rapl:0:0", "core", 100)
    zone(tmp_path, "intel-rapl:0:1", "dram", 20)
    zone(tmp_path, "intel-rapl:1", "package-1", 990)
    zone(tmp_path, "intel-rapl:2", "psys", 5000)
    counters, reason = energy.meter(CPU, tmp_path)
    assert reason == "" and "RAPL" in counters.source and counters.read() == 10 + 20 + 990
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("0\n")
    with pytest.raises(ValueError, match="started again at 0"):
        energy.per_call(lambda: None, energy.Meter("a test", iter([1020.0, counters.read()]).__next__), 0.0)


def test_a_machine_without_counters_says_why(tmp_path, monkeypatch):
    counters, reason = energy.meter(CPU, tmp_path)
    assert counters is None and "no RAPL counters" in reason
    monkeypatch.setitem(sys.modules, "pynvml", None)
    counters, reason = energy.meter(GPU)
    assert counters is None and "pynvml" in reason


@pytest.mark.parametrize("visible,expected", [("", 1), ("5,3", 3), ("0,GPU-abc", "GPU-abc")])
def test_a_gpus_counter_is_that_of_the_device_that_jax_uses(visible, expected, monkeypatch):
    nvml = types.SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lambda index: index, nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 7000 if handle == expected else 0,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    counters, _ = energy.meter(GPU)
    assert counters.read() == 7.0


def test_energy_of_a_call_is_the_mean_of_many():
    joules, now = [0.0], [0.0]

    def call():
        joules[0] += 4.0
        now[0] += 0.5

    counters = energy.Meter("a test", lambda: joules[0])
    assert energy.per_call(call, counters, seconds=5.0, clock=lambda: now[0]) == 4.0
    assert now[0] == 5.0
    energy.per_call(call, counters, seconds=0.1, clock=lambda: now[0])
    assert now[0] == 5.0 + 0.5 * energy.LEAST_CALLS


def test_what_is_not_measured_is_marked_and_rests_on_stated_rates():
    found = energy.cost(3600.0, None, None, watts=500.0, grid_intensity=400.0, price_per_hour=2.5, currency="EUR")
    assert found["energy_joules"] == pytest.approx(0.5 * 3.6e6) and found["energy_source"] == "estimated from 500 W"
    assert found["co2e_grams"] == pytest.approx(200.0) and found["co2e_assumption"] == "400 g CO2e per kWh"
    assert found["price"] == pytest.approx(2.5) and found["price_assumption"] == "2.5 EUR per hour"
    measured = energy.cost(3600.0, 1.0, "NVML", watts=500.0)
    assert measured == dict(energy_joules=1.0, energy_source="NVML")
    assert energy.cost(1.0, None, None, grid_intensity=400.0) == {}
