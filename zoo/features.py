"""Random features: the variable type that holds them, outside the optimiser and inside the checkpoint."""

from flax import nnx


class RandomFeature(nnx.Variable):
    """Fixed random numbers that a layer was built with: projections, hash rotations, random blocks.

    Not an `nnx.Param`, so `nnx.Optimizer(model, tx, wrt=nnx.Param)` leaves it alone; part of `nnx.state(model)`, so a
    checkpoint brings it back.
    """
