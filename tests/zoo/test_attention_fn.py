"""Mechanisms in the place of Flax's attention function: its decode mode, masks, bias, dropout; and that they are values."""

import functools
import pickle
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo.interchange import knows_positions
from tests.oracle import relative_error

from .cases import CASES, FEATURES, inputs
from .test_eager import compilations

NAMES = [name for name in CASES if CASES[name].supports.attention_fn]
OPTIONS = {name: {k: v for k, v in CASES[name].options.items() if k not in ("num_heads", "num_kv_heads")} for name in NAMES}
OPTIONS["nystrom"]["conv_width"] = None
OPTIONS["entmax"]["alpha"] = 1.5
VARIANTS = {
    **{name: (name, options) for name, options in OPTIONS.items()},
    "rotary": ("softmax", dict(rotary_base=50.0)),
    "relu": ("performer", dict(num_features=16, kernel="relu")),
    "distinct": ("strided", dict(stride=4, pattern="fixed", num_summary=1, distinct_summary=True)),
    "separate": ("strided", dict(stride=4, pattern="fixed", num_summary=2, heads="separate")),
}
by_name = pytest.mark.parametrize("name", NAMES)
by_variant = pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=() if name in NAMES else pytest.mark.sample(2)) for name in VARIANTS]
)


def can_be_causal(variant: str) -> bool:
    return bool(CASES[VARIANTS[variant][0]].supports.causal)


causal_names = pytest.mark.parametrize("name", list(filter(can_be_causal, NAMES)))
causal_variants = pytest.mark.parametrize(
    "variant",
    [pytest.param(x, marks=() if x in NAMES else pytest.mark.sample(2)) for x in filter(can_be_causal, VARIANTS)],
)

LENGTH, HEADS = 11, 4


def build(variant: str, **more):
    name, options = VARIANTS[variant]
    return zoo.attention_fn(name, **{**options, **more})


def arrays(length: int = LENGTH, batch: int = 2, queries: int | None = None):
    """Query, key and value."""
    draw = lambda seed, length: jax.random.normal(jax.random.key(seed), (batch, length, HEADS, 8))
    return draw(0, queries or length), draw(1, length), draw(2, length)


def close(actual, expected):
    assert relative_error(actual, expected) < 1e-5


def flaxs(fn, **options):
    return nnx.MultiHeadAttention(HEADS, FEATURES, attention_fn=fn, decode=False, rngs=nnx.Rngs(0), **options)


@by_name
def test_drops_into_flax(name):
    fn = zoo.attention_fn(name, seed=3, **OPTIONS[name])
    flax = flaxs(fn)
    ours = zoo.make(name, in_features=FEATURES, num_heads=HEADS, **OPTIONS[name], rngs=nnx.Rngs(3))
    nnx.update(ours, nnx.state(flax, nnx.Param))
    fixed = zoo.LAYERS[name](HEADS, 1, qkv_features=FEATURES, **OPTIONS[name], rngs=nnx.Rngs(3))
    nnx.update(ours, nnx.state(fixed, zoo.RandomFeature))
    x = inputs(LENGTH)
    mask = zoo.masks.padding_mask(jnp.array([LENGTH, 7]), LENGTH)
    y = jax.jit(lambda x, mask: flax(x, mask=mask))(x, mask)
    expected = ours(x, mask=mask)
    close(y[0], expected[0])
    close(y[1, :7], expected[1, :7])
    # Flax's masks are numbers: what is not 0 is seen.
    np.testing.assert_array_equal(jax.jit(lambda x, mask: flax(x, mask=mask))(x, mask.astype(jnp.float32)), y)


# Decoding.


@causal_variants
def test_decodes_in_flax(variant):
    """Token by token into Flax's cache, which has room for more, is the full causal pass."""
    flax, x = flaxs(build(variant, is_causal=True)), inputs(LENGTH)
    full = jax.jit(lambda x: flax(x))(x)
    flax.init_cache((2, LENGTH + 3, FEATURES))
    step = nnx.jit(lambda flax, x: flax(x, decode=True))
    close(jnp.concatenate([step(flax, x[:, t : t + 1]) for t in range(LENGTH)], axis=1), full)


