"""The import root: `subquad.kernels`, `subquad.zoo` and `subquad.lra` are the folders beside this one."""

__version__ = "0.1.0"
