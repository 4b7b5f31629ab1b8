"""Gated: linear attention whose state fades, so that what is old makes room for what is new.

The state is a matrix, of one size whatever came before: keys say where a value is written, queries what is read, and a decay
how long it stays. In most a norm of what is read stands in the place of a denominator.

Choose
    retention: For text at the least cost: how fast a head fades is fixed, and queries and keys are rotated.
    gla: For text: each token chooses, channel by channel, what fades.
    hgrn2: For the same with a projection less: what a token forgets is where it writes.
    mamba2: For text and signals: a state space model of one decay for each head, with a large state at little cost.
    rwkv6: For text: each token chooses what fades, channel by channel, and is mixed with the one before it.
    mlstm: For text in which a token may outweigh all before it: input gates are exponentials, of any size.
    rwkv4: For the cheapest generation: a mean that fades, of three numbers for each channel.
    gsa: For single tokens of a long past in a small state: softmax attention to slots that take them up.
"""
