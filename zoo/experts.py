"""Mixture of experts: many feed-forward networks, of which a router gives each token a few."""

import functools
from collections.abc import Callable
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Array, Bool, Float, Int

from subquad.zoo.checks import check_activation, check_features, check_flags, check_number, check_rate, check_sizes, refuse
from subquad.zoo.compilation import compile_once
from subquad.zoo.dropout import key_of_call

# As of a linear map, for each expert by itself.
KERNEL_INIT = nnx.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)


class RouterLosses(TypedDict):
    """What a loss gets beside itself, times a coefficient each, so that routers stay balanced and their logits small.

    Of each sample by itself, over its real tokens: no batch-mate and no cutting of the batch changes them. Layers add up.

    Keys:
        balance: E sum_e f_e P_e, where f_e is the share of the tokens' choices that are e, and P_e the mean probability of e:
            1 where both are equal for all E experts, E where one expert gets everything. Switch takes it times 0.01.
        z: mean of logsumexp(logits)^2. ST-MoE takes it times 0.001.
    Source: Fedus et al., Switch Transformers, 2021, arXiv 2101.03961, eqs. 4-6; Zoph et al., ST-MoE, 2022, arXiv 2202.08906,
        eq. 5. GShard counts the first choices alone in f.
    """

    balance: Float[Array, "*B"]
    z: Float[Array, "*B"]


def no_losses(batch: tuple[int, ...]) -> RouterLosses:
    """Those of samples that no router saw."""
    return RouterLosses(balance=jnp.zeros(batch), z=jnp.zeros(batch))


def add(one: RouterLosses, other: RouterLosses) -> RouterLosses:
    """Those of two layers."""
    return jax.tree.map(jnp.add, one, other)


def router_losses(
    logits: Float[Array, "B T E"], chosen: Int[Array, "B T k"], real: Bool[Array, "B T"]
) -> RouterLosses:
    """The losses of a router's logits and choices; see `RouterLosses`."""
    experts, count = logits.shape[-1], jnp.maximum(real.sum(-1), 1).astype(jnp.float32)
    mean = lambda values: jnp.sum(jnp.where(real.reshape(*real.shape, *[1] * (values.ndim - 2)), values, 0), 1)
    picked = mean(is_of(chosen, experts).sum(2)).astype(jnp.float32)
    share = picked / (count * chosen.shape[-1])[:, None]
    probability = mean(jax.nn.softmax(logits)) / count[:, None]
    return RouterLosses(
        balance=experts * (share * probability).sum(-1), z=mean(jax.nn.logsumexp(logits, axis=-1) ** 2) / count
    )


