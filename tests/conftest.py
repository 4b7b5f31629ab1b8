import os

# Before jax is imported: the suite runs on the CPU wherever it runs, unless the caller names a platform.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
