"""Recurrent: exact attention within a segment, and a memory of the segments before it.

A token costs the same whatever came before, and information travels back one memory per layer. Causal only.

Choose
    transformer_xl: For language models on streams; its positions are distances, so that no length is too long.
    compressive: For memories that reach farther at the same cost, in less detail.
    infini: For streams without end in a state of fixed size: what is far is read by linear attention.
    memorizing: For single facts from far back, word for word, at the cost of a search through all that came before.
"""
