"""Hierarchical: near keys one by one, far keys as means of groups, the larger the farther they are.

Nothing is cut off and nothing is chosen: a query sees every key, in as many numbers as the logarithm of the length.

Choose
    h_transformer: For whole sequences at a cost below quadratic, where what is far counts by its mean.
"""
