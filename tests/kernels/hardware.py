"""Make Triton's interpreter round as a GPU does; importing this module is enough.

By itself it truncates float32 to bfloat16 where the hardware rounds to the nearest, and multiplies tf32
operands exactly where tensor cores ignore the last 13 bits.
"""

import numpy as np
from osscl_kernels import backend

if backend.INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounded(values, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
        nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(bits.astype(np.uint32).view(np.float32)), np.uint16(0x7FC0), nearest)

    def truncated(handle):
        if handle.data.dtype != np.float32:
            return handle
        bits = np.ascontiguousarray(handle.data).view(np.uint32) & np.uint32(0xFFFFE000)
        return interpreter.TensorHandle(bits.view(np.float32), handle.dtype.scalar)

    def multiplied(self, a, b, d, precision, imprecise):
        if str(precision).rpartition(".")[2].upper() == "TF32":
            a, b = truncated(a), truncated(b)
        return dot(self, a, b, d, precision, imprecise)

    interpreter._convert_float = rounded
    interpreter.InterpreterBuilder.create_dot = multiplied
