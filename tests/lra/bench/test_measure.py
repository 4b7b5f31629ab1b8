import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from subquad.lra.bench import measure

N = 64
MATRIX = jax.ShapeDtypeStruct((N, N), jnp.float32)
PRODUCT = 2 * N**3


def test_products_and_batches():
    assert measure.flops(lambda x: x @ x, MATRIX) == PRODUCT
    batched = jax.ShapeDtypeStruct((3, N, 2 * N), jnp.bfloat16)
    assert measure.flops(lambda x: jnp.einsum("bij,bkj->bik", x, x), batched) == 3 * 2 * PRODUCT
    complexes = jax.ShapeDtypeStruct((N, N), jnp.complex64)
    assert measure.flops(lambda x: x @ x, complexes) == 4 * PRODUCT


def test_gradient_of_a_product_costs_two_more():
    loss = lambda x, y: (x @ y).sum()
    assert measure.flops(jax.grad(loss, (0, 1)), MATRIX, MATRIX) == 2 * PRODUCT  # the forward product is dead
    square = lambda x, y: jnp.square(x @ y).sum()
    assert 3 * PRODUCT <= measure.flops(jax.grad(square, (0, 1)), MATRIX, MATRIX) <= 3.1 * PRODUCT


def test_products_by_groups():
    """Each row in one product, forwards and backwards, however many groups there are."""
    matrices, sizes = jax.ShapeDtypeStruct((5, N, N), jnp.float32), jnp.array([3, 0, 40, 1, 20])
    product = lambda x, y: jax.lax.ragged_dot(x, y, sizes)
    assert measure.flops(product, MATRIX, matrices) == PRODUCT
    slopes = jax.grad(lambda x, y: product(x, y).sum(), (0, 1))
    assert measure.flops(slopes, MATRIX, matrices) == 2 * PRODUCT


@pytest.mark.parametrize("length", [1, 7, 100])
def test_a_loop_costs_its_length(length):
    def scanned(x):
        return jax.lax.scan(lambda carry, _: (carry @ x, None), x, length=length)[0]

    def mapped(x):
        return jax.lax.map(lambda row: x @ row, jnp.broadcast_to(x, (length, N, N)))

    def counted(x):
        return jax.lax.fori_loop(0, length, lambda _, y: y @ x, x)

    for function in (scanned, mapped, counted, jax.jit(scanned)):
        assert measure.flops(function, MATRIX) == length * PRODUCT


def test_xla_counts_a_loop_once_and_we_do_not():
    """The reason why FLOPs are not read from cost_analysis."""

    def scanned(x):
        return jax.lax.scan(lambda carry, _: (carry @ x, None), x, length=50)[0]

    compiled = jax.jit(scanned).lower(MATRIX).compile()
    assert compiled.cost_analysis()["flops"] < 2 * PRODUCT
    assert measure.flops(scanned, MATRIX) == 50 * PRODUCT


def test_nested_loops_multiply():
    inner = lambda y: jax.lax.scan(lambda carry, _: (carry @ carry, None), y, length=5)[0]
    outer = lambda y: jax.lax.scan(lambda carry, _: (inner(carry), None), y, length=3)[0]
    assert measure.flops(outer, MATRIX) == 15 * PRODUCT


def test_branches_cost_the_dearest():
    function = lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y, lambda y: y @ y @ y, x)
    assert measure.flops(function, MATRIX) == 2 * PRODUCT


def test_checkpoint_counts_what_it_computes_again():
    def loss(x, wrap):
        return wrap(lambda y: jnp.tanh(jnp.tanh(y @ y) @ y))(x).sum()

    once = measure.flops(jax.value_and_grad(lambda x: loss(x, lambda f: f)), MATRIX)
    again = measure.flops(jax.value_and_grad(lambda x: loss(x, jax.checkpoint)), MATRIX)
    assert once >= 2 * PRODUCT
    assert again >= once + PRODUCT


def test_custom_rules_are_seen_into():
    @jax.custom_vjp
    def twice(x):
        return x @ x

    twice.defvjp(lambda x: (x @ x, x), lambda x, cotangent: (cotangent @ x.T + x.T @ cotangent,))
    assert measure.flops(twice, MATRIX) == PRODUCT
    assert 3 * PRODUCT <= measure.flops(jax.grad(lambda x: jnp.square(twice(x)).sum()), MATRIX) <= 3.1 * PRODUCT
    assert measure.flops(lambda x: jax.nn.relu(x) @ x, MATRIX) == pytest.approx(PRODUCT, rel=0.02)


