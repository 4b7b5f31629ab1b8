"""Generation with any causal model that extends a cache: in one compiled program, or token by token; alone or with a draft.

A program serves many lengths: a shorter prompt is padded on the left, and a loop ends at the number of tokens asked for.
"""

import functools
import inspect
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from subquad.zoo.checks import known_integer, known_number
from subquad.zoo.dropout import key_of_call
from subquad.zoo.encoder import check_tokens, is_known
from subquad.zoo.linen import call_rngs
from subquad.zoo.sampling import INVALID, draw, judge, probabilities


class Sampling(NamedTuple):
    """What of a request decides the compiled program, beside the models' graphs and the shapes of arrays."""

    is_greedy: bool
    top_k: int | None
    stop_tokens: tuple[int, ...]
    room: int  # of the caches, in tokens, padding included
    most_tokens: int  # that the program can add
    draft_tokens: int  # of each call of the model; 0 without a draft


class Request(NamedTuple):
    """The arrays of a compiled program."""

    states: tuple[Any, ...]  # of the model, and of its draft
    prompt: Int[Array, "B T"]
    mask: Bool[Array, "B T"] | None
    key: Array
    temperature: float
    top_p: float | None


class Progress(NamedTuple):
    """What was generated so far; those of a sample's tokens after its first `counts` mean nothing."""

    tokens: Int[Array, "B most_tokens+K+1"]
    counts: Int[Array, "B"]  # of each sample's tokens; the last one is in no cache
    caches: tuple[Any, ...]
    rounds: Int[Array, ""]
    drafted: Int[Array, ""]  # of all samples
    accepted: Int[Array, ""]


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
    draft: Any = None,
    draft_tokens: int | None = None,
    rngs: nnx.Rngs | None = None,
) -> Int[Array, "B num_tokens"]:
    """Continues the prompt: one compiled program, a prefill and a loop over `extend`; without dropout.

    Lengths are rounded up, by a quarter at most, so that nearby ones share a program: a prompt is padded on the left where the
    model's `extend` takes a mask, and the loop ends at num_tokens, or when every sample has drawn a stop token.

    With a draft, a smaller model, the latter proposes K = draft_tokens tokens, one after the other, and one call of the model
    judges them all (speculative decoding, by the rule of `zoo.sampling.judge`). The tokens are distributed as without it,
    temperature, top_k and top_p included; at temperature 0 they are the same, but where two are as likely up to rounding.
    Where a drafted token stands with probability a, a call of the model gives

        1 + a + ... + a^K = (1 - a^{K+1}) / (1 - a)   tokens,   for K + 1 calls of the draft, the last one for its cache

    That pays where a call of K + 1 tokens costs hardly more than one of a single token, as where reading the parameters is most
    of it. Where some tokens fall, a model that can `rewind` its cache does so, as those of softmax attention can; any other
    reads the tokens that stand a second time, under a mask, from the cache before them.

    Args:
        model: an nnx.Module, or another pytree, with `init_cache(batch_size, max_length)` -> cache and
            `extend(tokens [B, T], cache)` -> (logits [B, T, vocabulary], cache); with `mask=` where a mask or a draft is given
            here. `CausalLM` is one. If it has `vocab_size`, ids of the prompt are checked against it; if it has `longest`, no
            cache is made for more tokens than that because lengths are rounded up; if it has `rewind(cache, count)`, that gives
            the cache without the last `count` [B] real tokens of each sample, or None.
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
        draft: another such model, of the same vocabulary; None: the model works alone.
        draft_tokens: K >= 1, how many tokens the draft proposes at a time; None: 4.
        rngs: `rngs.dropout()`, or the default stream, draws the samples; needed when temperature > 0. Inside a Linen module
            its "dropout" collection does where this is None.
    Returns: [B, num_tokens] int32, the new tokens. A sample whose logits are not finite, as after an id out of range that was
        not known under the caller's `jax.jit`, holds -1 from there on.
    Raises: ValueError: an argument out of its range; sampling without rngs; a prompt that ends in padding; an id out of range;
        of a `CausalLM` with learned positions, more than max_length tokens, the last one not counted; a draft of another
        vocabulary, or of a shorter `longest` than is needed.
        TypeError: a prompt or mask that is no array; what is no number, or none that is known outside of `jax.jit`; a model or
            draft that is not as above.
    Source: of drafts, Leviathan et al., ICML 2023, arXiv 2211.17192; Chen et al., 2023, arXiv 2302.01318.
    """
    static, request, num_tokens = _request(
        model, prompt, num_tokens, temperature, top_k, top_p, stop_token, mask, draft, draft_tokens, rngs
    )
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
    draft: Any = None,
    draft_tokens: int | None = None,
    rngs: nnx.Rngs | None = None,
) -> Generator[Int[Array, "B"], None, float | None]:
    """The tokens of `generate` as they come, one [B] array after another; ends once every sample has drawn a stop token.

    The arguments are those of `generate`, and are checked at once. It runs outside of `jax.jit`. Of a batch with a draft, a
    token comes when every sample has it.

    Returns: an iterator. The value of its end (of `yield from`, or of the StopIteration) is the share of the drafted tokens
        that stood; None without a draft.
    Example:
        >>> model = zoo.CausalLM(vocab_size=16, in_features=32, num_layers=1, mlp_features=64, max_length=64,
        ...                      mixer="softmax", mixer_options=dict(num_heads=4), rngs=nnx.Rngs(0))
        >>> [token.shape for token in stream(model, jnp.ones((2, 5), jnp.int32), 3)]
        [(2,), (2,), (2,)]
    """
    static, request, num_tokens = _request(
        model, prompt, num_tokens, temperature, top_k, top_p, stop_token, mask, draft, draft_tokens, rngs
    )

    def tokens():
        progress, shown = _first(static, request), 0
        while True:
            goes_on, ready = jax.device_get(_status(static, num_tokens, progress))
            for index in range(shown, ready):
                yield _filled(progress, index)
            if not goes_on:
                return float(progress.accepted / jnp.maximum(progress.drafted, 1)) if static[1].draft_tokens else None
            progress, shown = _round(static, request, num_tokens, progress), ready

    return tokens()


