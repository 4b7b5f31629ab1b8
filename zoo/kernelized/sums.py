"""What layers with features of their own share: linear attention of the features, and the sums that `extend` carries on."""

from typing import Any, ClassVar

import jax.numpy as jnp

from subquad.kernels import linear
from subquad.zoo.base import Attention
from subquad.zoo.cache import LinearCache, counts
from subquad.zoo.checks import require_extend
from subquad.zoo.projection import head_by_head


class FeatureAttention(Attention):
    """The shell of a layer whose weights are products of features. A variant writes `mix`, and has the rest from that."""

    num_features: int = 0  # of a head; 0: as many as it has
    by_head: ClassVar[bool] = False  # so many that of long sequences those of a few heads exist at a time

    def mix(self, query, key, value, mask, **options) -> Any:
        """Heads of queries and keys that have no features yet; the options are those of `linear.attention`."""
        raise NotImplementedError

    def weigh(self, query, key, value, mask, **options) -> Any:
        """`linear.attention` of features, where the keys may have fewer heads; the options are its."""
        key, value = (jnp.repeat(heads, self.num_heads // self.num_kv_heads, axis=2) for heads in (key, value))
        return linear.attention(
            query, key, value, mask=mask, is_causal=self.is_causal, implementation=self.implementation, **options
        )

    def attend(self, query, key, value, mask, segment_ids=None):
        mix = lambda query, key, value, mask, ids: self.mix(query, key, value, mask, segment_ids=ids)
        if self.by_head:
            return head_by_head(mix, query, key, value, by_sample=(mask, segment_ids))
        return mix(query, key, value, mask, segment_ids)

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> LinearCache:
        """An empty cache: float32 sums, no keys or values. So max_length bounds nothing, and dtype rounds nothing."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        self._check_length("max_length", max_length)
        features = self.num_features or self.head_features
        return LinearCache.zeros(batch_size, self.num_heads, features, self.value_head_features)

    def attend_cached(self, query, key, value, mask, cache, **options):
        heads, state = self.mix(query, key, value, mask, initial_state=tuple(cache[:3]), return_state=True, **options)
        return heads, LinearCache(*state, cache.seen + counts(query, mask))
