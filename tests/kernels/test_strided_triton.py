"""What is special to the fused kernels of strided attention; the suite compares them with the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import launch, strided, tuning
from tests.kernels import dense
from tests.kernels.dense import draw
from tests.kernels.test_strided import CALLS, by_hand

COLUMN_CALLS = ("fixed", "fixed, far only")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 queries and 32 keys."""
    pytest.importorskip("triton")
    from subquad.kernels.softmax import triton

    monkeypatch.setattr(triton, "tile_sizes", lambda *sizes: tuning.Config({"BLOCK_Q": 16, "BLOCK_K": 32}))


def check(name, length, dtype="float32", mask=None, is_causal=False, **options):
    function, more = CALLS[name]
    arrays, cotangents = draw(length, dtype=dtype, **options)
    seen = jnp.asarray(by_hand(length, **more, is_causal=is_causal))[None]
    seen = seen if mask is None else seen & mask
    attend = lambda *arrays: function(
        *arrays, **more, mask=mask, is_causal=is_causal, return_lse=True, implementation="interpret"
    )
    dense.compare(dense.run(attend, arrays, cotangents), dense.formula(arrays, cotangents, mask=seen), dtype)


@pytest.mark.interpret
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_many_tiles(small_tiles, name, is_causal):
    heads = 4 if name in COLUMN_CALLS else 1
    check(name, 70, is_causal=is_causal, batch=1, heads=heads)


@pytest.mark.interpret
@pytest.mark.parametrize(("name", "features"), [("strided", 40), ("fixed, far only", 128)])
def test_head_sizes_and_odd_heads(name, features):
    check(name, 30, batch=1, heads=3, features=features, values=17, is_causal=True)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    check("strided", 40, dtype, batch=1, heads=1, features=16, values=16)
    check("fixed", 40, dtype, batch=1, features=16, values=16, is_causal=True)


@pytest.mark.interpret
def test_rows_that_see_nothing():
    """0, -inf and no gradient, also where one set is empty and the other is not."""
    mask = jnp.ones((3, 1, 1, 24), bool).at[0].set(False).at[1, ..., 12:].set(False)
    check("strided", 24, mask=mask, batch=3, heads=1, is_causal=True)
    check("fixed", 24, mask=mask, batch=3, is_causal=True)


@pytest.mark.interpret
def test_vmap_folds_into_the_batch_and_shares_what_is_not_mapped():
    (query, key, value), _ = draw(9, batch=1, heads=1)
    attend = lambda query: strided.attention(query, key, value, stride=2, window_size=2, implementation="interpret")
    queries = jnp.stack([query, -query])
    pull = lambda query: jax.vjp(attend, query)[1](jnp.ones_like(query))[0]
    for function in (attend, pull):
        mapped = jax.vmap(function)(queries)
        np.testing.assert_allclose(mapped, jnp.stack([function(query) for query in queries]), atol=1e-6)


@pytest.mark.interpret
def test_declines_what_the_kernels_cannot_do():
    with jax.enable_x64(True):
        x = jnp.ones((1, 4, 1, 8), jnp.float64)
        with pytest.raises(launch.Declined, match="take float32, bfloat16, float16 only"):
            strided.attention(x, x, x, stride=2, window_size=1, implementation="interpret")
    x = jnp.ones((1, 4, 1, 129))
    with pytest.raises(launch.Declined, match="strided.attention: .* 129 features in a head"):
        strided.attention(x, x, x, stride=2, window_size=1, implementation="interpret")


CALL = dict(stride=128, window_size=128, is_causal=True, implementation="triton")


def record(features, dtype, length=16384):
    x = jax.ShapeDtypeStruct((1, length, 8, features), dtype)
    attend = lambda *arrays: strided.attention(*arrays, **CALL)
    with launch.recording() as launches:
        jax.eval_shape(lambda *arrays: jax.vjp(attend, *arrays[:3])[1](arrays[3]), x, x, x, x)
    return launches


@pytest.mark.aot
def test_both_sets_are_the_kernels_of_softmax():
    names = [one.name for one in dict.fromkeys(record(64, "bfloat16"))]  # forward is traced for the gradient, too
    assert sorted(names) == sorted(2 * ["flash_forward", "flash_backward_query", "flash_backward_key"])


@pytest.mark.aot
@pytest.mark.parametrize(("features", "dtype"), [(128, "bfloat16"), (128, "float32"), (32, "float16")])
def test_other_head_sizes_spill_nothing(features, dtype):
    from subquad.kernels import machine_code

    for one in record(features, dtype):
        compiled = machine_code.compile(one, "sm_90")
        assert compiled.fits and compiled.stack == 0 and compiled.tensor_core and not compiled.transposes, compiled


@pytest.mark.aot
@pytest.mark.parametrize("target", ["sm_80"])
def test_other_targets_have_the_shared_memory(target):
    from subquad.kernels import machine_code

    for one in record(64, "bfloat16"):
        compiled = machine_code.compile(one, target)
        assert compiled.shared <= machine_code.SHARED_LIMIT[target] and compiled.tensor_core, compiled