def _request(model, prompt, num_tokens, temperature, top_k, top_p, stop_token, mask, draft, draft_tokens, rngs):
    """The checked arguments of the compiled programs: ((the models' graphs, `Sampling`), static; `Request`; num_tokens)."""
    models = {"model": model} if draft is None else {"model": model, "draft": draft}
    takes_mask = _check_models(models)
    real, whole = functools.partial(known_number, "generate"), functools.partial(known_integer, "generate")
    num_tokens, draft_tokens = whole("num_tokens", num_tokens), _draft_tokens(draft, draft_tokens)
    temperature, top_p = real("temperature", temperature), None if top_p is None else real("top_p", top_p)
    top_k = None if top_k is None else whole("top_k", top_k)
    stop_tokens = () if stop_token is None else tuple(whole("stop_token", one) for one in np.atleast_1d(stop_token))
    rngs = call_rngs(rngs, "generate")
    _check_sampling(temperature, top_k, top_p, rngs)
    if num_tokens < 1:
        raise ValueError(f"generate: num_tokens must be an integer >= 1, got {num_tokens}. Ask for at least one token.")
    check_tokens("generate", "prompt", prompt, mask, vocab_size=getattr(model, "vocab_size", None))
    if not isinstance(prompt.shape[0], int):
        raise ValueError(
            f"generate: prompt must have a known batch size, got {prompt.shape}. Export it with one, or extend without."
        )
    if prompt.shape[1] == 0:
        raise ValueError(f"generate: prompt must have at least one token, got {prompt.shape}. Begin with a token of your own.")
    if mask is not None and is_known(mask) and not np.asarray(mask)[:, -1].all():
        raise ValueError("generate: mask must end in real tokens, got padding on the right. Pad prompts on the left.")
    slots, most, room = _lengths(models, prompt.shape[1], num_tokens, takes_mask)
    if slots > prompt.shape[1]:
        padding = [(0, 0), (slots - prompt.shape[1], 0)]
        mask = jnp.pad(jnp.ones(prompt.shape, bool) if mask is None else mask, padding)
        prompt = jnp.pad(prompt, padding)
    # By its state: nnx.jit would write the model back, which a caller's jax.jit does not allow.
    graphs, states = zip(*map(nnx.split, models.values()), strict=True)
    key = key_of_call("generate", rngs) if temperature > 0 else jax.random.key(0)
    sampling = Sampling(temperature == 0, top_k, stop_tokens, room, most, draft_tokens)
    return (graphs, sampling), Request(states, prompt.astype(jnp.int32), mask, key, temperature, top_p), num_tokens


def _check_models(models: dict[str, Any]) -> bool:
    """Refuses what cannot generate; returns whether the prompt may be padded: every `extend` takes a mask."""
    for name, one in models.items():
        if not (hasattr(one, "init_cache") and hasattr(one, "extend")):
            raise TypeError(f"generate: {name} must have init_cache and extend, got a {type(one).__name__}. CausalLM has.")
        if nnx.split(one)[1] is one:
            raise TypeError(
                f"generate: {name} must be an nnx.Module or a pytree, got a {type(one).__name__}. "
                "Register it, for example with jax.tree_util.register_dataclass."
            )
    wrong = [name for name, one in models.items() if "mask" not in inspect.signature(one.extend).parameters]
    if "draft" in models and wrong:
        both = " and ".join(wrong)
        raise TypeError(f"generate: {both} must have an extend that takes mask when draft is given, got none. CausalLM has.")
    return not wrong