@causal_names
def test_decodes_in_linen(name):
    fn, x = zoo.attention_fn(name, is_causal=True, **OPTIONS[name]), inputs(LENGTH)
    layer = nn.MultiHeadDotProductAttention(HEADS, attention_fn=fn, decode=True)
    variables = layer.init(jax.random.key(0), jnp.ones((2, LENGTH + 3, FEATURES)))
    params, cache, outputs = {"params": variables["params"]}, variables["cache"], []
    step = jax.jit(lambda cache, x: layer.apply({**params, "cache": cache}, x, mutable=["cache"]))
    for t in range(LENGTH):
        y, changed = step(cache, x[:, t : t + 1])
        cache = changed["cache"]
        outputs.append(y)
    full = jax.jit(lambda x: nn.MultiHeadDotProductAttention(HEADS, attention_fn=fn).apply(params, x))(x)
    close(jnp.concatenate(outputs, axis=1), full)


PADDED = np.ones((2, LENGTH), bool)  # left padding that is no multiple of a block, and holes
PADDED[0, :3] = PADDED[1, [2, 5, 6]] = False


@causal_variants
def test_decodes_real_tokens_only(variant):
    """With padding in the prompt, on the left or in holes, a step is that of the real tokens alone."""
    flax, x = flaxs(build(variant, is_causal=True)), inputs(LENGTH)
    alone = jax.jit(lambda x: flax(x))
    expected = [alone(row[real][None])[0] for row, real in zip(x, PADDED, strict=True)]
    flax.init_cache((2, LENGTH + 3, FEATURES))
    mask = jnp.asarray(np.pad(PADDED, ((0, 0), (0, 3)), constant_values=True))[:, None, None]
    step = nnx.jit(lambda flax, x: flax(x, mask=mask, decode=True))
    y = jnp.concatenate([step(flax, x[:, t : t + 1]) for t in range(LENGTH)], axis=1)
    for row, real, want in zip(y, PADDED, expected, strict=True):
        close(row[real], want)


@causal_variants
def test_queries_are_the_last_of_the_keys(variant):
    """A chunk of T < S queries is the end of the full pass, wherever the keys that the mask shows end."""
    fn, (query, key, value) = jax.jit(build(variant, is_causal=True)), arrays()
    name = VARIANTS[variant][0]
    if not knows_positions(zoo.LAYERS[name]):
        with pytest.raises(ValueError, match=rf"attention_fn\('{name}'\): query must have length 1, or the length 11 of key"):
            fn(query[:, -3:], key, value)
        return
    full = fn(query, key, value)
    close(fn(query[:, -3:], key, value), full[:, -3:])
    mask = zoo.masks.padding_mask(jnp.array([8, 6]), LENGTH)
    poisoned = (jnp.where(mask[:, 0, 0, :, None, None], x, 1e9) for x in (key, value))
    chunk = fn(jnp.stack([query[0, 5:8], query[1, 3:6]]), *poisoned, mask=mask)
    close(chunk[0], full[0, 5:8])
    close(chunk[1], full[1, 3:6])
    # A query before the first key that is shown sees nothing.
    early = fn(query[:, :3], key, value, mask=zoo.masks.padding_mask(jnp.array([1, 0]), LENGTH))
    assert not early[0, :2].any() and not early[1].any()
    close(early[0, 2], fn(query[:1, 2:3], key[:1, :1], value[:1, :1])[0, 0])


