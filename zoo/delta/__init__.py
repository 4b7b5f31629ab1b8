"""Delta: linear attention whose state corrects itself, so that a new value takes the place of the old one under its key.

The state is a matrix, of one size whatever came before. What a key reads of it is compared with what it should read, and the
difference is written: one step of gradient descent on |S^T k - v|^2 / 2, at a rate that the token chooses.

Choose
    deltanet: For recall from a small state: keys overwrite, and nothing fades.
    gated_deltanet: For text: the same, and a token may forget everything; the first to try.
    kda: For the same with a decay of each channel, so that some things are kept for long.
    delta_product: For states that are tracked, as in permutations: several writes a token, at so many times the cost.
    rwkv7: For text and states that are tracked: what is erased and what is written are under two keys, channel by channel.
"""
