"""Diagnostic tasks: one generator each, drawn while it is read; `configs` lists them."""
