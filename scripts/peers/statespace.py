"""State space layers. S4's own code is not on PyPI; S5's port to PyTorch is the nearest relative there."""

from peers import Contest
from peers.sides import Case, layer_side, make_layer, torch_side

STATE = 64


def s5(case: Case, bidirectional: bool):
    from s5 import S5

    layer = S5(case.width, bidir=bidirectional)
    return torch_side(case, layer, [case.tokens()], layer)


CONTESTS = [
    Contest(
        "s4", f"s5-pytorch layer, {mode}, {word}", "s5-pytorch",
        lambda case, m=mode, c=causal: layer_side(case, make_layer(case, "s4", mode=m, state_size=STATE, is_causal=c)),
        lambda case, c=causal: s5(case, not c),
        note=f"ours {STATE} states per feature and a gated output map; theirs one system of as many states as features",
    )
    for mode, word, causal in (("dplr", "causal", True), ("diagonal", "causal", True), ("diagonal", "full", False))
] + [
    Contest(
        "s5", f"s5-pytorch layer, {word}", "s5-pytorch",
        lambda case, c=causal: layer_side(case, make_layer(case, "s5", state_size=case.width, is_causal=c)),
        lambda case, c=causal: s5(case, not c), note="as many states as features; ours has a gated output map too",
    )
    for word, causal in (("causal", True), ("full", False))
]  # fmt: skip