def test_a_pairwise_mask_tells_where_the_last_query_stands():
    fn, (query, key, value) = build("rotary", is_causal=True), arrays()
    full = fn(query, key, value, mask=zoo.masks.window_mask(jnp.arange(LENGTH), jnp.arange(LENGTH), 4))
    rows = zoo.masks.window_mask(jnp.arange(5, 8), jnp.arange(LENGTH), (4, 0))
    close(fn(query[:, 5:8], key, value, mask=rows), full[:, 5:8])
    by_head = jnp.broadcast_to(rows[:, :, 2:], (2, HEADS, 1, LENGTH)).at[:, 1, :, 5].set(False)
    keys = jnp.broadcast_to(jnp.arange(LENGTH) <= 7, (1, HEADS, 1, LENGTH)) & by_head
    wide = jnp.zeros((2, HEADS, LENGTH, LENGTH), bool).at[:, :, 7:8].set(keys)
    close(fn(query[:, 7:8], key, value, mask=by_head), fn(query, key, value, mask=wide)[:, 7:8])


@by_name
def test_lengths_that_mean_nothing_are_refused(name):
    query, key, value = arrays()
    with pytest.raises(ValueError, match=rf"attention_fn\('{name}'\): query must have at most the length 4 of key"):
        build(name, is_causal=True)(query, key[:, :4], value[:, :4])
    with pytest.raises(ValueError, match="query must have at most"):  # Flax's word for the call
        build(name)(query, key[:, :4], value[:, :4], is_causal=True)
    if not CASES[name].supports.cross:
        with pytest.raises(ValueError, match="key must have the length 1 of query where is_causal is False"):
            build(name)(query[:, :1], key, value)
    else:
        fn = build(name)
        close(fn(query[:, :3], key, value), fn(query, key, value)[:, :3])


# Padding.


@by_variant
@pytest.mark.parametrize("is_causal", [False, True])
def test_positions_count_real_tokens(variant, is_causal):
    """Left padding and holes are as if they were not there, whatever they hold."""
    if is_causal and not can_be_causal(variant):
        pytest.skip("bidirectional only")
    fn, real = jax.jit(build(variant, is_causal=is_causal)), jnp.asarray(PADDED)
    query, key, value = arrays()
    key, value = (jnp.where(real[..., None, None], x, jnp.nan) for x in (key, value))
    y = fn(query, key, value, mask=real[:, None, None])
    assert jnp.isfinite(y).all()
    for row in range(2):
        close(y[row][PADDED[row]], fn(*(x[row][PADDED[row]][None] for x in (query, key, value)))[0])


def test_queries_of_another_sequence_are_no_padding():
    """The mask of the keys hides no query, though there are as many of them."""
    query, key, value = arrays()
    mask = zoo.masks.padding_mask(jnp.array([4, 9]), LENGTH)
    for variant in ("softmax", "performer"):
        fn = build(variant)
        close(fn(query, key, value, mask=mask)[0], fn(query, key[:, :4], value[:, :4])[0])


# Bias, dropout, weights.


@pytest.mark.parametrize(("kv_heads", "broadcast"), [(4, True), (2, False)])
def test_dropout_and_weights_are_flaxs(kv_heads, broadcast):
    options = dict(num_kv_heads=kv_heads, dropout_rate=0.4, broadcast_dropout=broadcast, use_bias=False)
    ours, theirs = flaxs(zoo.attention_fn("softmax"), **options), flaxs(nnx.dot_product_attention, **options)
    x, mask = inputs(LENGTH).reshape(2, 1, LENGTH, FEATURES), zoo.masks.padding_mask(jnp.array([[LENGTH], [7]]), LENGTH)

    @nnx.jit
    def run(layer, x, mask):
        y = layer(x, mask=mask, deterministic=False, rngs=nnx.Rngs(dropout=5), sow_weights=True)
        return y, nnx.pop(layer, nnx.Intermediate)

    (y, sown), (expected, expected_sown) = run(ours, x, mask), run(theirs, x, mask)
    close(y, expected)
    weights, expected_weights = (state["attention_weights"][0] for state in (sown, expected_sown))
    assert weights.shape == (2, 1, HEADS, LENGTH, LENGTH) and weights.dtype == x.dtype
    close(weights, expected_weights)
    half = nnx.Dict()
    zoo.attention_fn("softmax")(*(x.astype(jnp.bfloat16) for x in arrays()), module=half)
    assert half.attention_weights[0].dtype == jnp.bfloat16
    # Without them both are the kernel, which drops nothing.
    close(ours(x, mask=mask, deterministic=True), theirs(x, mask=mask, deterministic=True))