def _check_sampling(temperature, top_k, top_p, rngs) -> None:
    if not 0 <= temperature < jnp.inf:
        raise ValueError(f"generate: temperature must be in [0, inf), got {temperature}. Use 0 for the most likely token.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be >= 1, got {top_k}. Use None for all tokens.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}. Use None for all tokens.")
    for name, value in (("top_k", top_k), ("top_p", top_p)):
        if value is not None and temperature == 0:
            raise ValueError(f"generate: {name} must be None when temperature is 0, got {value}. Set a temperature.")
    if temperature > 0 and rngs is None:
        raise ValueError("generate: rngs must be given when temperature > 0, got None. Pass nnx.Rngs(seed).")


def _draft_tokens(draft, count) -> int:
    """How many tokens a draft proposes at a time; 0 without one."""
    count = None if count is None else known_integer("generate", "draft_tokens", count)
    if count is not None and (draft is None or count < 1):
        must = "be left out without a draft" if draft is None else "be an integer >= 1"
        raise ValueError(f"generate: draft_tokens must {must}, got {count}. It is of each call of a draft.")
    return 0 if draft is None else 4 if count is None else count


def _lengths(models: dict[str, Any], prompt: int, num_tokens: int, pads: bool) -> tuple[int, int, int]:
    """(tokens of the padded prompt, tokens that the program can add, room of the caches), rounded up where models allow it."""
    known = [(one.longest, name) for name, one in models.items() if getattr(one, "longest", None) is not None]
    longest, shortest = min(known, default=(None, ""))
    slots, most = rounded_up(prompt) if pads else prompt, rounded_up(num_tokens)
    if longest is None:
        return slots, most, slots + most - 1
    if prompt + num_tokens - 1 > longest:  # the last token is never fed
        raise ValueError(
            f"generate: num_tokens must be at most {max(0, longest - prompt + 1)} after {prompt} tokens, of a {shortest} for "
            f"{longest}, got {num_tokens}. Ask for fewer, or construct the {shortest} with a larger max_length."
        )
    slots = max(prompt, min(slots, longest - num_tokens + 1))  # padding takes room as well
    return slots, most, max(slots + num_tokens - 1, min(slots + most - 1, longest))


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
    progress = jax.lax.while_loop(
        lambda progress: _status(static, num_tokens, progress)[0],
        lambda progress: _round(static, request, num_tokens, progress),
        _first(static, request),
    )
    return jax.vmap(lambda index: _filled(progress, index), out_axes=1)(jnp.arange(static[1].most_tokens))


@functools.partial(jax.jit, static_argnums=0)
def _first(static, request: Request) -> Progress:
    """The prompt -> the first new token."""
    graphs, sampling = static
    mask, batch = dict[str, Any]() if request.mask is None else dict(mask=request.mask), len(request.prompt)
    extended = []
    for graph, state in zip(graphs, request.states, strict=True):
        model = nnx.merge(graph, state)
        extended.append(model.extend(request.prompt, model.init_cache(batch, sampling.room), **mask))
    (logits, *of_draft), caches = zip(*extended, strict=True)
    vocabulary = logits.shape[-1]
    if of_draft and of_draft[0].shape[-1] != vocabulary:
        raise ValueError(
            f"generate: draft must have the model's vocabulary of {vocabulary}, got {of_draft[0].shape[-1]}. "
            "Train it on the same tokens."
        )
    if sampling.top_k is not None and sampling.top_k > vocabulary:
        raise ValueError(f"generate: top_k must be in 1..{vocabulary}, got {sampling.top_k}. Use None for all tokens.")
    for stop in sampling.stop_tokens:
        if not 0 <= stop < vocabulary:
            raise ValueError(f"generate: stop_token must be in 0..{vocabulary - 1}, got {stop}. Use None for none.")
    token = draw(_key(request, sampling, 0), _likely(logits[:, -1], request, sampling))
    tokens = jnp.zeros((batch, sampling.most_tokens + sampling.draft_tokens + 1), jnp.int32).at[:, 0].set(token)
    zero = jnp.int32(0)
    return Progress(tokens, jnp.ones(batch, jnp.int32), caches, zero, zero, zero)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="progress")