class ExpertLinear(nnx.Module):
    """A linear map for each expert: kernel [E, D, F], bias [E, F]."""

    def __init__(self, experts: int, in_features: int, out_features: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.kernel = nnx.Param(KERNEL_INIT(rngs.params(), (experts, in_features, out_features), param_dtype))
        self.bias = nnx.Param(jnp.zeros((experts, out_features), param_dtype))
        self.dtype = dtype

    def slots(self, inputs: Float[Array, "B E C D"]) -> Float[Array, "B E C F"]:
        """Of C tokens for each expert."""
        inputs, kernel, bias = promote_dtype((inputs, self.kernel[...], self.bias[...]), dtype=self.dtype)
        return jnp.einsum("becd,edf->becf", inputs, kernel) + bias[None, :, None]

    def sorted(self, inputs: Float[Array, "N D"], sizes: Int[Array, "E"], owner: Int[Array, "N"]) -> Float[Array, "N F"]:
        """Of tokens sorted by their experts: `owner` of each, and how many each has. What is after these is undefined."""
        inputs, kernel, bias = promote_dtype((inputs, self.kernel[...], self.bias[...]), dtype=self.dtype)
        return jax.lax.ragged_dot(inputs, kernel, sizes) + bias[owner]


class Experts(nnx.Module):
    """E feed-forward networks; a router gives each token the k that it finds likeliest.

        p = softmax(W_r x_t)    float32        y_t = sum_e g_e FFN_e(x_t)   over the k largest p_e,
        g_e = p_e   if k = 1 (Switch)          g_e = p_e / sum of the k p   otherwise (GShard, Mixtral)

    With a `capacity_factor` f an expert takes ceil(f k n / E) tokens of a sample of n real ones: first choices before second
    ones, in the order of tokens. Who finds no place is left out of the sum, so that with a residual around it a token without
    any passes unchanged. Without one (dropless) no token is left out, and each is treated as if it were alone.

    Padding takes no place, moves no loss, and gives 0.

    Cost: with a capacity, f k feed-forward networks. Dropless, k of them where XLA multiplies by groups; where it does not, as
    on a CPU, `jax.lax.ragged_dot` computes k E, with a copy of the inputs for each expert: a capacity is cheaper there. No
    [T, E, C] array is made: places are counted by a running sum of [k T, E], and tokens gathered. Dropless, the tokens of all
    samples are sorted together, which devices that share a batch under plain `jax.jit` communicate for, and under
    `jax.shard_map` do not.

    Args:
        in_features, mlp_features: D, and the features between, of each expert.
        num_experts: E.
        top_k: k, the experts of a token.
        capacity_factor: f; None: dropless.
        drop_second: in training, the second of two experts is kept with probability min(1, 2 g_2), as in GShard.
        activation: between the two maps.
        dropout_rate: of the features between.
    Call:
        inputs: [*B, T, D].  mask: [*B, T], True = a real token.
        rngs: `rngs.dropout()` draws dropout and second experts.
    Raises: ValueError: sizes out of range; top_k above num_experts; drop_second without top_k = 2; a capacity_factor that is
        not positive; a mask of another shape; no rngs where it draws.
    Source: Fedus et al., Switch Transformers, 2021, arXiv 2101.03961; Lepikhin et al., GShard, 2020, arXiv 2006.16668,
        algorithm 1, whose groups are samples here. Switch's noise on the router's inputs is left out.
    """

    def __init__(
        self, in_features: int, mlp_features: int, *, num_experts: int, top_k: int = 1, capacity_factor: float | None = None,
        drop_second: bool = False, activation: Callable[[Array], Array] = nnx.gelu, dropout_rate: float = 0.0,
        dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        check_sizes("Experts", in_features=in_features, mlp_features=mlp_features, num_experts=num_experts, top_k=top_k)
        check_rate("Experts", dropout_rate)
        check_flags("Experts", drop_second=drop_second)
        if top_k > num_experts:
            refuse("Experts", "top_k", top_k, f"be at most num_experts = {num_experts}", "Choose fewer, or more experts.")
        if drop_second and top_k != 2:
            refuse("Experts", "drop_second", True, f"be False with top_k = {top_k}", "It is of GShard's two experts.")
        if capacity_factor is not None:
            check_number("Experts", "capacity_factor", capacity_factor, "(0, inf)", "1.25 is usual; None drops no token.")
        self.in_features, self.num_experts, self.top_k = in_features, num_experts, top_k
        check_activation("Experts", activation)
        self.capacity_factor, self.drop_second, self.activation = capacity_factor, drop_second, activation
        # In float32 whatever the dtype: near ties decide where a token goes.
        self.router = nnx.Linear(
            in_features, num_experts, use_bias=False, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs
        )
        dtypes = dict(dtype=dtype, param_dtype=param_dtype)
        self.inner = ExpertLinear(num_experts, in_features, mlp_features, **dtypes, rngs=rngs)
        self.outer = ExpertLinear(num_experts, mlp_features, in_features, **dtypes, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate, deterministic=True)

    def __call__(
        self, inputs: Float[Array, "*B T D"], *, mask: Bool[Array, "*B T"] | None = None, deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "*B T D"]:
        return self.with_losses(inputs, mask=mask, deterministic=deterministic, rngs=rngs)[0]

    def with_losses(
        self, inputs: Float[Array, "*B T D"], *, mask: Bool[Array, "*B T"] | None = None, deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "*B T D"], RouterLosses]:
        """What a call returns, and the losses of each sample."""
        check_features("Experts", "inputs", inputs, self.in_features)
        *batch, length, features = inputs.shape
        if mask is None:
            mask = jnp.ones((*batch, length), bool)
        if mask.shape != (*batch, length) or mask.dtype != bool:
            refuse("Experts", "mask", f"{mask.dtype} {mask.shape}", f"be boolean of shape [*B, T] = {(*batch, length)}",
                   "True = a real token.")
        is_deterministic = self.dropout.deterministic if deterministic is None else deterministic

        def key(draws: bool):
            if is_deterministic or not draws:
                return None
            return key_of_call("Experts", rngs)

        keys = key(self.dropout.rate > 0), key(self.drop_second)
        outputs, losses = self._routed(inputs.reshape(-1, length, features), mask.reshape(-1, length), keys)
        return outputs.reshape(*batch, length, features), jax.tree.map(lambda loss: loss.reshape(batch), losses)

    @compile_once
    def _routed(self, inputs: Float[Array, "B T D"], real: Bool[Array, "B T"], keys):
        dropout_key, second_key = keys
        tokens = jnp.where(real[..., None], inputs, 0)
        logits = self.router(tokens)
        chosen, gates = choose(logits, self.top_k)
        wanted = jnp.broadcast_to(real[..., None], chosen.shape)
        if second_key is not None:
            is_first = jnp.arange(2, dtype=jnp.int32) == 0
            wanted &= (jax.random.uniform(second_key, gates.shape) < 2 * gates) | jnp.broadcast_to(is_first, gates.shape)
        factor = self.capacity_factor
        run = self._dropless if factor is None else functools.partial(self._within_capacity, factor)
        between = lambda hidden: self.dropout(self.activation(hidden), deterministic=dropout_key is None, rngs=dropout_key)
        outputs = run(tokens, chosen, jnp.where(wanted, gates, 0), wanted, between)
        return outputs, router_losses(logits, chosen, real)

    def _within_capacity(self, factor: float, tokens, chosen, gates, wanted, between):
        length, k = chosen.shape[1:]
        slot, token = jax.vmap(functools.partial(places, factor, self.num_experts))(chosen, wanted)
        taken = _rows(tokens, token).reshape(len(tokens), self.num_experts, -1, tokens.shape[-1])
        given = self.outer.slots(between(self.inner.slots(taken)))
        given = _rows(given.reshape(len(tokens), -1, tokens.shape[-1]), slot).reshape(len(tokens), k, length, -1)
        return jnp.einsum("bktd,btk->btd", given, gates.astype(given.dtype))

    def _dropless(self, tokens, chosen, gates, wanted, between):
        features = tokens.shape[-1]
        key = jnp.where(wanted, chosen, self.num_experts).reshape(-1)  # what is not wanted comes last
        order = jnp.argsort(key, stable=True)
        sizes = is_of(key, self.num_experts).sum(0, dtype=jnp.int32)
        owner = jnp.minimum(key[order], self.num_experts - 1)
        used = (jnp.arange(len(key)) < sizes.sum())[:, None]
        taken = jnp.where(used, tokens.reshape(-1, features)[order // self.top_k], 0)
        given = self.outer.sorted(between(self.inner.sorted(taken, sizes, owner)), sizes, owner)
        given = jnp.where(used, given, 0)[jnp.argsort(order)].reshape(*chosen.shape, features)
        return jnp.einsum("btkd,btk->btd", given, gates.astype(given.dtype))


def choose(logits: Float[Array, "*B E"], top_k: int) -> tuple[Int[Array, "*B k"], Float[Array, "*B k"]]:
    """The likeliest experts and their gates."""
    gates, chosen = jax.lax.top_k(jax.nn.softmax(logits), top_k)
    return chosen, gates if top_k == 1 else gates / gates.sum(-1, keepdims=True)


def places(
    factor: float, experts: int, chosen: Int[Array, "T k"], wanted: Bool[Array, "T k"]
) -> tuple[Int[Array, "kT"], Int[Array, "EC"]]:
    """Of one sample: the place of each choice, first choices first, and the token of each place, C for each expert.

    What has no place stands at E C, and what no token has holds T.
    """
    length, k = chosen.shape
    # A table, since float32 would round a product that is an integer up at one length and not at another. No expert is given a
    # token twice.
    counts = np.arange(length + 1)
    capacity = np.minimum(np.ceil(counts * (factor * k) / experts - 1e-9), counts).astype(np.int32)
    most = int(capacity[-1])
    queue, waits = chosen.T.reshape(-1), wanted.T.reshape(-1)
    before = jnp.cumsum(is_of(queue, experts) & waits[:, None], axis=0, dtype=jnp.int32)
    place = jnp.take_along_axis(before, queue[:, None], axis=1)[:, 0] - 1
    fits = waits & (place < jnp.asarray(capacity)[wanted[:, 0].sum()])
    slot = jnp.where(fits, queue * most + place, experts * most)
    token = jnp.full(experts * most, length, jnp.int32).at[slot].set(jnp.arange(k * length) % length, mode="drop")
    return slot, token


def is_of(chosen: Int[Array, "*N"], experts: int) -> Bool[Array, "*N E"]:
    """Whether a choice is each of the experts."""
    return jnp.expand_dims(chosen, -1) == jnp.arange(experts, dtype=chosen.dtype).reshape(*[1] * chosen.ndim, -1)


def _rows(array: Float[Array, "B N D"], rows: Int[Array, "B M"]) -> Float[Array, "B M D"]:
    """Rows of each sample; 0 for what is outside."""
    return jnp.take_along_axis(array, rows[..., None], axis=1, mode="fill", fill_value=0)