def test_dropout_and_weights_are_linens():
    build = lambda fn: nn.MultiHeadDotProductAttention(HEADS, dropout_rate=0.4, deterministic=False, attention_fn=fn)
    x, outputs = inputs(LENGTH), []
    params = build(nn.dot_product_attention).init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
    for fn in (zoo.attention_fn("softmax"), nn.dot_product_attention):
        run = functools.partial(build(fn).apply, params, rngs={"dropout": jax.random.key(2)}, sow_weights=True)
        outputs.append(run(x, mutable=["intermediates"]))
    jax.tree.map(close, *outputs)
    with pytest.raises(ValueError, match="qk_attn_weights_einsum must be None"):
        nn.MultiHeadDotProductAttention(
            HEADS, attention_fn=zoo.attention_fn("softmax"), qk_attn_weights_einsum_cls=lambda: jnp.einsum,
            attn_weights_value_einsum_cls=lambda: jnp.einsum,
        ).init(jax.random.key(0), x)


@pytest.mark.parametrize("shape", [(2, 4, 11, 11), (1, 4, 1, 11)])
def test_bias_is_flaxs(shape):
    fn, bias = zoo.attention_fn("softmax"), jax.random.normal(jax.random.key(4), shape)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(attend, bias):
        loss = lambda bias, **call: jnp.sum(attend(*arrays(), bias=bias, **call) ** 2)
        # Dropout makes all weights.
        return jax.grad(loss)(bias), jax.grad(functools.partial(loss, dropout_rate=0.5, dropout_rng=jax.random.key(1)))(bias)

    jax.tree.map(close, gradients(fn, bias), gradients(nnx.dot_product_attention, bias))
    for wrong in (bias[0], jnp.zeros((3, 4, 11, 11))):
        with pytest.raises(ValueError, match=r"attention_fn\('softmax'\): bias must have the axes"):
            fn(*arrays(), bias=wrong)


@pytest.mark.parametrize("mask", [None, "padding", "pairwise"])
def test_all_weights_at_once_are_the_kernel(mask):
    """Where weights are sown, attention stays what it is: grouped heads, causality, steps, empty rows, NaN behind masks."""
    fn, module = build("rotary", is_causal=True), nnx.Dict()
    query, key, value = arrays()
    key, value = key[:, :, :2], value[:, :, :2]
    if mask == "padding":
        mask = jnp.asarray(PADDED)[:, None, None]
        key, value = (jnp.where(mask[:, 0, 0, :, None, None], x, jnp.nan) for x in (key, value))
    elif mask == "pairwise":
        mask = jax.random.bernoulli(jax.random.key(1), 0.4, (2, HEADS, LENGTH, LENGTH)).at[:, :, 3].set(False)
    close(fn(query, key, value, mask=mask, module=module), fn(query, key, value, mask=mask))
    rows = mask if mask is None or mask.shape[2] == 1 else mask[:, :, -2:]
    close(fn(query[:, -2:], key, value, mask=rows, module=module), fn(query[:, -2:], key, value, mask=rows))


def test_what_dropout_is_not_given_is_refused():
    fn = zoo.attention_fn("softmax")
    with pytest.raises(ValueError, match=r"attention_fn\('softmax'\): dropout_rng must be given for dropout"):
        fn(*arrays(), dropout_rate=0.5)
    with pytest.raises(ValueError, match=r"attention_fn\('softmax'\): dropout_rate must be a number in \[0, 1\]"):
        fn(*arrays(), dropout_rate=1.5, dropout_rng=jax.random.key(0))
    assert not fn(*arrays(), dropout_rate=1.0, dropout_rng=jax.random.key(0)).any()
    with pytest.raises(NotImplementedError, match="stores no weights"):
        build("softmax", implementation="triton")(*arrays(), dropout_rate=0.5, dropout_rng=jax.random.key(0))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "softmax"])
