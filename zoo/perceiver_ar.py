"""Perceiver AR: a causal language model that is deep for its last tokens alone."""

from typing import Any, Unpack

import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from subquad.zoo import positions
from subquad.zoo.block import Block, real_tokens
from subquad.zoo.checks import check_sizes, refuse, unsupported
from subquad.zoo.encoder import EncoderOptions
from subquad.zoo.experts import RouterLosses, add, no_losses
from subquad.zoo.linen import call_rngs
from subquad.zoo.model import CausalLM


class PerceiverAR(CausalLM):
    """A causal language model whose first layer reads all tokens, and whose others work on the last L of them.

        h = embedded tokens;   z <- B_1(h_{T-L+1 .. T}; h),   z <- B_i(z; z) for i = 2 .. n;   logits = W LN z      (section 3)

    B(q; k) is a block, norms first, of causal softmax attention from q to k, and a feed-forward network. Of at most L tokens,
    or with one layer, that is `CausalLM` with softmax attention: the same parameters by the same names, the same logits. Of
    more tokens, the logits of one also depend on how many follow it, as these decide which tokens are latents.

    Cost: time O(T L N H + n L (L N H + D^2) + T D^2), memory O(T + n L).
    Differs from the paper: latents and tokens share the first norm, as in `CausalLM`; there they have one each. Its dropout of
        whole tokens, "cross-attend dropout", is not here. No `extend` and no `generate`: the paper moves the latents on and
        computes them anew. Its text was not at hand.

    Args:
        num_latents: L, at most so many of the last tokens have logits.
        others: as `CausalLM`; the mixer is "softmax" with any options, norm_order is "pre".
    Call:
        tokens: [B, T].  mask: [B, T], True = a real token; pad on the left, as the latents are the last L places.
    Returns: logits [B, min(L, T), vocab_size] of the tokens after the last ones.
    Raises: ValueError, beside those of `CausalLM`: options without which it is another model; segment_ids.
    Example:
        >>> model = PerceiverAR(16, vocab_size=32, in_features=32, num_layers=2, mlp_features=64, max_length=100,
        ...                     mixer="softmax", mixer_options=dict(num_heads=4), rngs=nnx.Rngs(0))
        >>> model(jnp.ones((2, 100), jnp.int32)).shape
        (2, 16, 32)

    Source: Hawthorne et al., General-purpose, long-context autoregressive modeling with Perceiver AR, ICML 2022,
        arXiv 2202.07765.
    """

    def __init__(
        self, num_latents: int, *, tie_embeddings: bool = True, rngs: nnx.Rngs, **encoder: Unpack[EncoderOptions]
    ):
        check_sizes("PerceiverAR", num_latents=num_latents)
        for name, wanted in (("mixer", "softmax"), ("norm_order", "pre"), ("remat", False), ("reversible", False)):
            if encoder.get(name, wanted) != wanted:
                refuse("PerceiverAR", name, repr(encoder.get(name)), f"be {wanted!r}", "Leave it out, or use CausalLM.")
        if encoder.get("norm") == "batch":
            refuse("PerceiverAR", "norm", "'batch'", "be no batch norm", "Those of all tokens are not the latents'.")
        self.num_latents = num_latents
        super().__init__(tie_embeddings=tie_embeddings, rngs=rngs, **encoder)

    def with_losses(
        self, tokens: Int[Array, "B T"], *, mask: Bool[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None, deterministic: bool | None = None, rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B L vocab"], RouterLosses]:
        """Logits, and the losses of the experts' routers for each sample."""
        if segment_ids is not None:
            unsupported("PerceiverAR", "segment_ids", "its latents are the last tokens of all sequences", "Use CausalLM.")
        encoder, at = self.encoder, positions.positions_of_real(tokens, mask)
        encoder.check(tokens, mask)
        deterministic = bool(encoder.dropout.deterministic if deterministic is None else deterministic)
        draws: dict[str, Any] = dict(deterministic=deterministic, rngs=call_rngs(rngs, "PerceiverAR"))
        hidden = encoder.dropout(encoder.embed_at(tokens, at, mask), **draws)
        keys = None if mask is None else mask[:, None, None]
        latents, losses = self._read(encoder.layers[0], hidden, at, keys, draws)
        call = dict(mask=None if keys is None else keys[..., -latents.shape[1] :])
        latents, more = encoder.run_blocks(latents, call, **draws, layers=encoder.layers[1:])
        return self.project(encoder.last_norm(latents)), add(losses, more)

    def _read(self, block: Block, hidden, at, mask, draws: dict[str, Any]):
        """The first block, of the last tokens: (latents, losses of its router)."""
        length, mixer = hidden.shape[1], block.mixer
        count = min(self.num_latents, length)
        context = block.mixer_norm(hidden)
        query, key, value = mixer.project(context[:, -count:], context)
        query, key = mixer.rotate(query, key, at[:, -count:], at)
        places = np.arange(length, dtype=np.int32)[None]  # known, so that what is hidden costs nothing
        heads = mixer.attend(query, key, value, mask, places[:, -count:], key_positions=places,
                             **mixer.draws(draws["deterministic"], draws["rngs"]))  # fmt: skip
        latents = hidden[:, -count:] + block.drop_path(block.dropout(mixer.out(heads), **draws), **draws)
        if not block.has_mlp:
            return latents, no_losses(latents.shape[:1])
        real = None if mask is None else real_tokens(latents, mask[..., -count:])
        added, losses = block.feed(block.mlp_norm(latents), draws, real)
        return latents + added, losses

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None):
        unsupported("PerceiverAR", "extend", "which tokens are latents changes with every one that comes", "Use CausalLM.")