def test_fourier_transforms():
    signal = jax.ShapeDtypeStruct((3, 1024), jnp.complex64)
    assert measure.flops(jnp.fft.fft, signal) == 3 * 5 * 1024 * 10
    real = jax.ShapeDtypeStruct((3, 1024), jnp.float32)
    assert measure.flops(jnp.fft.rfft, real) == 3 * 5 * 1024 * 10 // 2
    half = jax.ShapeDtypeStruct((3, 513), jnp.complex64)
    assert measure.flops(lambda x: jnp.fft.irfft(x, n=1024), half) == pytest.approx(3 * 5 * 1024 * 10 // 2, rel=0.3)


def test_convolutions():
    image, kernel = jax.ShapeDtypeStruct((2, 8, 100), "float32"), jax.ShapeDtypeStruct((16, 8, 5), "float32")
    convolve = lambda x, w: jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NCH", "OIH", "NCH"))
    assert measure.flops(convolve, image, kernel) == 2 * (2 * 16 * 100) * 8 * 5
    depthwise = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=("NCH", "OIH", "NCH"), feature_group_count=8
    )
    assert measure.flops(depthwise, image, jax.ShapeDtypeStruct((8, 1, 5), "float32")) == 2 * (2 * 8 * 100) * 5


def test_elementwise_work_counts_and_integer_work_does_not():
    assert measure.flops(lambda x: jnp.exp(x) + x, MATRIX) == 2 * N * N
    assert measure.flops(lambda x: x.sum(), MATRIX) == N * N
    assert measure.flops(lambda x: x * 3 + x, jax.ShapeDtypeStruct((N, N), jnp.int32)) == 0
    assert measure.flops(lambda x: jnp.sort(x.T.reshape(-1)), MATRIX) == 0


def test_a_modules_call_is_counted():
    layer = nnx.Linear(32, 16, use_bias=False, rngs=nnx.Rngs(0))
    assert measure.flops(layer, jnp.ones((10, 32))) == 2 * 10 * 32 * 16
    graph, state = nnx.split(layer)
    assert measure.flops(lambda s, x: nnx.merge(graph, s)(x), state, jnp.ones((10, 32))) == 2 * 10 * 32 * 16


def test_a_while_loop_is_refused_unless_its_trips_are_told():
    function = lambda x: jax.lax.while_loop(lambda y: y.sum() < 3, lambda y: y @ y, x)
    with pytest.raises(ValueError, match="flops: while_trips must"):
        measure.flops(function, MATRIX)
    assert measure.flops(function, MATRIX, while_trips=4) == 4 * (PRODUCT + N * N)


def test_an_opaque_kernel_is_refused():
    function = lambda x: jax.pure_callback(lambda y: y, MATRIX, x)
    with pytest.raises(ValueError, match="flops: function must.*callback"):
        measure.flops(function, MATRIX)


def test_memory_of_known_programs():
    found = measure.memory(lambda x: jnp.tanh(x @ x) @ x, MATRIX)
    assert (found.arguments, found.outputs) == (4 * N * N, 4 * N * N)
    assert found.temporary >= 4 * N * N
    assert found.peak >= found.arguments + found.outputs
    length = 1024
    scores = measure.memory(lambda x: jax.nn.softmax(x @ x.T) @ x, jax.ShapeDtypeStruct((length, 8), jnp.float32))
    assert scores.temporary >= 4 * length**2


def test_memory_sees_donation():
    step = lambda x: x + 1
    plain, donated = measure.memory(step, MATRIX), measure.memory(jax.jit(step, donate_argnums=0), MATRIX)
    assert donated.peak < plain.peak


def test_measuring_imports_no_data_library():
    code = (
        "import sys, subquad.lra.bench.measure; "
        "bad = {'tensorflow', 'tensorflow_datasets', 'grain', 'matplotlib', 'rich', 'tyro'} & set(sys.modules); "
        "sys.exit(', '.join(sorted(bad)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
