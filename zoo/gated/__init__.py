"""Gated: linear attention whose state fades, so that what is old makes room for what is new.

The state is a matrix, of one size whatever came before: keys say where a value is written, queries what is read, and a decay
how long it stays. A norm of what is read stands in the place of a denominator.

Choose
    retention: For text at the least cost: how fast a head fades is fixed, and queries and keys are rotated.
    gla: For text: each token chooses, channel by channel, what fades.
    hgrn2: For the same with a projection less: what a token forgets is where it writes.
    gsa: For single tokens of a long past in a small state: softmax attention to slots that take them up.
"""
