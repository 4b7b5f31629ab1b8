"""Generation with any causal model that extends a cache: in one compiled program, or token by token."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from subquad.zoo.encoder import check_tokens, is_known
from subquad.zoo.linen import call_rngs

INVALID = -1  # stands for a token whose logits were not finite


class Sampling(NamedTuple):
    """What of a request decides the compiled program."""

    is_greedy: bool
    top_k: int | None
    stop_tokens: tuple[int, ...]


def generate(
    model: Any,
    prompt: Int[Array, "B T"],
    num_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | Sequence[int] | None = None,
    mask: Bool[Array, "B T"] | None = None,
    rngs: nnx.Rngs | None = None,
) -> Int[Array, "B num_tokens"]:
    """Continues the prompt: one compiled program, a prefill and a loop over `extend`; without dropout.

    Args:
        model: an nnx.Module, or another pytree, with `init_cache(batch_size, max_length)` -> cache and
            `extend(tokens [B, T], cache)` -> (logits [B, T, vocabulary], cache); with `mask=` where a mask is given here.
            `CausalLM` is one. If it has `vocab_size`, ids of the prompt are checked against it.
        prompt: [B, T] tokens, T >= 1; pad shorter prompts on the left. Padding may hold any id and changes nothing,
            except where the mixer is "reformer" with num_buckets=None: the room for the prompt, padding included, decides
            there how many buckets there are.
        num_tokens: how many tokens to add.
        temperature: divides the logits before sampling; 0 takes the most likely token.
        top_k: sample among the k most likely tokens only, the first of equal ones; None among all.
        top_p: sample among the fewest most likely tokens whose probabilities, after temperature and top_k, add up to at least
            this, in (0, 1] (Holtzman et al., 2020, arXiv 1904.09751); None among all.
        stop_token: a sample that has drawn this token, or one of these, repeats it to the end; None: there is no such token.
        mask: [B, T], True = a real token of the prompt.
        rngs: `rngs.dropout()`, or the default stream, draws the samples; needed when temperature > 0. Inside a Linen module
            its "dropout" collection does where this is None.
    Returns: [B, num_tokens] int32, the new tokens. A sample whose logits are not finite, as after an id out of range that was
        not known under the caller's `jax.jit`, holds -1 from there on.
    Raises: ValueError: an argument out of its range; sampling without rngs; a prompt that ends in padding; an id out of range;
        of a `CausalLM` with learned positions, more than max_length tokens, the last one not counted.
        TypeError: a prompt or mask that is no array; a model that is not as above.
    """
    request = _request(model, prompt, num_tokens, temperature, top_k, top_p, stop_token, mask, rngs)
    return _generate(*request, num_tokens=num_tokens)


def stream(
    model: Any,
    prompt: Int[Array, "B T"],
    num_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | Sequence[int] | None = None,
    mask: Bool[Array, "B T"] | None = None,
    rngs: nnx.Rngs | None = None,
) -> Iterator[Int[Array, "B"]]:
    """The tokens of `generate` as they come, one [B] array after another; ends once every sample has drawn a stop token.

    The arguments are those of `generate`, and are checked at once. It runs outside of `jax.jit`.

    Example:
        >>> model = zoo.CausalLM(vocab_size=16, in_features=32, num_layers=1, mlp_features=64, max_length=64,
        ...                      mixer="softmax", mixer_options=dict(num_heads=4), rngs=nnx.Rngs(0))
        >>> [token.shape for token in stream(model, jnp.ones((2, 5), jnp.int32), 3)]
        [(2,), (2,), (2,)]
    """
    sampling, state, prompt, mask, keys, temperature, top_p = _request(
        model, prompt, num_tokens, temperature, top_k, top_p, stop_token, mask, rngs
    )

    def tokens():
        token, cache = _first(sampling, state, prompt, mask, keys[0], temperature, top_p, num_tokens=num_tokens)
        yield token
        for key in keys[1:]:
            if _is_done(token, sampling[1]).all():
                return
            token, cache = _next(sampling, state, token, cache, key, temperature, top_p)
            yield token

    return tokens()


def _request(model, prompt, num_tokens, temperature, top_k, top_p, stop_token, mask, rngs):
    """The checked arguments of the compiled programs; static: the model's graph and `Sampling`, in one."""
    if not (hasattr(model, "init_cache") and hasattr(model, "extend")):
        raise TypeError(f"generate: model must have init_cache and extend, got a {type(model).__name__}. CausalLM has.")
    stop_tokens = () if stop_token is None else tuple(int(x) for x in np.atleast_1d(stop_token))
    if not isinstance(num_tokens, int | np.integer) or num_tokens < 1:
        raise ValueError(f"generate: num_tokens must be an integer >= 1, got {num_tokens}. Ask for at least one token.")
    if not 0 <= temperature < jnp.inf:
        raise ValueError(f"generate: temperature must be in [0, inf), got {temperature}. Use 0 for the most likely token.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be >= 1, got {top_k}. Use None for all tokens.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}. Use None for all tokens.")
    for name, value in (("top_k", top_k), ("top_p", top_p)):
        if value is not None and temperature == 0:
            raise ValueError(f"generate: {name} must be None when temperature is 0, got {value}. Set a temperature.")
    rngs = call_rngs(rngs)
    if temperature > 0 and rngs is None:
        raise ValueError("generate: rngs must be given when temperature > 0, got None. Pass nnx.Rngs(seed).")
    check_tokens("generate", "prompt", prompt, mask, vocab_size=getattr(model, "vocab_size", None))
    if prompt.shape[1] == 0:
        raise ValueError(f"generate: prompt must have at least one token, got {prompt.shape}. Begin with a token of your own.")
    if mask is not None and is_known(mask) and not np.asarray(mask)[:, -1].all():
        raise ValueError("generate: mask must end in real tokens, got padding on the right. Pad prompts on the left.")
    keys = jax.random.split(jax.random.key(0) if rngs is None else rngs.dropout(), num_tokens)
    # By its state: nnx.jit would write the model back, which a caller's jax.jit does not allow.
    graph, state = nnx.split(model)
    if state is model:
        raise TypeError(
            f"generate: model must be an nnx.Module or a pytree, got a {type(model).__name__}. "
            "Register it, for example with jax.tree_util.register_dataclass."
        )
    sampling = Sampling(temperature == 0, top_k, stop_tokens)
    return (graph, sampling), state, prompt.astype(jnp.int32), mask, keys, temperature, top_p