def _round(static, request: Request, num_tokens, progress: Progress) -> Progress:
    """One call of the model: of each sample's last token, and of those that a draft proposes after it."""
    graphs, sampling = static
    model, *drafts = map(nnx.merge, graphs, request.states)
    before, *draft_before = progress.caches
    rounds, counts = progress.rounds + 1, progress.counts
    key = _key(request, sampling, rounds)
    last = _last(progress)
    # How many more each sample is to have: no cache sees a token that nothing asked for comes after.
    wanted = jnp.where(_is_stop(last, sampling), 0, num_tokens - counts)
    if drafts:
        key, draft_key = (None, None) if key is None else jax.random.split(key)
        shown = jnp.arange(sampling.draft_tokens + 1)[None] < wanted[:, None]
        drafted, draft_likely, draft_after = _propose(
            drafts[0], last, draft_before[0], shown, draft_key, lambda logits: _likely(logits, request, sampling)
        )
        chunk = jnp.concatenate([last[:, None], drafted], axis=1)
        logits, after = model.extend(chunk, before, mask=shown)
    else:
        logits, after = model.extend(last[:, None], before)
        drafted, draft_likely = jnp.zeros((len(last), 0), jnp.int32), jnp.zeros((len(last), 0, logits.shape[-1]))
    tokens, stood = judge(key, drafted, draft_likely, _likely(logits, request, sampling))
    is_stop = _is_stop(tokens, sampling)
    up_to_stop = jnp.where(is_stop.any(1), jnp.argmax(is_stop, axis=1), sampling.draft_tokens).astype(jnp.int32) + 1
    new = jnp.minimum(jnp.minimum(stood + 1, up_to_stop), wanted)
    caches: tuple[Any, ...] = (after,)
    if drafts:
        works = zip((model, *drafts), progress.caches, (after, draft_after), strict=True)
        caches = tuple(_kept(one, old, seen, chunk, shown, new) for one, old, seen in works)
    put = jax.vmap(lambda row, more, at: jax.lax.dynamic_update_slice_in_dim(row, more, at, 0))
    return Progress(
        put(progress.tokens, tokens, counts), counts + new, caches, rounds,
        progress.drafted + jnp.minimum(wanted, sampling.draft_tokens).sum(dtype=jnp.int32),
        progress.accepted + jnp.minimum(stood, new).sum(dtype=jnp.int32),
    )


def _propose(draft, last: Int[Array, "B"], cache, shown: Bool[Array, "B K1"], key, likely):
    """The draft's next tokens, one after the other -> (drafted [B, K], their distributions [B, K, V], the cache with them)."""

    def step(carry, work):
        token, cache = carry
        key, shown = work
        logits, cache = draft.extend(token[:, None], cache, mask=shown[:, None])
        # Any distribution will do where it has none of its own.
        logits = jnp.where(jnp.isfinite(logits.max(-1, keepdims=True)), logits, 0)
        q = likely(logits[:, -1])
        token = draw(key, q)
        return (token, cache), (token, q)

    steps = shown.shape[1]  # the last one is for the cache alone
    keys = None if key is None else jax.random.split(key, steps)
    (_, cache), (tokens, q) = jax.lax.scan(step, (last, cache), (keys, shown.T))
    return tokens[:-1].T, jnp.moveaxis(q[:-1], 0, 1), cache


def _kept(model, before, after, chunk: Int[Array, "B K1"], shown: Bool[Array, "B K1"], count: Int[Array, "B"]):
    """The cache of a model with the first `count` tokens of a chunk, of which `after` has seen those shown."""
    fallen = shown.sum(1, dtype=jnp.int32) - count
    rewound = model.rewind(after, fallen) if hasattr(model, "rewind") else None
    if rewound is not None:
        return rewound
    stands = jnp.arange(chunk.shape[1])[None] < count[:, None]
    return jax.lax.cond((fallen == 0).all(), lambda: after, lambda: model.extend(chunk, before, mask=stands)[1])


def _key(request: Request, sampling: Sampling, rounds) -> Array | None:
    return None if sampling.is_greedy else jax.random.fold_in(request.key, rounds)


def _likely(logits, request: Request, sampling: Sampling):
    return probabilities(logits, None if sampling.is_greedy else request.temperature, sampling.top_k, request.top_p)


def _last(progress: Progress) -> Int[Array, "B"]:
    return jnp.take_along_axis(progress.tokens, progress.counts[:, None] - 1, axis=1)[:, 0]


@jax.jit
def _filled(progress: Progress, index) -> Int[Array, "B"]:
    """The new token at `index` of each sample: where it has stopped before, its last one again."""
    return jnp.where(index < progress.counts, progress.tokens[:, index], _last(progress))


@functools.partial(jax.jit, static_argnums=0)
def _status(static, num_tokens, progress: Progress):
    """(whether a sample lacks tokens, how many tokens are known of every sample)."""
    is_done = _is_stop(_last(progress), static[1])
    ready = jnp.where(is_done.all(), progress.counts.max(), jnp.where(is_done, num_tokens, progress.counts).min())
    return (~is_done & (progress.counts < num_tokens)).any(), ready


def _is_stop(token: Int[Array, "*B"], sampling: Sampling) -> Bool[Array, "*B"]:
    return functools.reduce(lambda done, stop: done | (token == stop), sampling.stop_tokens, token == INVALID)
