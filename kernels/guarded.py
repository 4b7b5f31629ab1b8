"""NumPy arrays between margins of poison, in the shape that Triton's interpreter expects of a tensor."""

import numpy as np

# Triton's names of dtypes.
DTYPE_NAMES = dict(
    float32="fp32", float64="fp64", float16="fp16", bfloat16="bf16", bool="i1", int8="i8", int16="i16", int32="i32",
    int64="i64", uint8="u8", uint16="u16", uint32="u32", uint64="u64",
)  # fmt: skip
GUARD = 256  # bytes of poison before and after every array


class Guarded:
    """What Triton's interpreter asks of a tensor, on a NumPy array that lies between two margins of poison."""

    def __init__(self, shape, dtype, content=None):
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        # All ones is NaN in every floating type, and an index that is out of range in every signed one.
        self.arena = np.full(size + 2 * GUARD + 64, 0xFF, np.uint8)
        start = GUARD + -(self.arena.__array_interface__["data"][0] + GUARD) % 64
        self.inside = slice(start, start + size)
        self.array = self.arena[self.inside].view(dtype).reshape(shape)
        if content is not None:
            self.array[...] = content
        self.dtype, self.shape = DTYPE_NAMES[dtype.name], tuple(shape)

    def overrun(self) -> bool:
        """Whether anything was written outside of the array."""
        outside = np.ones(self.arena.shape, bool)
        outside[self.inside] = False
        return bool((self.arena[outside] != 0xFF).any())

    def data_ptr(self):
        return self.array.__array_interface__["data"][0]

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def copy_(self, other):
        pass

    def storage_offset(self):
        return 0

    def size(self):
        return self.shape

    def stride(self):
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def new_empty(self, *sizes, **options):
        return object.__new__(Guarded)

    def set_(self, storage, *view):
        self.__dict__.update(storage.__dict__)
