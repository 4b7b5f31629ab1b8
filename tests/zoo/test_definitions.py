"""Patterns against the papers' definitions, spelt out here query by query and key by key, without the layers' own code."""

import numpy as np
import pytest
from flax import nnx

from subquad import zoo

LENGTHS = (1, 2, 7, 8, 9, 23)


def spelt_out(heads, length, sees) -> np.ndarray:
    """bool [N, T, T]: `sees(head, query, key)` of every head, query and key."""
    return np.array([[[sees(h, t, s) for s in range(length)] for t in range(length)] for h in range(heads)], bool)


def check(layer, heads, sees):
    for length in LENGTHS:
        pattern = layer.pattern(length)
        assert pattern.dtype == bool and pattern.shape in ((1, length, length), (heads, length, length))
        want = spelt_out(heads, length, sees)
        np.testing.assert_array_equal(np.broadcast_to(pattern, want.shape), want, err_msg=f"{length} tokens")


def build(name, count, is_causal, **options):
    return zoo.make(name, in_features=4 * count, num_heads=count, is_causal=is_causal, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("given,left,right,is_causal", [
    (0, 0, 0, False), (3, 3, 3, False), ((2, 5), 2, 5, False), ((5, 2), 5, 2, False), ((4, 0), 4, 0, False),
    ([0, 3], 0, 3, False), (0, 0, 0, True), (3, 3, 0, True), ((6, 0), 6, 0, True), (100, 100, 100, False),
], ids=str)
def test_local(given, left, right, is_causal):
    """A token, `left` tokens before it and `right` after it (Longformer, section 3.1)."""
    check(build("local", 2, is_causal, window_size=given), 2, lambda h, t, s: t - left <= s <= t + right)


@pytest.mark.parametrize("heads", ["merged", "separate"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("stride", [1, 4, 5, 40])
def test_strided(heads, is_causal, stride):
    """Sparse Transformer, section 4.3: A1 = {t - l, ..., t} and A2 = {s : (t - s) mod l = 0}; mirrored where not causal."""

    def sees(head, t, s):
        if is_causal and s > t:
            return False
        near, far = abs(t - s) <= stride, (t - s) % stride == 0
        return (near or far) if heads == "merged" else (far if head % 2 else near)

    check(build("strided", 5, is_causal, stride=stride, heads=heads), 5, sees)


@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("heads", ["merged", "separate"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("stride,summary", [(4, 1), (5, 2), (6, 3), (3, 3)])
def test_fixed(heads, is_causal, distinct, stride, summary):
    """Section 4.3: A1 = {s : s // l = t // l} and A2 = {s : the last c of a block of l}; with `distinct_summary` the n-th head
    that has columns takes the n-th c from the end of the block, and begins again where a block has no more."""
    count = 6

    def columns(head):
        rank = 0
        if distinct:
            rank = (head if heads == "merged" else head // 2) % (stride // summary)
        last = stride - rank * summary
        return range(last - summary, last)

    def sees(head, t, s):
        if is_causal and s > t:
            return False
        near, far = t // stride == s // stride, s % stride in columns(head)
        return (near or far) if heads == "merged" else (far if head % 2 else near)

    options = dict(pattern="fixed", stride=stride, num_summary=summary, distinct_summary=distinct, heads=heads)
    check(build("strided", count, is_causal, **options), count, sees)


@pytest.mark.parametrize("stride,summary", [(4, 1), (15, 1), (16, 1), (32, 2), (100, 6)])
def test_fixed_has_a_sixteenth_of_the_stride_as_columns(stride, summary):
    layer = build("strided", 2, True, pattern="fixed", stride=stride, heads="separate")
    assert layer.pattern(2 * stride)[1, -1].sum() == 2 * summary


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("longest,size,shifts", [
    (24, 4, (0, 1, 2, 5)), (23, 5, (0, -1, 3, 14)), (30, 7, (-1, 12, -16, 2)), (23, 40, (0, 1, 2, 3)),
])
def test_blockwise(is_causal, longest, size, shifts):
    """BlockBERT, section 3: head h sends the queries of block i to the keys of block pi_h(i) = (i + shift_h) mod n."""
    blocks = 0
    while blocks * size < longest:
        blocks += 1

    def sees(head, t, s):
        target = t // size + shifts[head]
        while target < 0:
            target += blocks
        while target >= blocks:
            target -= blocks
        return s // size == target and not (is_causal and s > t)

    check(build("blockwise", 4, is_causal, max_length=longest, block_size=size, shifts=shifts), 4, sees)


@pytest.mark.parametrize("heads,ones,twos", [(1, 0, 0), (2, 1, 0), (3, 1, 1), (6, 1, 1), (11, 1, 1), (12, 2, 2), (24, 4, 4)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_blockwise_divides_its_heads(heads, ones, twos, is_causal):
    """Most heads stay, a sixth moves by one block and a sixth by two: forward, or back where a token sees no later one."""
    sign = -1 if is_causal else 1
    want = (0,) * (heads - ones - twos) + (sign,) * ones + (2 * sign,) * twos
    assert build("blockwise", heads, is_causal, max_length=24, block_size=4).shifts == want


@pytest.mark.parametrize("radius", [1, 3, 40])
def test_longt5(radius):
    """Section 3.1: a window. Transient global tokens hold all tokens."""
    check(build("longt5", 2, False, radius=radius, block_size=None), 2, lambda h, t, s: abs(t - s) <= radius)
    check(build("longt5", 2, False, radius=radius), 1, lambda h, t, s: True)


@pytest.mark.parametrize("radius,count", [(0, 1), (3, 0), (2, 5), (1, 40)])
def test_global(radius, count):
    """ETC, section 3.2: long tokens see those within the radius and all global ones; global tokens see all."""
    layer = build("global", 2, False, radius=radius, num_global=count)
    check(layer, 2, lambda h, t, s: abs(t - s) <= radius or min(t, s) < count)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("given,count", [(0, 1), ((2, 5), 3), (3, 0), (1, 40)])
def test_longformer(given, count, is_causal):
    """Section 3.1: a window, and `count` first tokens that see all and are seen by all; in causal attention, of the past."""
    left, right = given if isinstance(given, tuple) else (given, given)

    def sees(head, t, s):
        return (t - left <= s <= t + right or t < count or s < count) and not (is_causal and s > t)

    given = left if is_causal else given
    check(build("longformer", 2, is_causal, window_size=given, num_global=count), 2, sees)


@pytest.mark.parametrize("given,left,right,is_causal", [
    (3, 3, 3, False), ((2, 1), 2, 1, False), (2, 2, 0, True), ((6, 0), 6, 0, True), (0, 0, 0, False), (100, 100, 100, False),
], ids=str)
@pytest.mark.parametrize("dilation", [1, 2, (1, 5), (4, 3)], ids=str)
def test_diagonal(given, left, right, is_causal, dilation):
    """Longformer, section 3.1: a window with gaps of the dilation of a head less one."""

    def sees(head, t, s):
        gap = dilation[head] if isinstance(dilation, tuple) else dilation
        return s in [t + j * gap for j in range(-left, right + 1)]

    check(build("diagonal", 2, is_causal, window_size=given, dilation=dilation), 2, sees)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("axis", ["row", "column", "both"])
@pytest.mark.parametrize("length", [1, 4, 5, 40])
def test_axial(length, axis, is_causal):
    """Ho et al., section 3: the row of a pixel, or its column, of an image that is given row by row."""

    def sees(head, t, s):
        (row, column), (other_row, other_column) = divmod(t, length), divmod(s, length)
        along_row = axis == "row" or axis == "both" and head % 2 == 0
        return (row == other_row if along_row else column == other_column) and not (is_causal and s > t)

    check(build("axial", 3, is_causal, row_length=length, axis=axis), 3, sees)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size,randoms", [(4, 1), (2, 3), (1, 30)])
def test_random_draws_whole_blocks(size, randoms, is_causal):
    """As many as there are up to `randoms`; up to the query's own in causal attention."""
    pattern = build("random", 2, is_causal, max_length=24, block_size=size, num_random=randoms).pattern(24)
    blocks = pattern.reshape(2, 24 // size, size, 24 // size, size).any((2, 4))
    whole = np.repeat(np.repeat(blocks, size, 1), size, 2)
    np.testing.assert_array_equal(pattern, whole & np.tri(24, dtype=bool) if is_causal else whole)
    possible = np.arange(24 // size) + 1 if is_causal else 24 // size
    assert (blocks.sum(2) == np.minimum(randoms, possible)).all() and (not is_causal or not np.triu(blocks, 1).any())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("longest,size,count", [
    (24, 4, None), (23, 2, None), (30, 1, 4), (24, 3, 5), (40, 4, 0), (23, 40, None),
])
def test_bigbird_without_random_blocks(longest, size, count, is_causal):
    """Section 2: a window of three blocks, and the first and last block or, in the external construction, global tokens.
    What is past of that, in causal attention."""
    last = (longest - 1) // size

    def sees(head, t, s):
        i, j = t // size, s // size
        if is_causal:
            return s <= t and (i - j <= 1 or (j == 0 if count is None else s < count))
        return abs(i - j) <= 1 or ({i, j} & {0, last} != set() if count is None else min(t, s) < count)

    options = dict(max_length=longest, block_size=size, num_random=0, num_global=count)
    check(build("bigbird", 2, is_causal, **options), 2, sees)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size,randoms,count", [(4, 1, None), (2, 3, None), (1, 2, 0), (3, 9, 0)])
def test_bigbird_draws_whole_blocks(size, randoms, count, is_causal):
    """Of those that are not seen anyway, and of the past in causal attention, as many as there are up to `randoms`."""
    options, last = dict(max_length=24, block_size=size, num_global=count, random_seed=5), 24 // size - 1
    drawn, rest = (build("bigbird", 2, is_causal, num_random=n, **options).pattern(24) for n in (randoms, 0))
    drawn = (drawn & ~rest).reshape(2, last + 1, size, last + 1, size)
    np.testing.assert_array_equal(drawn.any((2, 4)), drawn.all((2, 4)))
    for head, i in np.ndindex(2, last + 1):
        seen = set(np.flatnonzero(drawn[head, i].any((0, 2))))
        possible = {j for j in range(last + 1) if (i - j > 1 if is_causal else abs(i - j) > 1)}
        if count is None:
            possible -= {0} if is_causal else possible if i in (0, last) else {0, last}
        assert seen <= possible and len(seen) == min(randoms, len(possible))


@pytest.mark.parametrize("segment,memory", [(5, 7), (4, 2), (3, 0), (1, 3), (32, 8)])
def test_transformer_xl(segment, memory):
    """Dai et al., section 3.2: the tokens of the own segment so far and the `memory` tokens before the segment."""

    def sees(head, t, s):
        first = t
        while first % segment:  # back to the first token of the segment
            first -= 1
        return first - memory <= s <= t

    check(build("transformer_xl", 2, True, segment_length=segment, memory_length=memory), 2, sees)


@pytest.mark.parametrize("segment,memory,slots,rate", [(4, 6, 3, 2), (4, 2, 1, 1), (3, 0, 2, 3), (32, 8, 2, 4)])
def test_compressive(segment, memory, slots, rate):
    """Rae et al., section 3: as Transformer-XL, and before the memory `slots` groups of `rate` tokens."""

    def sees(head, t, s):
        first = t
        while first % segment:
            first -= 1
        return first - memory - slots * rate <= s <= t

    options = dict(segment_length=segment, memory_length=memory, compressed_length=slots, rate=rate)
    check(build("compressive", 2, True, **options), 2, sees)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("width", [1, 2, 5, 8, 40])
@pytest.mark.parametrize("name", ["lightconv", "dynamicconv"])
def test_short_convolutions(name, width, is_causal):
    """Wu et al., sections 3 and 4: K tokens up to the present one, or around it, of an even number one more before it."""
    ahead = 0 if is_causal else {1: 0, 2: 0, 5: 2, 8: 3, 40: 19}[width]
    layer = zoo.make(name, in_features=8, num_heads=2, conv_width=width, is_causal=is_causal, rngs=nnx.Rngs(0))
    check(layer, 1, lambda h, t, s: s in range(t + ahead - width + 1, t + ahead + 1))


@pytest.mark.parametrize("name,options", [
    ("softmax", dict(num_heads=2)),
    ("performer", dict(num_heads=2)),
    ("reformer", dict(num_heads=2)),
    ("linear", dict(num_heads=2)),
    ("kernelized", dict(num_heads=2)),
    ("skyformer", dict(num_heads=2)),
    ("efficient", dict(num_heads=2)),
    ("rfa", dict(num_heads=2)),
    ("dpfp", dict(num_heads=2)),
    ("hedgehog", dict(num_heads=2)),
    ("h_transformer", dict(num_heads=2, block_size=2)),
    ("cosformer", dict(num_heads=2, max_length=30)),
    ("nystrom", dict(num_heads=2)),
    ("linformer", dict(num_heads=2, max_length=30)),
    ("luna", dict(num_heads=2, num_slots=5)),
    ("isab", dict(num_heads=2, num_inducing=5)),
    ("perceiver", dict(num_heads=2, num_latents=5)),
    ("memory_compressed", dict(num_heads=2)),
    ("routing", dict(num_heads=2)),
    ("smyrf", dict(num_heads=2)),
    ("informer", dict(num_heads=2)),
    ("clustered", dict(num_heads=2)),
    ("sinkhorn", dict(num_heads=2, max_length=30, block_size=4)),
    ("s4", {}), ("s5", {}), ("lru", {}), ("dss", {}), ("mega", {}), ("entmax", dict(num_heads=2)),
    ("retention", dict(num_heads=2)), ("gla", dict(num_heads=2)), ("hgrn2", dict(num_heads=2)),
    ("gsa", dict(num_heads=2, num_slots=5)), ("based", dict(num_heads=2)), ("deltanet", dict(num_heads=2)),
    ("forgetting", dict(num_heads=2)), ("differential", dict(num_heads=2)), ("mamba2", dict(head_features=4)),
    ("rwkv6", dict(head_features=4)), ("gau", dict(bias="simple", max_length=30)), ("flash", dict(chunk_size=3)),
    ("mlstm", {}), ("rwkv4", {}), ("gated_deltanet", dict(num_heads=2)), ("kda", dict(num_heads=2)),
    ("delta_product", dict(num_heads=2)), ("rwkv7", dict(head_features=4)), ("mamba", {}), ("hgrn", {}), ("h3", {}),
    ("fnet", {}), ("lsra", {}), ("rglru", dict(num_blocks=2)),
    ("hyena", dict(max_length=30)),
    ("synthesizer", dict(num_heads=2, max_length=30)),
    ("stickbreaking", dict(num_heads=2, attend_current=True)),
    ("moba", dict(num_heads=2, block_size=4)),
    ("memorizing", dict(num_heads=2, segment_length=4)),
    ("infini", dict(num_heads=2, segment_length=4)),
    ("nsa", dict(num_heads=2, block_size=4, compression_size=4, compression_stride=2)),
], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_all_others_may_see_all(name, options, is_causal):
    supports = zoo.LAYERS[name].supports
    if not (supports.causal if is_causal else supports.bidirectional):
        pytest.skip("not in this direction")
    layer = zoo.make(name, in_features=8, is_causal=is_causal, rngs=nnx.Rngs(0), **options)
    check(layer, 1, lambda h, t, s: s <= t or not is_causal)
