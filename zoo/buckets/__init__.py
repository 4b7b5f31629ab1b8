"""Buckets: a query sees the keys that their contents put into its bucket.

Hashing, sorting or clustering decides which keys are worth a look, so that the right one is found wherever it stands, if the
rule finds it. A rule that reads the whole text also reads the future: the docstring of a causal layer says what leaks, or why
nothing does.

Choose
    reformer: For single keys anywhere in a long text; queries and keys are one projection.
    routing: For topics: texts whose tokens fall into groups that stay the same from text to text, as centroids learn them.
    sinkhorn: For whole blocks that concern each other, up to a length known before; strictly causal.
    smyrf: For queries and keys with projections of their own, of a model trained with softmax, too; not causal.
    informer: For texts of which few places ask for anything in particular; cheap, and not causal.
    clustered: For many queries that want the same, also of a model trained with softmax; not causal.
    moba: For language models on long texts, also trained with softmax before: whole blocks, chosen by query; strictly causal.
    nsa: For language models that are trained sparse from the start, with few heads of keys; its parts see near, far and coarse.
"""