def test_what_needs_weights_is_refused(name):
    fn = zoo.attention_fn(name, **OPTIONS[name])
    with pytest.raises(ValueError, match=rf"attention_fn\('{name}'\) does not support bias: .* Use"):
        fn(*arrays(), bias=jnp.zeros((1, 1, 1, LENGTH)))
    with pytest.raises(ValueError, match=rf"attention_fn\('{name}'\) does not support dropout_rate"):
        flaxs(fn, dropout_rate=0.1)(inputs(LENGTH), deterministic=False)
    with pytest.raises(ValueError, match=rf"attention_fn\('{name}'\) does not support sow_weights"):
        flaxs(fn)(inputs(LENGTH), sow_weights=True)
    assert flaxs(fn, dropout_rate=0.1)(inputs(LENGTH), deterministic=True).shape == (2, LENGTH, FEATURES)


def test_arrays_that_do_not_go_together_are_refused():
    query, key, value = arrays(batch=6)
    fn = zoo.attention_fn("softmax")
    batched = lambda x, *batch: x.reshape(*batch, *x.shape[1:])
    with pytest.raises(ValueError, match=r"attention_fn\('softmax'\): key must have the batch axes \(2, 3\) of query"):
        fn(batched(query, 2, 3), batched(key, 3, 2), batched(value, 2, 3))
    with pytest.raises(ValueError, match="value must have the length and heads"):
        fn(query, key, value[:, :5])
    for call in ({}, dict(module=nnx.Dict())):
        with pytest.raises(ValueError, match="key must have the 8 features of query"):
            fn(query, key[..., :7], value, **call)
    with pytest.raises(ValueError, match=r"query must have the axes \[\*B, T, N, H\]"):
        fn(query[0, 0], key, value)
    close(fn(batched(query, 2, 3), batched(key, 2, 3), batched(value, 2, 3)), batched(fn(query, key, value), 2, 3))
    close(fn(query[0], key[0], value[0]), fn(query, key, value)[0])


# A value.


@by_variant
def test_equal_arguments_give_equal_functions(variant):
    fn, same = build(variant, is_causal=True), build(variant, is_causal=True)
    assert fn == same and hash(fn) == hash(same) and pickle.loads(pickle.dumps(fn)) == fn
    assert fn not in (build(variant), build(variant, is_causal=True, seed=1))
    assert eval(repr(fn), {"attention_fn": zoo.attention_fn}) == fn and repr(fn).startswith("attention_fn('")
    assert nnx.graphdef(flaxs(fn)) == nnx.graphdef(flaxs(same))


@pytest.mark.parametrize(("name", "own"), [("nystrom", "taps"), ("entmax", "alpha_logits")])
def test_what_would_be_learned_is_refused(name, own):
    with pytest.raises(ValueError, match=rf"attention_fn\('{name}'\): its options must leave no parameters, got {own}"):
        zoo.attention_fn(name, **({"alpha": "learned"} if name == "entmax" else {}))(*arrays())


def test_equal_models_compile_once():
    run, traces = nnx.jit(lambda model, x: (traces.append(0), model(x))[1]), []
    for window_size in ([2, 3], (2, 3), np.array([2, 3])):
        fn = pickle.loads(pickle.dumps(zoo.attention_fn("local", window_size=window_size)))
        run(flaxs(fn), inputs(LENGTH))
    assert len(traces) == 1
    run(flaxs(zoo.attention_fn("local", window_size=(2, 4))), inputs(LENGTH))
    assert len(traces) == 2


@by_name
def test_an_eager_call_compiles_once(name):
    fn, (query, key, value) = build(name, is_causal=can_be_causal(name)), arrays()
    mask = jnp.asarray(PADDED)[:, None, None]
    fn(query, key, value, mask=mask)
    with compilations() as compiled:
        fn(value, key, query, mask=mask)
    assert not compiled


