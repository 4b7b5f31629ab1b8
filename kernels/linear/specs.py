"""Named calls of linear attention, over given and over random features."""

import functools

import jax.numpy as jnp
import numpy as np

from subquad.kernels import linear
from subquad.kernels.specs import HEADS, LENGTHS, Spec, over_heads

# One key's weight is 1 whatever the query: a gradient of 0, of which no error is a fraction.
SEVERAL = LENGTHS[1:]


def make(length, dtype, rng, *, batch=2, heads=2, features=20, values=24, bench=False):
    """Positive features, log scales over a few units, a mask, and a state that has seen keys before."""
    positive = lambda *shape: jnp.asarray(rng.uniform(0.05, 1, shape), dtype)
    if bench:
        batch, heads, features, values = 1, 4, 64, 64
    arrays = dict(
        query=positive(batch, length, heads, features),
        key=positive(batch, length, heads, features),
        value=jnp.asarray(rng.normal(size=(batch, length, heads, values)), dtype),
    )
    if bench:
        return arrays
    mask = rng.uniform(size=(batch, 1, 1, length)) < 0.8
    mask[0, ..., : length // 3] = False
    return arrays | dict(
        scale=jnp.asarray(2 * rng.normal(size=(batch, length, heads)), jnp.float32),
        mask=jnp.asarray(mask),
        numerator=jnp.asarray(rng.normal(size=(batch, heads, features, values)), jnp.float32),
        denominator=jnp.asarray(rng.uniform(1, 2, (batch, heads, features)), jnp.float32),
        largest=jnp.asarray(rng.normal(size=(batch, heads)), jnp.float32),
    )


def call(arrays, implementation, *, is_causal, eps=0.0):
    state = tuple(arrays[name] for name in ("numerator", "denominator", "largest")) if "numerator" in arrays else None
    outputs, (numerator, denominator, _) = linear.attention(
        arrays["query"], arrays["key"], arrays["value"], key_log_scale=arrays.get("scale"), mask=arrays.get("mask"),
        segment_ids=arrays.get("segment_ids"), is_causal=is_causal, eps=eps, initial_state=state, return_state=True,
        implementation=implementation,
    )  # fmt: skip
    return outputs, numerator, denominator


def make_plain(length, dtype, rng):
    return {name: x for name, x in make(length, dtype, rng).items() if name in ("query", "key", "value")}


def make_packed(length, dtype, rng, **options):
    """As `make`, with segments of about 20 tokens."""
    arrays = make(length, dtype, rng, **options)
    return arrays | dict(segment_ids=jnp.asarray(np.cumsum(rng.uniform(size=(len(arrays["query"]), length)) < 0.05, 1)))


def make_random(length, dtype, rng, *, batch=2, heads=2, width=24, features=40, state=False, bench=False):
    if bench:
        batch, heads, width, features = 1, 4, 64, 256
    normal = lambda *shape: rng.normal(size=shape)
    arrays = dict(
        query=jnp.asarray(normal(batch, length, heads, width), dtype),
        key=jnp.asarray(normal(batch, length, heads, width), dtype),
        value=jnp.asarray(normal(batch, length, heads, width), dtype),
        projection=jnp.asarray(normal(features, width), jnp.float32),
    )
    if bench:
        return arrays
    arrays["mask"] = jnp.asarray(rng.uniform(size=(1, 1, 1, length)) < 0.8)
    if state:
        arrays |= dict(
            numerator=jnp.asarray(normal(batch, heads, features, width), jnp.float32),
            denominator=jnp.asarray(rng.uniform(1, 2, (batch, heads, features)), jnp.float32),
            largest=jnp.asarray(normal(batch, heads), jnp.float32),
        )
    return arrays


def make_relu(length, dtype, rng, **options):
    """As `make_random`, but where rounding decides on which side of the ReLU's kink a feature lies, another row stands."""
    arrays = make_random(length, dtype, rng, **options)
    for name in ("query", "key"):
        rows = np.asarray(arrays[name], np.float32)
        clear = (abs(rows @ np.asarray(arrays["projection"]).T) > 1e-4).all(-1, keepdims=True)
        arrays[name] = jnp.asarray(np.where(clear, rows, rows[clear[..., 0]][0]), dtype)
    return arrays


def make_continued(length, dtype, rng, **options):
    return make_random(length, dtype, rng, state=True, **options)


def call_random(arrays, implementation, *, is_causal, kernel):
    state = tuple(arrays[name] for name in ("numerator", "denominator", "largest")) if "numerator" in arrays else None
    return linear.random_feature_attention(
        arrays["query"], arrays["key"], arrays["value"], arrays["projection"], kernel=kernel, mask=arrays.get("mask"),
        is_causal=is_causal, initial_state=state, implementation=implementation,
    )


def make_gated(length, dtype, rng, *, channels=False, delta=False, batch=2, heads=2, features=20, values=24, bench=False):
    """Decays from slow to fast, of which some forget everything; keys of unit length; a state."""
    if bench:
        batch, heads, features, values = 1, 4, 64, 64
    normal = lambda *shape: rng.normal(size=shape)
    key = normal(batch, length, heads, features)
    decay = -(normal(batch, length, heads, *[features] * channels) ** 2)
    forget = rng.uniform(size=decay.shape)
    decay = np.where(forget < 0.02, -1e4, np.where(forget < 0.2, 20 * decay, 0.2 * decay))
    arrays = dict(
        query=jnp.asarray(normal(batch, length, heads, features), dtype),
        key=jnp.asarray(key / np.linalg.norm(key, axis=-1, keepdims=True), dtype),
        value=jnp.asarray(normal(batch, length, heads, values), dtype),
        decay=jnp.asarray(decay, jnp.float32),
        state=jnp.asarray(normal(batch, heads, features, values), jnp.float32),
    )
    return arrays | (dict(beta=jnp.asarray(rng.uniform(size=(batch, length, heads)), jnp.float32)) if delta else {})


def make_normalized(length, dtype, rng, **options):
    """As `make_gated`, with a normaliser that is never near 0."""
    arrays = make_gated(length, dtype, rng, **options)
    arrays |= {name: jnp.abs(arrays[name]) for name in ("query", "key")}
    return arrays | dict(sums=1 + jnp.abs(arrays["state"][..., 0]))


def make_floored(length, dtype, rng, **options):
    """As `make_gated`, with features of any sign and a floor that binds for some of the tokens."""
    arrays = make_gated(length, dtype, rng, **options)
    floor = rng.uniform(0.2, 1.0, arrays["query"].shape[:3])
    return arrays | dict(sums=arrays["state"][..., 0], floor=jnp.asarray(floor, jnp.float32))


def make_reading_first(length, dtype, rng, **options):
    """As `make_gated`, with a bonus of the present token."""
    arrays = make_gated(length, dtype, rng, **options)
    return arrays | dict(bonus=jnp.asarray(rng.normal(size=arrays["state"].shape[1:3]), jnp.float32))


def make_erasing(length, dtype, rng, **options):
    """As `make_gated`, with keys of unit length that read what is then erased in part, of each channel another."""
    arrays = make_gated(length, dtype, rng, **options)
    reader = rng.normal(size=(*arrays["query"].shape[:2], *arrays["state"].shape[1:3]))
    reader /= np.linalg.norm(reader, axis=-1, keepdims=True)
    eraser = rng.uniform(size=reader.shape) * reader
    return arrays | dict(reader=jnp.asarray(reader, dtype), eraser=jnp.asarray(eraser, dtype))


def call_gated(arrays, implementation):
    state = (arrays["state"], arrays["sums"]) if "sums" in arrays else arrays["state"]
    erase = (arrays["reader"], arrays["eraser"]) if "reader" in arrays else None
    return linear.gated(
        arrays["query"], arrays["key"], arrays["value"], arrays["decay"], beta=arrays.get("beta"), bonus=arrays.get("bonus"),
        floor=arrays.get("floor"), erase=erase, normalize="sums" in arrays, initial_state=state, return_state=True, scale=0.3,
        implementation=implementation,
    )  # fmt: skip


def bench(maker):
    return lambda length, dtype, rng: maker(length, dtype, rng, bench=True)


def spec(name, is_causal, maker=make, eps=0.0, lengths=LENGTHS):
    def run(arrays, implementation):
        return call(arrays, implementation, is_causal=is_causal, eps=eps)

    return Spec("linear.attention", name, maker, run, bench(make), lengths)


def random_spec(name, is_causal, kernel, maker=make_random, lengths=SEVERAL):
    def run(arrays, implementation):
        return call_random(arrays, implementation, is_causal=is_causal, kernel=kernel)

    return Spec("linear.random_feature_attention", name, maker, run, bench(maker), lengths)


def gated_spec(name, maker=make_gated, **options):
    maker = functools.partial(maker, **options)
    return Spec("linear.gated", name, maker, call_gated, bench(maker), (63, 129))


SPECS = [
    spec("causal", True),
    spec("causal-plain", True, make_plain, lengths=SEVERAL),
    spec("bidirectional", False, eps=0.5),
    spec("segments-causal", True, make_packed, lengths=(63, 129)),
    spec("segments", False, make_packed, lengths=(63, 129)),
    random_spec("softmax", False, "softmax"),
    random_spec("softmax-causal", True, "softmax", make_continued, LENGTHS),
    random_spec("relu-causal", True, "relu", make_relu),
    gated_spec("heads"),
    gated_spec("normalized", make_normalized),
    gated_spec("floored", make_floored),
    gated_spec("channels", channels=True),
    gated_spec("channels-bonus", make_reading_first, channels=True),
    gated_spec("delta", delta=True),
    gated_spec("channels-delta", channels=True, delta=True),
    gated_spec("channels-erasing", make_erasing, channels=True),
]


def over(kind, is_causal, plain=False, values=None):
    """A kind of call with given features at every size of a head; values are as wide, or `values` at most."""

    def draw(head, length, dtype, rng):
        arrays = make(length, dtype, rng, features=head, values=min(head, values or head))
        return {name: arrays[name] for name in ("query", "key", "value")} if plain else arrays

    return over_heads("linear.attention", kind, draw, functools.partial(call, is_causal=is_causal))


def over_random(kind, is_causal, kernel):
    """A kind of call with 256 random features at every size of a head."""
    draw = lambda head, *rest: make_random(*rest, width=head, features=256, state=is_causal)
    run = functools.partial(call_random, is_causal=is_causal, kernel=kernel)
    return over_heads("linear.random_feature_attention", kind, draw, run)


def over_gated(kind, maker, most=HEADS[-1], **options):
    """A kind of call at every size of a head."""
    draw = lambda head, *rest: maker(*rest, features=head, values=head, **options)
    return over_heads("linear.gated", kind, draw, call_gated, most)


GRID = [
    *over("mask-causal", True, values=128),
    *over("mask", False, values=128),
    *over("causal", True, plain=True),
    *over("plain", False, plain=True),
    *over_random("softmax-causal", True, "softmax"),
    *over_random("softmax", False, "softmax"),
    *over_random("relu-causal", True, "relu"),
    *over_random("relu", False, "relu"),
    *over_gated("heads", make_gated),
    *over_gated("normalized", make_normalized),
    *over_gated("channels", make_gated, channels=True),
    *over_gated("delta", make_gated, 128, delta=True),  # float32 takes no more
    *over_gated("channels-delta", make_gated, 128, channels=True, delta=True),
    *over_gated("channels-erasing", make_erasing, 128, channels=True),
]
