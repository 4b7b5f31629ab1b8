"""From a config and a state dict of Hugging Face to a model of this library."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from subquad.zoo.checks import refuse
from subquad.zoo.interop import bert, longt5, mega, reformer
from subquad.zoo.interop.loading import OWNER, Names, load
from subquad.zoo.interop.published import Published


class Family(NamedTuple):
    """What is known of one `model_type`.

    Args:
        build: the model of a config.
        names: of its parameters; or a function of the config that knows them.
        prefix: before the names of its encoder, where it has a head.
        heads: keys of which any says that the checkpoint has a language head.
    """

    build: Callable[..., Published]
    names: Names | Callable[..., Names]
    prefix: str
    heads: tuple[str, ...]


MASKED = ("cls.predictions.transform.dense.weight",)
FAMILIES = {
    "big_bird": Family(bert.big_bird, bert.BIG_BIRD_NAMES, "bert.", MASKED),
    "fnet": Family(bert.fnet, bert.FNET_NAMES, "fnet.", MASKED),
    "longformer": Family(bert.longformer, bert.LONGFORMER_NAMES, "longformer.", ("lm_head.dense.weight",)),
    "longt5": Family(longt5.build, longt5.names, "", ()),
    "mega": Family(mega.build, mega.names, "mega.", ("mlm_head.bias", "lm_head.bias")),
    "nystromformer": Family(bert.nystromformer, bert.NYSTROM_NAMES, "nystromformer.", MASKED),
    "reformer": Family(reformer.build, reformer.NAMES, "reformer.", ("lm_head.decoder.weight",)),
}


class Loaded(NamedTuple):
    """A model with a checkpoint's weights, and the keys of the state dict that it has no use for.

    Args:
        model: tokens [B, T] -> logits [B, T, vocab_size] where the checkpoint has a language head, else features [B, T, F];
            `model.encoder` gives features in any case.
        unused: poolers and heads for other tasks, above all.
    """

    model: Published
    unused: tuple[str, ...]


def from_huggingface(
    config: Mapping[str, Any], state: Mapping[str, Any], *, mixer_options: Mapping[str, Any] | None = None, dtype: Any = None,
    param_dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None,
) -> Loaded:  # fmt: skip
    """A published checkpoint as a model of this library, which computes what `transformers` does in evaluation.

    Neither `transformers` nor `torch` is needed: the config is the content of config.json, the state that of
    model.safetensors, read by `safetensors.numpy.load_file`, or of pytorch_model.bin with arrays for tensors.

    Args:
        config: by its "model_type": "big_bird", "fnet", "longformer", "longt5" (the encoder), "mega", "nystromformer",
            "reformer".
        state: arrays by name, anything that `numpy.asarray` takes.
        mixer_options: of every mixer, and outrank the config: `implementation` of all; for a Longformer `num_global`, how
            many tokens in front are global (0, as where `transformers` is given no global_attention_mask).
        dtype, param_dtype: of the computation and of the parameters.
        rngs: draws what a checkpoint does not hold: a Reformer's rotations. None: `nnx.Rngs(0)`.
    Call of the model:
        tokens: [B, T] integers.  mask: [B, T], True = a real token.  token_types: [B, T] integers, where the checkpoint knows
            them; None: all 0.  deterministic, rngs: as of `Encoder`: without dropout, unless `model.train()`.
    Differs from transformers: positions, windows, blocks, landmarks and transforms are those of real tokens; there an FNet
        transforms the padding too, so leave its mask out to compute the same. A Nystromformer computes for each sample what
        it does there for a batch of that sample alone, and needs no certain length. Dropout is of outputs, not of attention
        weights. A Reformer's rotations are drawn once, and not in each call.
    Raises: ValueError: an unknown model_type; an entry of the config that is missing, or asks for what no layer here does; a
        key of the state that is missing, or has another shape.
    Example:
        import json, safetensors.numpy
        config = json.load(open("longformer-base-4096/config.json"))
        state = safetensors.numpy.load_file("longformer-base-4096/model.safetensors")
        model, unused = interop.from_huggingface(config, state, mixer_options=dict(num_global=1))
    """
    name = config.get("model_type")
    if name not in FAMILIES:
        refuse(OWNER, "config['model_type']", repr(name), f"be one of {', '.join(sorted(FAMILIES))}",
               "Other models are not written down here.")
    family, dtypes = FAMILIES[name], dict(dtype=dtype, param_dtype=param_dtype)
    model = family.build(
        config, {**dtypes, **(mixer_options or {})}, has_head=any(key in state for key in family.heads), **dtypes,
        rngs=nnx.Rngs(0) if rngs is None else rngs,
    )
    names = family.names(config) if callable(family.names) else family.names
    return Loaded(model, load(model, names, state, family.prefix))
