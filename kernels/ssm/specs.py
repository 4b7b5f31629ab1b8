"""Named calls of the state space kernels.

The systems come from what layers train, A and the logarithm of a step, so that all gradients are of one magnitude. They are
float32 whatever the dtype of the tokens, as in the layers.
"""

import jax.numpy as jnp
import numpy as np

from subquad.kernels import ssm
from subquad.kernels.specs import Spec

# One variant of each operation at many lengths, the others at few: their compilation is most of what the tests cost.
FEW = (63,)
# None of the lengths at which the tests try other dtypes of the tokens: convolution kernels are made without any.
TAPS, FEW_TAPS = (100, 1, 500), (100,)
# The recurrence is for extending: one step after the other, and a gradient that stores all states.
EXTENDED, BENCH_EXTENDED = (1, 63, 129), (256, 1024)


def _complex(rng, *shape):
    return rng.normal(size=shape) + 1j * rng.normal(size=shape)


def _modes(rng, features, pairs, is_complex=True):
    """A and steps as layers begin: memories from 10 to 1,000 tokens, and frequencies of 0, pi, 2 pi, .. over such a memory."""
    decay = -rng.uniform(0.4, 0.6, (features, pairs))
    modes = decay + 1j * np.pi * np.arange(pairs) if is_complex else decay * np.arange(1, pairs + 1)
    return dict(diagonal=modes, log_step=rng.uniform(np.log(1e-3), np.log(1e-1), features))


def _single(**arrays):
    return {name: jnp.asarray(x, jnp.complex64 if np.iscomplexobj(x) else jnp.float32) for name, x in arrays.items()}


def _tokens(rng, batch, length, features, dtype):
    return jnp.asarray(rng.normal(size=(batch, length, features)), dtype)


# The diagonal scan.


def _make_scan(size=(2, 3, 6), is_complex=True, state=False):
    def make(length, dtype, rng):
        batch, features, pairs = size
        draw = _complex if is_complex else lambda rng, *shape: rng.normal(size=shape)
        system = _modes(rng, features, pairs, is_complex)
        system |= dict(input_matrix=draw(rng, features, pairs), output_matrix=draw(rng, features, pairs))
        if state:
            system["initial_state"] = rng.normal(size=(batch, features, pairs * (2 if is_complex else 1)))
        return dict(inputs=_tokens(rng, batch, length, features, dtype), **_single(**system))

    return make


def _scan(variant, is_reversed=False, lengths=FEW, **options):
    def call(arrays, implementation):
        step, state = jnp.exp(arrays["log_step"])[:, None], arrays.get("initial_state")
        step = step.astype(arrays["diagonal"].dtype)
        system = step * arrays["diagonal"], jnp.sqrt(step) * arrays["input_matrix"], arrays["output_matrix"]
        return ssm.diagonal_scan(
            arrays["inputs"], *system, state, is_reversed=is_reversed, return_state=state is not None,
            implementation=implementation,
        )  # fmt: skip

    return Spec("ssm.diagonal_scan", variant, _make_scan(**options), call, _make_scan((1, 256, 32), **options), lengths)


# Convolution kernels. Their length is a number, so the arrays hold one of that length.


def _make_diagonal_kernel(size=(3, 6), outputs=()):
    def make(length, dtype, rng):
        system = _single(**_modes(rng, *size), coefficients=_complex(rng, *outputs, *size))
        return system | dict(taps=np.zeros(length, bool))

    return make


def _call_diagonal_kernel(arrays, implementation):
    log_decay = jnp.exp(arrays["log_step"])[:, None].astype(arrays["diagonal"].dtype) * arrays["diagonal"]
    return ssm.diagonal_kernel(log_decay, arrays["coefficients"], len(arrays["taps"]), implementation=implementation)


def _make_system(rng, features, pairs, rank, outputs=()):
    """Around HiPPO-LegS."""
    near = lambda *shape: np.sqrt(np.arange(pairs) + 0.5) * (1 + 0.1 * _complex(rng, *shape, features, pairs))
    output_matrix = _complex(rng, *outputs, features, pairs)
    return _single(**_modes(rng, features, pairs), low_rank=near(rank), input_matrix=near(), output_matrix=output_matrix)


def _system(arrays):
    """The arguments of the public functions."""
    matrices = arrays["diagonal"], arrays["low_rank"], arrays["input_matrix"], arrays["output_matrix"]
    return *matrices, jnp.exp(arrays["log_step"])


def _make_dplr_kernel(size=(3, 6), rank=1, outputs=()):
    return lambda length, dtype, rng: _make_system(rng, *size, rank, outputs) | dict(taps=np.zeros(length, bool))


def _call_dplr_kernel(arrays, implementation):
    return ssm.dplr_kernel(*_system(arrays), len(arrays["taps"]), implementation=implementation)


def _kernel(operation, variant, make, call, lengths=FEW_TAPS, **options):
    return Spec(operation, variant, make(**options), call, make((256, 32), **options), lengths, implementations=())


# The DPLR recurrence.


def _make_recurrence(size=(2, 3, 6), rank=1, state=False):
    def make(length, dtype, rng):
        batch, features, pairs = size
        arrays = _make_system(rng, features, pairs, rank) | dict(inputs=_tokens(rng, batch, length, features, dtype))
        return arrays | _single(state=rng.normal(size=(batch, features, 2 * pairs))) if state else arrays

    return make


def _recurrence(variant, lengths, **options):
    def call(arrays, implementation):
        return ssm.dplr_recurrence(arrays["inputs"], *_system(arrays), arrays.get("state"), implementation=implementation)

    make, bench = _make_recurrence(**options), _make_recurrence((1, 256, 32), **options)
    return Spec("ssm.dplr_recurrence", variant, make, call, bench, lengths, BENCH_EXTENDED)


SPECS = [
    _scan("complex"),
    _scan("complex-continued", state=True, lengths=(1, 7, 63, 129, 500)),
    _scan("real-reversed-continued", is_reversed=True, is_complex=False, state=True),
    _kernel("ssm.diagonal_kernel", "two-outputs", _make_diagonal_kernel, _call_diagonal_kernel, TAPS, outputs=(2,)),
    _kernel("ssm.dplr_kernel", "rank-one", _make_dplr_kernel, _call_dplr_kernel),
    _kernel("ssm.dplr_kernel", "rank-two-two-outputs", _make_dplr_kernel, _call_dplr_kernel, TAPS, rank=2, outputs=(2,)),
    _recurrence("rank-two-continued", EXTENDED, rank=2, state=True),
]