def test_options_are_plain_values():
    with pytest.raises(TypeError, match=r"\('blockwise'\): shifts must be a number, a word or a list of them, got dict"):
        zoo.attention_fn("blockwise", max_length=10, shifts={})


# Options. Each is shown beside those that it needs; the output must notice it.
CHANGES = {
    "softmax": [({}, dict(is_causal=True)), ({}, dict(rotary_base=50.0))],
    "blockwise": [
        (dict(max_length=12, block_size=3), change)
        for change in (
            dict(is_causal=True), dict(block_size=4), dict(shifts=[0, 1, 1, 2]), dict(max_length=18), dict(rotary_base=9.0)
        )
    ],
    "local": [
        (dict(window_size=2), change) for change in (dict(is_causal=True), dict(window_size=(2, 1)), dict(rotary_base=9.0))
    ],
    "strided": [
        (dict(stride=4), dict(is_causal=True)), (dict(stride=4), dict(stride=3)), (dict(stride=4), dict(pattern="fixed")),
        (dict(stride=4), dict(heads="separate")), (dict(stride=4), dict(rotary_base=9.0)),
        (dict(stride=4, pattern="fixed"), dict(num_summary=2)),
        (dict(stride=4, pattern="fixed"), dict(distinct_summary=True)),
    ],
    "efficient": [({}, dict(is_causal=True))],
    "smyrf": [
        (dict(cluster_size=4), change)
        for change in (dict(cluster_size=3), dict(num_hashes=2), dict(seed=1), dict(rotary_base=9.0))
    ],
    "informer": [(dict(factor=1), change) for change in (dict(factor=2), dict(seed=1), dict(rotary_base=9.0))],
    "clustered": [
        (dict(num_clusters=5, num_top=0, num_bits=6), change)
        for change in (
            dict(num_clusters=2), dict(num_top=3), dict(num_bits=3), dict(num_iterations=1), dict(seed=1), dict(rotary_base=9.0)
        )
    ],
    "diagonal": [
        (dict(window_size=2), change)
        for change in (dict(is_causal=True), dict(window_size=(2, 1)), dict(dilation=[1, 2, 2, 3]), dict(rotary_base=9.0))
    ],
    "random": [
        (dict(max_length=12, block_size=1), change)
        for change in (
            dict(is_causal=True), dict(block_size=2), dict(num_random=2), dict(random_seed=1), dict(max_length=18),
            dict(rotary_base=9.0),
        )
    ],
    "axial": [
        (dict(row_length=4), change)
        for change in (dict(is_causal=True), dict(row_length=5), dict(axis="row"), dict(rotary_base=9.0))
    ],
    "bigbird": [
        (dict(max_length=12, block_size=1, num_random=1), change)
        for change in (
            dict(is_causal=True), dict(block_size=2), dict(num_random=2), dict(num_global=1), dict(random_seed=1),
            dict(max_length=18), dict(rotary_base=9.0),
        )
    ],
    "kernelized": [({}, dict(is_causal=True)), ({}, dict(rotary_base=9.0))],
    "entmax": [({}, dict(is_causal=True)), ({}, dict(alpha=2.0)), ({}, dict(rotary_base=9.0))],
    "cosformer": [(dict(max_length=12), change) for change in (dict(is_causal=True), dict(max_length=18))],
    "nystrom": [
        (dict(num_landmarks=4, conv_width=None), change)
        for change in (dict(num_landmarks=3), dict(num_iterations=1), dict(rotary_base=9.0))
    ],
    "skyformer": [
        (dict(num_landmarks=6), change)
        for change in (
            dict(num_landmarks=4), dict(gamma=1.0), dict(num_iterations=1), dict(seed=1), dict(rotary_base=9.0)
        )
    ],
    "dpfp": [({}, dict(is_causal=True)), ({}, dict(nu=2)), ({}, dict(rotary_base=9.0))],
    "linear": [({}, dict(is_causal=True)), ({}, dict(rotary_base=9.0))],
    "performer": [
        (dict(num_features=16), dict(is_causal=True)), (dict(num_features=16), dict(num_features=24)),
        (dict(num_features=16), dict(kernel="relu")), (dict(num_features=16), dict(orthogonal=False)),
        (dict(num_features=16), dict(row_norm="sqrt")), (dict(num_features=16), dict(seed=1)),
        (dict(num_features=16), dict(rotary_base=9.0)),
    ],
}  # fmt: skip


