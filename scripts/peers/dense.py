"""Dense softmax attention against PyTorch's fused kernel; entmax; the Fourier transform."""

from peers import Contest
from peers.sides import Case, jax_side, layer_side, make_layer, mechanism_side, torch_side


def ours(case: Case, is_causal: bool):
    from subquad.kernels import softmax

    return jax_side(case, lambda q, k, v: softmax.attention(q, k, v, is_causal=is_causal), case.draw(3))


def sdpa(case: Case, is_causal: bool):
    from torch.nn import functional

    return torch_side(
        case, lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal), case.draw(3),
        heads_first=True,
    )  # fmt: skip


def ours_entmax(case: Case):
    return mechanism_side(case, make_layer(case, "entmax", alpha=1.5))


def entmax(case: Case):
    import torch
    from entmax import entmax15

    def attend(query, key, value):
        logits = torch.einsum("bnth,bnsh->bnts", query, key) * case.features**-0.5
        return torch.einsum("bnts,bnsh->bnth", entmax15(logits, dim=-1), value)

    return torch_side(case, attend, case.draw(3), heads_first=True)


def fourier(case: Case):
    from transformers import FNetConfig
    from transformers.models.fnet.modeling_fnet import FNetFourierTransform

    config = FNetConfig(hidden_size=case.width, use_tpu_fourier_optimizations=False)
    layer = FNetFourierTransform(config).self
    return torch_side(case, lambda tokens: layer(tokens)[0], [case.tokens()])


CONTESTS = [
    Contest(
        "dense", f"fused SDPA, {word}", "torch", lambda case, c=causal: ours(case, c), lambda case, c=causal: sdpa(case, c),
        same=True, devices=("cpu", "gpu"),
    )
    for word, causal in (("full", False), ("causal", True))
] + [
    Contest(
        "entmax", "entmax, 1.5", "entmax", ours_entmax, entmax, same=True, longest=4096,
        why="its logits, and what sorts them, take 4 GB a copy at 16384",
    ),
    Contest(
        "fnet", "Hugging Face layer", "transformers", lambda case: layer_side(case, make_layer(case, "fnet")), fourier,
        same=True,
    ),
]  # fmt: skip