@functools.partial(jax.jit, static_argnums=0, static_argnames="num_tokens")
def _generate(static, state, prompt, mask, keys, temperature, top_p, *, num_tokens):
    first, cache = _first(static, state, prompt, mask, keys[0], temperature, top_p, num_tokens=num_tokens)

    def step(carry, key):
        token, cache = _next(static, state, *carry, key, temperature, top_p)
        return (token, cache), token

    _, rest = jax.lax.scan(step, (first, cache), keys[1:])
    return jnp.concatenate([first[:, None], rest.T], axis=1)


@functools.partial(jax.jit, static_argnums=0, static_argnames="num_tokens")
def _first(static, state, prompt, mask, key, temperature, top_p, *, num_tokens):
    """The prompt -> (the first new token, cache)."""
    graph, sampling = static
    model = nnx.merge(graph, state)
    cache = model.init_cache(prompt.shape[0], prompt.shape[1] + num_tokens - 1)  # the last token is never fed
    logits, cache = model.extend(prompt, cache, **({} if mask is None else dict(mask=mask)))
    vocabulary = logits.shape[-1]
    if sampling.top_k is not None and sampling.top_k > vocabulary:
        raise ValueError(f"generate: top_k must be in 1..{vocabulary}, got {sampling.top_k}. Use None for all tokens.")
    for stop in sampling.stop_tokens:
        if not 0 <= stop < vocabulary:
            raise ValueError(f"generate: stop_token must be in 0..{vocabulary - 1}, got {stop}. Use None for none.")
    return _pick(logits[:, -1], key, temperature, top_p, sampling), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
def _next(static, state, token, cache, key, temperature, top_p):
    """A token -> (the token after it, cache)."""
    graph, sampling = static
    logits, cache = nnx.merge(graph, state).extend(token[:, None], cache)
    return jnp.where(_is_done(token, sampling), token, _pick(logits[:, -1], key, temperature, top_p, sampling)), cache


def _is_done(token: Int[Array, "B"], sampling: Sampling) -> Bool[Array, "B"]:
    return functools.reduce(lambda done, stop: done | (token == stop), sampling.stop_tokens, token == INVALID)


def _pick(logits: Float[Array, "B vocab"], key, temperature, top_p, sampling: Sampling) -> Int[Array, "B"]:
    """The next token of each sample."""
    logits = logits.astype(jnp.float32)
    best = logits.max(-1, keepdims=True)
    if sampling.is_greedy:
        token = jnp.argmax(logits, axis=-1)
    else:
        # Differences from the best, so that no temperature, however small, leads to inf - inf.
        logits = (logits - best) / jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
        if sampling.top_k is None and top_p is None:
            token = jax.random.categorical(key, logits)
        else:
            logits, ids = jax.lax.top_k(logits, sampling.top_k or logits.shape[-1])
            if top_p is not None:
                probability = jax.nn.softmax(logits)
                before = jnp.cumsum(probability, axis=-1) - probability  # of the tokens more likely than this one
                logits = jnp.where(before < top_p, logits, -jnp.inf)
            rank = jax.random.categorical(key, logits)
            token = jnp.take_along_axis(ids, rank[:, None], axis=-1)[:, 0]
    return jnp.where(jnp.isfinite(best[:, 0]), token, INVALID).astype(jnp.int32)
