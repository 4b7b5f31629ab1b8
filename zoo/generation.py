"""Generation with any causal model that extends a cache: in one compiled program, or token by token.

A program serves many lengths: a shorter prompt is padded on the left, and a loop ends at the number of tokens asked for.
"""

import functools
import inspect
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
    """What of a request decides the compiled program, beside the model's graph and the shapes of arrays."""

    is_greedy: bool
    top_k: int | None
    stop_tokens: tuple[int, ...]
    room: int  # of the cache, in tokens, padding included
    most_tokens: int  # that the program can add


class Request(NamedTuple):
    """The arrays of a compiled program."""

    state: Any
    prompt: Int[Array, "B T"]
    mask: Bool[Array, "B T"] | None
    key: Array
    temperature: float
    top_p: float | None


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

    Lengths are rounded up, by a quarter at most, so that nearby ones share a program: a prompt is padded on the left where the
    model's `extend` takes a mask, and the loop ends at num_tokens, or when every sample has drawn a stop token.

    Args:
        model: an nnx.Module, or another pytree, with `init_cache(batch_size, max_length)` -> cache and
            `extend(tokens [B, T], cache)` -> (logits [B, T, vocabulary], cache); with `mask=` where a mask is given here.
            `CausalLM` is one. If it has `vocab_size`, ids of the prompt are checked against it; if it has `longest`, no cache
            is made for more tokens than that because lengths are rounded up.
        prompt: [B, T] tokens, T >= 1; pad shorter prompts on the left. Padding may hold any id and changes nothing,
            except where buckets or windows follow the length, as of "reformer" with num_buckets=None: there it is the room
            of the cache, padding included.
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
    static, request = _request(model, prompt, num_tokens, temperature, top_k, top_p, stop_token, mask, rngs)
    return _generate(static, request, num_tokens)[:, :num_tokens]


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
    static, request = _request(model, prompt, num_tokens, temperature, top_k, top_p, stop_token, mask, rngs)

    def tokens():
        token, cache = _first(static, request)
        yield token
        for index in range(1, num_tokens):
            if _is_done(token, static[1]).all():
                return
            token, cache = _next(static, request, index, token, cache)
            yield token

    return tokens()


def _request(model, prompt, num_tokens, temperature, top_k, top_p, stop_token, mask, rngs):
    """The checked arguments of the compiled programs: (the model's graph, `Sampling`), which are static, and a `Request`."""
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
    # By its state: nnx.jit would write the model back, which a caller's jax.jit does not allow.
    graph, state = nnx.split(model)
    if state is model:
        raise TypeError(
            f"generate: model must be an nnx.Module or a pytree, got a {type(model).__name__}. "
            "Register it, for example with jax.tree_util.register_dataclass."
        )
    slots, most, longest = rounded_up(prompt.shape[1]), rounded_up(num_tokens), getattr(model, "longest", None)
    if longest is not None and prompt.shape[1] + num_tokens - 1 > longest:  # the last token is never fed
        most_tokens = max(0, longest - prompt.shape[1] + 1)
        raise ValueError(
            f"generate: num_tokens must be at most {most_tokens} after {prompt.shape[1]} tokens, of a model for {longest}, "
            f"got {num_tokens}. Ask for fewer, or construct the model with a larger max_length."
        )
    if "mask" not in inspect.signature(model.extend).parameters:
        slots = prompt.shape[1]
    if longest is not None:  # padding takes room as well
        slots = max(prompt.shape[1], min(slots, longest - num_tokens + 1))
    room = slots + most - 1
    if longest is not None:
        room = max(slots + num_tokens - 1, min(room, longest))
    if slots > prompt.shape[1]:
        padding = [(0, 0), (slots - prompt.shape[1], 0)]
        mask = jnp.pad(jnp.ones(prompt.shape, bool) if mask is None else mask, padding)
        prompt = jnp.pad(prompt, padding)
    key = jax.random.key(0) if rngs is None else rngs.dropout()
    sampling = Sampling(temperature == 0, top_k, stop_tokens, room, most)
    return (graph, sampling), Request(state, prompt.astype(jnp.int32), mask, key, temperature, top_p)


def rounded_up(length: int) -> int:
    """A length that many share: a multiple of 16, and of a quarter of the largest power of two below the length.

    Example:
        >>> [rounded_up(length) for length in (1, 16, 17, 100, 600, 1000)]
        [16, 16, 32, 112, 640, 1024]
    """
    step = max(16, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


@functools.partial(jax.jit, static_argnums=0)
def _generate(static, request: Request, num_tokens) -> Int[Array, "B most_tokens"]:
    """The new tokens; those after num_tokens mean nothing."""
    graph, sampling = static
    first, cache = _first(static, request)
    tokens = jnp.zeros((sampling.most_tokens, len(first)), jnp.int32).at[0].set(first)

    def goes_on(carry):
        index, tokens, _ = carry
        return (index < num_tokens) & ~_is_done(tokens[index - 1], sampling).all()

    def step(carry):
        index, tokens, cache = carry
        token, cache = _next(static, request, index, tokens[index - 1], cache)
        return index + 1, tokens.at[index].set(token), cache

    index, tokens, _ = jax.lax.while_loop(goes_on, step, (1, tokens, cache))
    return jnp.where(jnp.arange(len(tokens))[:, None] < index, tokens, tokens[index - 1]).T


@functools.partial(jax.jit, static_argnums=0)
def _first(static, request: Request):
    """The prompt -> (the first new token, cache)."""
    graph, sampling = static
    model, mask = nnx.merge(graph, request.state), request.mask
    cache = model.init_cache(len(request.prompt), sampling.room)
    logits, cache = model.extend(request.prompt, cache, **({} if mask is None else dict(mask=mask)))
    vocabulary = logits.shape[-1]
    if sampling.top_k is not None and sampling.top_k > vocabulary:
        raise ValueError(f"generate: top_k must be in 1..{vocabulary}, got {sampling.top_k}. Use None for all tokens.")
    for stop in sampling.stop_tokens:
        if not 0 <= stop < vocabulary:
            raise ValueError(f"generate: stop_token must be in 0..{vocabulary - 1}, got {stop}. Use None for none.")
    return _pick(logits[:, -1], 0, request, sampling), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
def _next(static, request: Request, index, token, cache):
    """The new token before the one at `index` -> (that one, cache)."""
    graph, sampling = static
    logits, cache = nnx.merge(graph, request.state).extend(token[:, None], cache)
    return jnp.where(_is_done(token, sampling), token, _pick(logits[:, -1], index, request, sampling)), cache


def _is_done(token: Int[Array, "B"], sampling: Sampling) -> Bool[Array, "B"]:
    return functools.reduce(lambda done, stop: done | (token == stop), sampling.stop_tokens, token == INVALID)


def _pick(logits: Float[Array, "B vocab"], index, request: Request, sampling: Sampling) -> Int[Array, "B"]:
    """The new token at `index` of each sample."""
    key, top_p = jax.random.fold_in(request.key, index), request.top_p
    logits = logits.astype(jnp.float32)
    best = logits.max(-1, keepdims=True)
    if sampling.is_greedy:
        token = jnp.argmax(logits, axis=-1)
    else:
        # Differences from the best, so that no temperature, however small, leads to inf - inf.
        logits = (logits - best) / jnp.maximum(request.temperature, jnp.finfo(jnp.float32).tiny)
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
