"""What layers with features of their own share: linear attention of the features, and the sums that `extend` carries on."""

import jax.numpy as jnp

from subquad.kernels import linear
from subquad.zoo.cache import LinearCache, counts
from subquad.zoo.checks import require_extend


def attend(layer, query, key, value, mask, **options):
    """`linear.attention` of a layer's features, where the keys may have fewer heads; the options are its."""
    key, value = (jnp.repeat(heads, layer.num_heads // layer.num_kv_heads, axis=2) for heads in (key, value))
    return linear.attention(
        query, key, value, mask=mask, is_causal=layer.is_causal, implementation=layer.implementation, **options
    )


def empty(layer, batch_size: int, max_length: int, features: int) -> LinearCache:
    """The sums of a layer before the first token, of so many features."""
    require_extend(layer, batch_size=batch_size, max_length=max_length)
    return LinearCache.zeros(batch_size, layer.num_heads, features, layer.value_head_features)


def carry_on(attend, query, key, value, mask, cache: LinearCache):
    """Heads of new tokens and the sums after them, by `attend(query, key, value, mask, initial_state, return_state)`."""
    heads, state = attend(query, key, value, mask, initial_state=tuple(cache[:3]), return_state=True)
    numerator, denominator, log_max = state
    return heads, LinearCache(numerator, denominator, log_max, cache.seen + counts(query, mask))
