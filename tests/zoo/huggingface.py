"""Small random models of Hugging Face, run: for the files in tests/oracles/huggingface, and live where they are installed.

The files are written by `python -m tests.zoo.huggingface [name ...]` where `torch` and `transformers` are: those of Mega with
4.46, the last that has it, all others with 5.24. Weights are drawn larger than they start, so that every layer matters.
"""

import json
import sys
from types import SimpleNamespace

import numpy as np

from tests import oracle

FOLDER = oracle.HERE / "huggingface"
BERT = dict(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.0,
)  # fmt: skip
T5 = dict(
    vocab_size=40, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=2, local_radius=7, global_block_size=4,
    relative_attention_num_buckets=8, relative_attention_max_distance=20,
)  # fmt: skip
REFORMER = dict(
    vocab_size=40, hidden_size=16, num_attention_heads=2, attention_head_size=6, feed_forward_size=24, hash_seed=0,
    max_position_embeddings=64, lsh_attn_chunk_length=8, num_buckets=4, num_hashes=2, hidden_act="relu", use_cache=False,
)  # fmt: skip
MEGA = dict(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, intermediate_size=24, ema_projection_size=4,
    shared_representation_size=8, nffn_hidden_size=20, max_positions=40,
)  # fmt: skip
# The class of transformers, its config, tokens of each sample, and what else is given in a call.
MODELS = {
    "fnet": ("FNetForMaskedLM", {**BERT, "max_position_embeddings": 48, "hidden_act": "gelu_new"}, (37, 37), {}),
    "nystromformer": (
        "NystromformerForMaskedLM",
        {**BERT, "max_position_embeddings": 32, "segment_means_seq_len": 32, "num_landmarks": 8, "conv_kernel_size": 5},
        (32, 32), {},
    ),
    "longformer": (
        "LongformerForMaskedLM",
        {**BERT, "max_position_embeddings": 50, "attention_window": [4, 8], "type_vocab_size": 2, "hidden_act": "gelu"},
        (41, 30), {},
    ),
    "longformer_global": (
        "LongformerForMaskedLM", {**BERT, "max_position_embeddings": 50, "attention_window": [4, 8]}, (41, 30),
        {"num_global": 3},
    ),
    "big_bird": (
        "BigBirdForMaskedLM",
        {**BERT, "max_position_embeddings": 64, "block_size": 4, "num_random_blocks": 2, "hidden_act": "gelu_new"},
        (61, 50), {},
    ),
    "big_bird_short": (
        "BigBirdModel",
        {**BERT, "max_position_embeddings": 64, "block_size": 4, "num_random_blocks": 2, "rescale_embeddings": True},
        (36, 20), {},
    ),
    "longt5": (
        "LongT5EncoderModel", {**T5, "encoder_attention_type": "transient-global", "feed_forward_proj": "gated-gelu"},
        (37, 21), {},
    ),
    "mega": ("MegaForMaskedLM", {**MEGA, "normalization_type": "scalenorm", "add_token_type_embeddings": True}, (37, 21), {}),
    "mega_chunks": (
        "MegaForCausalLM",
        {**MEGA, "normalization_type": "layernorm", "use_chunking": True, "chunk_size": 8, "attention_activation": "laplace",
         "relative_positional_bias": "simple", "add_lm_hidden_dense_layer": False, "is_decoder": True, "bidirectional": False,
         "use_cache": False},
        (32, 32), {},
    ),
    "reformer": (
        "ReformerModelWithLMHead",
        {**REFORMER, "is_decoder": True, "attn_layers": ["local", "lsh", "local", "lsh"], "axial_pos_shape": [4, 16],
         "axial_pos_embds_dim": [4, 12], "local_attn_chunk_length": 4},
        (60, 41), {},
    ),
    "reformer_lsh": (
        "ReformerModel",
        {**REFORMER, "attn_layers": ["lsh", "lsh"], "axial_pos_embds": False, "num_buckets": [2, 4], "lsh_num_chunks_after": 1},
        (64, 64), {},
    ),
    "longt5_local": ("LongT5EncoderModel", {**T5, "feed_forward_proj": "relu"}, (37, 21), {}),
}  # fmt: skip


def run(name: str) -> SimpleNamespace:
    """The model `name` run by `transformers`: as `oracle.load` has it, the config in `.meta`."""
    import torch
    import transformers

    torch.manual_seed(0)
    kind, config, lengths, call = MODELS[name]
    kind = getattr(transformers, kind)
    model = kind(kind.config_class(**config)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 2 and "weight" in key:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model = model.double()
    rng = np.random.default_rng(0)
    inputs = {"tokens": rng.integers(5, config["vocab_size"], (len(lengths), max(lengths)))}
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    given = {}
    if not mask.all():
        inputs["mask"] = mask
        inputs["tokens"][~mask] = model.config.pad_token_id
        given["attention_mask"] = torch.tensor(mask.astype(int))
    if getattr(model.config, "type_vocab_size", 1) > 1 and getattr(model.config, "add_token_type_embeddings", True):
        inputs["token_types"] = rng.integers(0, 2, mask.shape)
        given["token_type_ids"] = torch.tensor(inputs["token_types"])
    if "num_global" in call:
        is_global = np.arange(mask.shape[1]) < call["num_global"]
        given["global_attention_mask"] = torch.tensor(np.broadcast_to(is_global, mask.shape).astype(int))
    each = []
    for i in range(len(lengths)):  # one by one: a Nystromformer's samples depend on each other
        with torch.no_grad():
            results = model(
                torch.tensor(inputs["tokens"][i : i + 1]), **{word: array[i : i + 1] for word, array in given.items()},
            )  # fmt: skip
        each.append(np.where(mask[i][:, None], results[0][0].numpy(), 0))
    constants = {}
    if "num_hashes" in config:  # what every layer draws in every call
        torch.manual_seed(config["hash_seed"])
        rotations = sum(np.atleast_1d(config["num_buckets"])) // 2
        shape = config["num_attention_heads"], config["attention_head_size"], config["num_hashes"], rotations
        constants["rotations"] = torch.randn(shape, dtype=torch.double).numpy().astype(np.float32)
    weights = {key: value.float().numpy() for key, value in model.state_dict().items()}
    meta = {"peer": "transformers", "version": transformers.__version__, "config": model.config.to_dict(), "call": call}
    outputs = {"y": np.stack(each).astype(np.float32)}
    return SimpleNamespace(name=name, meta=meta, inputs=inputs, weights=weights, constants=constants, outputs=outputs)


def write(name: str) -> None:
    peer = run(name)
    groups = {group: getattr(peer, oracle.GROUPS[group]) for group in ("in", "w", "const", "out")}
    arrays = {f"{group}/{key}": array for group, named in groups.items() for key, array in named.items()}
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / f"{name}.npz", meta=json.dumps(peer.meta, default=str), **arrays)


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        write(name)
