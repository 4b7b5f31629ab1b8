"""Gated: linear attention whose state decays, so that what is old makes room for what is new.

The state is a matrix, of one size whatever came before: keys say where a value is written, queries what is read, and a decay
how fast it fades.
"""