@by_name
def test_every_option_acts(name):
    shown = {word for _, change in CHANGES[name] for word in change}
    flaxs_own = {"num_heads", "num_kv_heads", "in_features", "rngs", "dropout_rate", "broadcast_dropout"}
    of_the_shell = set(zoo.base.Shell.__annotations__) - ({"rotary_base"} if zoo.LAYERS[name].supports.rotary else set())
    refused = (set() if can_be_causal(name) else {"is_causal"}) | ({"conv_width"} if name == "nystrom" else set())
    assert shown - {"seed"} == set(zoo.registry.options(name)) - of_the_shell - flaxs_own - refused
    for options, change in CHANGES[name]:
        plain, changed = (zoo.attention_fn(name, **o)(*arrays()) for o in (options, options | change))
        assert relative_error(changed, plain) > 1e-3, change
    with pytest.raises(NotImplementedError, match="triton"):
        zoo.attention_fn(name, implementation="triton", **CHANGES[name][-1][0])(*arrays())


def test_takes_what_the_layer_alone_can_say():
    for word in ("use_bias", "dtype", "param_dtype", "precision", "out_features", "qkv_features", "kernel_init", "num_heads",
                 "num_kv_heads", "in_features", "rngs", "dropout_rate"):
        with pytest.raises(TypeError, match=rf"attention_fn\('softmax'\): {word} must be one of its options"):
            zoo.attention_fn("softmax", **{word: None})
    with pytest.raises(TypeError, match="Did you mean 'window_size'"):
        zoo.attention_fn("local", windw_size=3)
    with pytest.raises(TypeError, match="max_length must be given"):
        zoo.attention_fn("blockwise")
    zoo.attention_fn("softmax", implementation="reference", is_causal=True)(*arrays())


# Precision and the switches of JAX.


@by_name
def test_has_the_precision_of_the_call_or_of_the_caller(name):
    fn = zoo.attention_fn(name, **OPTIONS[name])

    def precisions(ambient, **call):
        with jax.default_matmul_precision(ambient):
            text = jax.jit(lambda *arrays: fn(*arrays, **call)).lower(*arrays()).as_text()
        return set(re.findall(r"precision = \[(\w+)", text))

    assert precisions("highest") == precisions("default", precision=jax.lax.Precision.HIGHEST) == {"HIGHEST"}
    # The exponents of random features are always exact.
    assert precisions("highest", precision="default") - {"HIGHEST"} == precisions("default") - {"HIGHEST"} == {"DEFAULT"}


def test_takes_one_precision():
    fn = zoo.attention_fn("softmax")
    close(fn(*arrays(), precision=jax.lax.DotAlgorithmPreset.F32_F32_F32), fn(*arrays()))
    for precision in ((jax.lax.Precision.HIGHEST,) * 2, ["high", "high"], jax.lax.DotAlgorithmPreset.DEFAULT, "best"):
        with pytest.raises(ValueError, match="precision must be one"):
            fn(*arrays(), precision=precision)


@causal_variants
def test_traces_where_promotion_is_forbidden(variant):
    fn, (query, key, value) = build(variant, is_causal=True), arrays()
    mask = jnp.asarray(PADDED)[:, None, None]
    extras = dict(dropout_rate=0.5, dropout_rng=jax.random.key(0)) if variant == "rotary" else {}
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(fn, query, key, value, mask=mask)
        jax.eval_shape(lambda: fn(query[:, -1:], key, value, mask=mask, **extras))
        jax.eval_shape(lambda: fn(*(x.astype(jnp.bfloat16) for x in (query, key, value)), mask=mask, **extras))
