"""Several devices and several processes: the batch is sharded over them, the training state too if wanted.

Every process runs the same command. `start` makes them know each other; process 0 alone writes results.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from subquad.kernels.dispatch import nearest
from subquad.lra.files import RunError, explained, one_line, refuse

# The mesh's only axis: examples of a batch, and with "zero" a part of every large array of the training state.
AXIS = "data"
# What a training state holds for each row of a batch, under this name, lies where the row does.
BY_ROW = "carried"
Shard = Literal["batch", "zero"]
# Seconds for all processes to find the coordinator.
PATIENCE = 300


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the processes of one command into one. Call it before anything is computed.

    Without arguments: what `srun` started as several tasks of one step is joined, any other process stays alone.

    Args:
        coordinator: "host:port" of process 0, which listens there.
        num_processes: how many there are.
        process_id: which one this is, 0..num_processes-1.
    Raises:
        ValueError: some of the three without the others, or one out of its range.
        RunError: the coordinator's port is taken, or was not reached within `PATIENCE`.
    """
    given = dict(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            _join()
        return
    if missing:
        refuse(f"start: {missing[0]}", "be given together with the others of coordinator, num_processes and process_id", None,
               "Pass all three, or none under SLURM.")
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdigit()):
        refuse("start: coordinator", "be host:port, as 10.0.0.1:1234", repr(coordinator), "It is that of process 0.")
    if num_processes < 1:
        refuse("start: num_processes", "be >= 1", num_processes, "Count process 0, too.")
    if not 0 <= process_id < num_processes:
        refuse("start: process_id", f"be in 0..{num_processes - 1}", process_id, "Number them from 0.")
    if num_processes > 1:
        _check_coordinator(host.strip("[]"), int(port), listens=process_id == 0)
        _join(coordinator_address=coordinator, num_processes=num_processes, process_id=process_id)


def _check_coordinator(host: str, port: int, listens: bool) -> None:
    """Checks first that the coordinator answers: XLA's own failure ends the process with a stack trace."""
    ends = time.monotonic() + PATIENCE
    while True:
        try:
            if listens:
                socket.create_server(("", port)).close()
            else:
                socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if listens or time.monotonic() > ends:
                wanted = "have a free port" if listens else f"be reached within {PATIENCE} s"
                raise RunError(
                    f"start: coordinator must {wanted}, got {host}:{port}, {one_line(error)}. Check the address, the port, and "
                    "that process 0 was started on that host."
                ) from error
        time.sleep(0.2)


def _join(**words) -> None:
    what, cure = "start: processes must find each other before anything is computed", "Check that all of them were started."
    with explained(what, cure, RuntimeError):
        jax.distributed.initialize(**words, initialization_timeout=PATIENCE)


def is_first() -> bool:
    """Whether this process writes results and speaks."""
    return jax.process_index() == 0


def make_mesh(devices: int | None, batch_size: int, accumulate: int = 1) -> Mesh | None:
    """The devices that share a batch, or None for one device.

    Args:
        devices: how many; None takes one in a single process, and all of them in several.
        batch_size, accumulate: the devices must divide the examples of each part of a batch.
    Raises: ValueError: more devices than there are, fewer than all in several processes, or no divisor.
    """
    several = jax.process_count() > 1
    known = jax.device_count()
    count = (known if several else 1) if devices is None else devices
    if not 1 <= count <= known:
        refuse("train: devices", f"be in 1..{known}, the {jax.default_backend()} devices there are", count,
               "On a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight.")
    if several and count != known:
        refuse("train: devices", f"be all {known} of the {jax.process_count()} processes", count,
               "Leave it out, or start fewer processes.")
    if batch_size % (count * accumulate):
        fitting = [number for number in range(1, known + 1) if batch_size % (number * accumulate) == 0]
        parts = f" / accumulate = {accumulate}" if accumulate > 1 else ""
        refuse("train: devices", f"divide batch_size = {batch_size}{parts}", count,
               f"Choose one of {fitting}, or a batch_size that is a multiple of {count * accumulate}.")
    return None if count == 1 else Mesh(np.array(jax.devices()[:count]), (AXIS,))


def check_shard(shard: str, mesh: Mesh | None) -> None:
    """Raises: ValueError: `shard` is no known word, or would do nothing."""
    if shard not in get_args(Shard):
        raise ValueError(f"train: shard must be a known word, got {shard!r}. {nearest(shard, get_args(Shard))}")
    if shard == "zero" and mesh is None:
        raise ValueError("train: shard must be 'batch' on one device, got 'zero'. Pass devices, 2 or more.")


