"""Several devices and processes train as one device does."""

import csv
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from subquad.lra import checkpoints, parallel, tasks, train
from subquad.lra.plan import plan

SIZES = {"train": 64, "validation": 16, "test": 20}
TASK = tasks.Task(
    "bits", "own", "drawn bits", vocabulary_size=3, length=12, num_classes=2, splits=SIZES,
    floors=lambda splits: {"majority": 0.5}, source="this test",
)  # fmt: skip


def examples(size, seed):
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(1, 3, rng.integers(4, 13)) for _ in range(size))
    return [{"inputs": bits, "label": int(bits.sum() % 2)} for bits in drawn]


def fit(out, **words):
    # Sixteen examples in two parts, so that eight devices hold one example of each part.
    small = dict(in_features=16, num_layers=1, mlp_features=16, batch_size=16, accumulate=2, steps=12, evaluate_every=6)
    run = plan("quickstart", "softmax", task=TASK, ema=0.5, schedule="plateau", **small)
    splits = {name: examples(size, seed) for seed, (name, size) in enumerate(SIZES.items())}
    return train.train(run, out=out, task=TASK, splits=splits, quiet=True, **words)


def draws(count):
    """What each of `count` devices draws, in a place of its own."""
    mesh = parallel.make_mesh(count, count)
    drawn = parallel.over_batch(lambda _, fixed, key, batch: (jax.random.uniform(key) * batch["pick"].sum(0), ()), mesh)
    pick = parallel.shard_batch({"pick": np.eye(count, dtype=np.float32)}, mesh)
    return np.asarray(jax.jit(drawn)(None, None, jax.random.key(0), pick)[0]).tolist()


def child(out, start, after, words, at=6):
    """What the processes that this file starts do: they stop after the checkpoint of a step."""
    parallel.start(**start)
    shares, place, save = [], parallel.place, checkpoints.Checkpoints.save

    def measured(tree, mesh, *shard):
        tree = place(tree, mesh, *shard)
        if "optimiser" in tree:
            held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
            shares.append(held / sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
        return tree

    def save_once(self, step, *rest):
        save(self, step, *rest)
        if step == at:
            raise checkpoints.RunError("stopped")

    parallel.place = measured
    checkpoints.Checkpoints.save = save_once
    with pytest.raises(checkpoints.RunError, match="^stopped$"):
        fit(out, **words)
    checkpoints.Checkpoints.save = save
    result = fit(out, resume=True, **after)
    print(json.dumps([result.accuracy_last, result.hardware, shares[0], draws(jax.device_count())]))


def begin(out, start=(), count=1, after=(), at=6, **words):
    """A process of its own with `count` devices, which stops at the checkpoint of step `at` and resumes with `after`."""
    flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={count}"
    given = f"{str(out)!r}, {dict(start)}, {dict(after)}, {words}, {at}"
    code = f"from math import inf; from tests.lra import test_parallel; test_parallel.child({given})"
    root = pathlib.Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root,
        env={**os.environ, "XLA_FLAGS": flags},
    )  # fmt: skip


def finish(process):
    said, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return json.loads(said.splitlines()[-1])


