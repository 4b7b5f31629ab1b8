"""Dense softmax attention: PyTorch's fused kernel."""

from peers import Contest
from peers.sides import Case, jax_side, torch_side


def ours(case: Case, is_causal: bool):
    from subquad.kernels import softmax

    return jax_side(case, lambda q, k, v: softmax.attention(q, k, v, is_causal=is_causal), case.draw(3))


def sdpa(case: Case, is_causal: bool):
    from torch.nn import functional

    return torch_side(
        case, lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal), case.draw(3),
        heads_first=True,
    )  # fmt: skip


CONTESTS = [
    Contest(
        "dense", f"fused SDPA, {word}", "torch", lambda case, c=causal: ours(case, c), lambda case, c=causal: sdpa(case, c),
        same=True, devices=("cpu", "gpu"),
    )
    for word, causal in (("full", False), ("causal", True))
]  # fmt: skip
