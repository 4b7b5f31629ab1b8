"""Named calls of the selective scan."""

import jax.numpy as jnp
import numpy as np

from subquad.kernels import ssm
from subquad.kernels.specs import Spec, over_heads


def _make(segments=False, size=(2, 3), states=4):
    def make(length, dtype, rng):
        """Steps and decays as a layer makes them: a memory of one to hundreds of tokens."""
        batch, features = size
        draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
        arrays = dict(
            inputs=draw(batch, length, features),
            step=jnp.asarray(np.exp(rng.uniform(np.log(0.01), 0, (batch, length, features))), dtype),
            diagonal=-jnp.asarray(rng.uniform(0.3, states, (features, states)), jnp.float32),
            input_matrix=draw(batch, length, states),
            output_matrix=draw(batch, length, states),
            initial_state=jnp.asarray(rng.normal(size=(batch, features, states)), jnp.float32),
        )
        ids = jnp.asarray((rng.random((batch, length)) < 0.1).cumsum(1), jnp.int32)
        return arrays | dict(segment_ids=ids) if segments else arrays

    return make


def _call(arrays, implementation):
    return ssm.selective_scan(**arrays, return_state=True, implementation=implementation)


def _spec(variant, lengths, features, states, bench_states, **options):
    """`features` and `bench_states` are those of the benchmarks: a layer's."""
    bench = _make(**options, size=(1, features), states=bench_states)
    return Spec("ssm.selective_scan", variant, _make(**options, states=states), _call, bench, lengths)


SPECS = [
    _spec("state", (7, 63, 300), 1536, 4, 16),
    _spec("segments", (129,), 128, 4, 16, segments=True),
    _spec("states-64", (63,), 1536, 20, 64),
    _spec("states-128", (63,), 128, 33, 128, segments=True),
]
GRID = over_heads("ssm.selective_scan", "segments", lambda states, *rest: _make(True, (2, 100), states)(*rest), _call)
