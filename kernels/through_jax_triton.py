"""Launches through jax-triton, and what its versions need mended."""

import functools
import os
import types

from jax.interpreters import partial_eval

from subquad.kernels import gpu

PTX_VERSION = 87  # the newest that CUDA 12.8 drivers know; newer Triton would emit what an older driver refuses


def call(kernel, grid, constants, config, shapes, places, arrays):
    """Launches a kernel on the GPU. `places`: {input: output} that share memory, by number; the rest is as in `launch.call`."""
    jax_triton = library()
    options = dict(
        kernel=kernel,
        grid=(grid,),
        name=kernel.__name__,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        compute_capability=gpu.capability(),
        input_output_aliases=places or None,
    )
    if hasattr(jax_triton, "CUSTOM_CALL_TARGET_NAME"):  # 0.4
        # An aliased output is an operand itself: its input is given a second time, in its place.
        pointers = [name for name in kernel.arg_names if name not in constants]
        options |= {pointers[len(arrays) + target]: arrays[source] for source, target in places.items()}
        operands = sorted(places.values())
        options["input_output_aliases"] = {len(arrays) + operands.index(target): target for target in operands} or None
        options |= dict(out_type=list(shapes), backend_options=dict(ptx_version=PTX_VERSION, enable_fp_fusion=True))
    else:
        options |= dict(out_shape=list(shapes), enable_fp_fusion=True)
    return jax_triton.triton_call(*arrays, **options, **constants)


@functools.cache
def library():
    """jax-triton, mended where its versions and those of Triton do not fit."""
    import triton.backends.nvidia.driver as driver

    if not hasattr(driver, "TMA_TF32"):  # jax-triton 0.4 looks for it in Triton 3.6 and gives up all of NVIDIA without it
        driver.TMA_TF32 = 11
    cache = os.environ.get("TRITON_CACHE_DIR")
    import jax_triton

    # Both versions change the variable while they are imported; it is the user's.
    os.environ.pop("TRITON_CACHE_DIR", None)
    if cache is not None:
        os.environ["TRITON_CACHE_DIR"] = cache
    if hasattr(jax_triton, "CUSTOM_CALL_TARGET_NAME"):
        # Its rule for dropping what is not used lacks an argument of JAX 0.12's; JAX's own serves where nothing is a Ref.
        partial_eval.dce_rules.pop(jax_triton.triton_lib.triton_kernel_call_p, None)
    else:
        pin_ptx()
    return jax_triton


def pin_ptx() -> None:
    """jax-triton 0.3 has no option for the PTX version; its own copy of the backend gets one."""
    from jax_triton import triton_lib

    class Backend(triton_lib.cb.CUDABackend):
        def parse_options(self, options):
            return super().parse_options({**options, "ptx_version": PTX_VERSION})

    triton_lib.cb = types.SimpleNamespace(**{**vars(triton_lib.cb), "CUDABackend": Backend})