def shardings(tree: Any, mesh: Mesh | None, shard: Shard = "batch") -> Any:
    """The sharding of each array of a training state: with "zero" along its longest axis that the devices divide.

    With "batch", and where no axis can be divided, every device holds the whole array, but its rows alone of what is of rows.
    None without a mesh.
    """
    if mesh is None:
        return None

    def place(path, leaf):
        if jax.tree_util.DictKey(BY_ROW) in path:
            return NamedSharding(mesh, PartitionSpec(AXIS))
        axes = [axis for axis, size in enumerate(leaf.shape) if size and size % mesh.size == 0]
        if shard == "batch" or not axes:
            return NamedSharding(mesh, PartitionSpec())
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, AXIS))

    return jax.tree_util.tree_map_with_path(place, tree)


def place(tree: Any, mesh: Mesh | None, shard: Shard = "batch") -> Any:
    """Puts a training state on the devices by `shardings`; every process has the same whole state."""
    if mesh is None:
        return tree

    def put(leaf, sharding):
        if leaf.sharding == sharding:
            return leaf
        if jax.process_count() == 1 or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            return jax.device_put(leaf, sharding)
        here = np.asarray(leaf)
        return jax.make_array_from_callback(here.shape, sharding, lambda index: here[index])

    return jax.tree.map(put, tree, shardings(tree, mesh, shard))


def shard_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Puts each device's rows of a batch, a tree of arrays, on it.

    All processes have drawn the whole batch, and each puts its own part.
    """
    if mesh is None:
        return batch
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))

    def put(array):
        share = len(array) // jax.process_count()
        mine = array[jax.process_index() * share : (jax.process_index() + 1) * share]
        return jax.make_array_from_process_local_data(sharding, mine, array.shape)

    return jax.tree.map(put, batch)


def over_batch(function: Callable, mesh: Mesh | None) -> Callable:
    """`function(parameters, fixed, key, batch)` -> (sums over rows, what is of rows), on all devices.

    Each has its own rows of the batch. Sums are added up; what is of rows is joined.

    Every device runs the function on whole arrays of its own, so kernels work as on one device, and their sizes are
    those of the smaller batch. The key is another on every device: noise depends on how many there are.
    """
    if mesh is None:
        return function

    def local(parameters, fixed, key, batch):
        key = None if key is None else jax.random.fold_in(key, jax.lax.axis_index(AXIS))
        sums, of_rows = function(parameters, fixed, key, batch)
        return jax.lax.psum(sums, AXIS), of_rows

    whole = PartitionSpec()
    specs = (whole, whole, whole, PartitionSpec(AXIS))
    # Unchecked: kernels start their scans from plain zeros, which the check takes for another type than their carries.
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(whole, specs[-1]), check_vma=False)


def gathered(array: jax.Array) -> np.ndarray:
    """All rows of an array of which each device has some. All processes must call this."""
    return np.asarray(array if jax.process_count() == 1 else multihost_utils.process_allgather(array, tiled=True))


def compile(function: Callable, arguments: tuple, mesh: Mesh | None, shard: Shard = "batch", **words) -> Any:
    """`jax.jit(function, **words)`, compiled for these arguments; its results are sharded by `shardings`."""
    if mesh is not None:
        words["out_shardings"] = shardings(jax.eval_shape(function, *arguments), mesh, shard)
    return jax.jit(function, **words).lower(*arguments).compile()


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process. All processes must call this."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def broadcast_from_first(function: Callable[[], Any]) -> Any:
    """Calls a function in process 0 alone. All processes return its result, plain data, or raise its RunError."""
    if jax.process_count() == 1:
        return function()
    answer = {}
    if is_first():
        try:
            answer = {"result": function()}
        except RunError as error:
            answer = {"error": str(error)}
    text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(text), np.int32)))
    answer = json.loads(bytes(multihost_utils.broadcast_one_to_all(np.resize(text, size))))
    if "error" in answer:
        raise RunError(answer["error"])
    return answer["result"]


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Process 0 runs the block before the others enter it: they find the files that it made there."""
    if not is_first():
        multihost_utils.sync_global_devices("first")
    try:
        yield
    finally:
        if is_first() and jax.process_count() > 1:
            multihost_utils.sync_global_devices("first")