def history(folder):
    with (folder / "history.csv").open(newline="") as file:
        return [[float(cell or "nan") for cell in row.values()] for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, fit(folder).accuracy_last


def test_eight_devices_hold_an_eighth_and_they_and_two_give_the_losses_of_one(alone, tmp_path):
    accuracy, hardware, share, drawn = finish(begin(tmp_path, count=8, devices=8, shard="zero", after=dict(devices=2)))
    np.testing.assert_allclose(history(tmp_path), history(alone[0]), atol=1e-5)
    assert accuracy == alone[1] and hardware.endswith("as 2 devices")
    assert share < 0.2
    assert len(set(drawn)) == 8 and 0 < min(drawn) and max(drawn) < 1  # dropout is another on every device


def test_two_processes_stopped_and_resumed_give_the_losses_of_one(alone, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    start = dict(coordinator=coordinator, num_processes=2)
    # Step 10 is no validation: they save there because the clock of one of them says so.
    minutes = ("inf", "0")
    both = [
        begin(tmp_path, {**start, "process_id": index}, at=10, checkpoint_minutes=float(minutes[index])) for index in range(2)
    ]
    for process in both:
        accuracy, hardware, share, _ = finish(process)
        assert accuracy == alone[1] and hardware.endswith("as 2 devices of 2 processes") and share == 1
    np.testing.assert_allclose(history(tmp_path), history(alone[0]), atol=1e-5)
    assert (tmp_path / "checkpoint" / "12").is_dir()


@pytest.mark.parametrize(
    "devices,batch_size,accumulate,said",
    [
        (2, 16, 1, "devices must be in 1..1, the cpu devices there are, got 2. On a CPU, XLA_FLAGS="),
        (0, 16, 1, "devices must be in 1..1"),
    ],
)
def test_devices_that_are_not_there_are_refused(devices, batch_size, accumulate, said):
    with pytest.raises(ValueError, match=said):
        parallel.make_mesh(devices, batch_size, accumulate)


def test_devices_that_do_not_divide_the_batch_are_refused(monkeypatch):
    monkeypatch.setattr(parallel.jax, "device_count", lambda: 8)
    with pytest.raises(ValueError, match=r"devices must divide batch_size = 16 / accumulate = 4, got 8. Choose .*1, 2, 4"):
        parallel.make_mesh(8, 16, 4)
    with pytest.raises(ValueError, match="shard must be a known word, got 'zeor'. Did you mean 'zero'"):
        parallel.check_shard("zeor", None)
    with pytest.raises(ValueError, match="shard must be 'batch' on one device, got 'zero'. Pass devices"):
        parallel.check_shard("zero", parallel.make_mesh(None, 16))
    monkeypatch.setattr(parallel.jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="devices must be all 8 of the 2 processes, got 4. Leave it out"):
        parallel.make_mesh(4, 16)


@pytest.mark.parametrize(
    "given,said",
    [
        (("localhost:1", 2, None), "process_id must be given together with"),
        (("localhost", 2, 0), "coordinator must be host:port, as 10.0.0.1:1234, got 'localhost'"),
        (("localhost:1", 2, 2), r"process_id must be in 0..1, got 2"),
        (("localhost:1", 0, 0), r"num_processes must be >= 1, got 0"),
    ],
)
def test_a_command_that_cannot_be_joined_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        parallel.start(*given)


def test_a_coordinator_that_does_not_answer_is_one_line(monkeypatch):
    def silent(**words):
        raise RuntimeError("DEADLINE_EXCEEDED: nobody\nthere")

    monkeypatch.setattr(parallel, "PATIENCE", 0.1)
    monkeypatch.setattr(parallel.jax.distributed, "initialize", silent)
    with pytest.raises(checkpoints.RunError, match=r"coordinator must be reached within 0.1 s, got localhost:9, .*Check"):
        parallel.start("localhost:9", 2, 1)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(checkpoints.RunError, match=f"coordinator must have a free port, got localhost:{port}, "):
            parallel.start(f"localhost:{port}", 2, 0)
        with pytest.raises(checkpoints.RunError, match="processes must find each other .* got DEADLINE_EXCEEDED: nobody there"):
            parallel.start(f"localhost:{port}", 2, 1)


def test_an_error_of_the_first_process_is_told_to_all(monkeypatch):
    monkeypatch.setattr(parallel.jax, "process_count", lambda: 2)
    monkeypatch.setattr(parallel.multihost_utils, "broadcast_one_to_all", lambda tree: tree)
    assert parallel.broadcast_from_first(lambda: ("folder", {"status": "ok"})) == ["folder", {"status": "ok"}]

    def fail():
        raise checkpoints.RunError("out: folder x must be writable.")

    with pytest.raises(checkpoints.RunError, match="^out: folder x must be writable.$"):
        parallel.broadcast_from_first(fail)


def test_tasks_of_a_slurm_step_are_joined_and_a_lone_one_is_not(monkeypatch):
    asked = []
    monkeypatch.setattr(parallel.jax.distributed, "initialize", lambda **words: asked.append(words))
    for count in ("1", "4"):
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", count)
        parallel.start()
    assert asked == [{"initialization_timeout": parallel.PATIENCE}]
