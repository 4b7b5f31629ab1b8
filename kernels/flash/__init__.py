"""FlashAttention, once for every operation that visits pairs of queries and keys block by block on a GPU.

`triton` has one forward and two backward kernels, which take the functions of an operation as constants; `rules` has the
patterns of `subquad.kernels.patterns` as such functions; `tiles` says which blocks are visited.
"""
