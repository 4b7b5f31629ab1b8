"""How tokens are drawn: the distribution that logits stand for, and the judgement of tokens that a draft proposed."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

INVALID = -1  # stands for a token whose logits were not finite


def probabilities(
    logits: Float[Array, "*B vocab"], temperature: float | None, top_k: int | None = None, top_p: float | None = None
) -> Float[Array, "*B vocab"]:
    """The distribution that tokens are drawn from, float32; NaN where logits are not finite.

    Args:
        temperature: divides the logits; None: all probability is the first most likely token's.
        top_k: of the k most likely tokens only, the first of equal ones; None: of all.
        top_p: of the fewest most likely tokens that add up to at least this, after temperature and top_k; None: of all.
    Example:
        >>> probabilities(jnp.log(jnp.array([0.5, 0.25, 0.25])), 1.0, top_k=1).tolist()
        [1.0, 0.0, 0.0]
    """
    logits = logits.astype(jnp.float32)
    best = logits.max(-1, keepdims=True)
    if temperature is None:
        likely = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    else:
        # Differences from the best, so that no temperature, however small, leads to inf - inf.
        logits = (logits - best) / jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
        if top_k is not None or top_p is not None:
            kept, ids = jax.lax.top_k(logits, top_k or logits.shape[-1])
            if top_p is not None:
                likely = jax.nn.softmax(kept)
                before = jnp.cumsum(likely, axis=-1) - likely  # of the tokens more likely than this one
                kept = jnp.where(before < top_p, kept, -jnp.inf)
            logits = jnp.put_along_axis(jnp.full_like(logits, -jnp.inf), ids, kept, axis=-1, inplace=False)
        likely = jax.nn.softmax(logits)
    return jnp.where(jnp.isfinite(best), likely, jnp.nan)


def draw(key: Array | None, likely: Float[Array, "B vocab"]) -> Int[Array, "B"]:
    """A token of each sample by its probabilities, which need not add up to 1; INVALID where they are NaN.

    key: None takes the most likely one.
    """
    token = jnp.argmax(likely, axis=-1) if key is None else jax.random.categorical(key, jnp.log(likely))
    return jnp.where(jnp.isnan(likely).any(-1), INVALID, token).astype(jnp.int32)


def judge(
    key: Array | None, drafted: Int[Array, "B K"], draft: Float[Array, "B K vocab"], model: Float[Array, "B K1 vocab"]
) -> tuple[Int[Array, "B K1"], Int[Array, "B"]]:
    """Speculative sampling: of drafted tokens x_1 .. x_K as many as may stand, and a token of the model's after them.

        x_i stands with probability min(1, p_i(x_i) / q_i(x_i)), if those before it do;
        after the last one that stands, at i:   x ~ max(p_{i+1} - q_{i+1}, 0), normalised;   q_{K+1} = 0

    What comes out is distributed as tokens drawn from p one after the other, whatever q is: at each place, x stands with
    probability min(p, q)(x), and the rest of p(x) is that of its replacement.

    Args:
        key: None where all probability is one token's, in both.
        drafted: drawn from q.
        draft: the distributions q_1 .. q_K.
        model: the distributions p_1 .. p_{K+1}, each after the drafted tokens before it; NaN gives INVALID, and nothing after
            it stands.
    Returns: (tokens, of which those after the model's own mean nothing; how many of the drafted stand).
    Source: Leviathan et al., ICML 2023, arXiv 2211.17192, algorithm 1; Chen et al., 2023, arXiv 2302.01318, algorithm 2.
    """
    of_drafted = lambda likely: jnp.take_along_axis(likely, drafted[..., None], axis=-1)[..., 0]
    accept, replace = (None, None) if key is None else jax.random.split(key)
    uniform = jnp.zeros(drafted.shape) if accept is None else jax.random.uniform(accept, drafted.shape)
    stands = uniform * of_drafted(draft) < of_drafted(model[:, :-1])  # False of NaN
    count = jnp.cumprod(stands.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)
    after = lambda likely: jnp.take_along_axis(likely, count[:, None, None], axis=1)[:, 0]
    mine = after(model)
    rest = jnp.maximum(mine - after(jnp.pad(draft, [(0, 0), (0, 1), (0, 0)])), 0)
    # By rounding, a token may fall where p and q are the same.
    own = draw(replace, jnp.where(rest.sum(-1, keepdims=True) > 0, rest, mine))
    is_own = jnp.arange(model.shape[1])[None] == count[:, None]
    return jnp.where(is_own, own[:, None], jnp.pad(drafted, [(0, 0), (0, 1)])), count
