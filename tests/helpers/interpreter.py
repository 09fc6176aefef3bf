"""Triton's interpreter, twice as fast: some of its functions do the same work again at every operation of a kernel."""

import inspect
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def speed_up() -> None:
    """Look for builtins and modules once for each module, for numpy's dtypes once for each of Triton's, and build the
    shapes of tensors once for each shape.

    What a kernel computes stays the same. Where Triton has no such functions, nothing is replaced.
    """
    _look_up_once()
    _build_shapes_once()


def _look_up_once() -> None:
    if not all(hasattr(interpreter, name) for name in ("_patch_builtin", "_get_np_dtype", "_patch_lang")):
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

    patch_lang = interpreter._patch_lang
    modules: dict[int, SimpleNamespace] = {}

    def patch_modules(function):
        """Looks through a module's names at every call of a function of it, for two modules."""
        key = id(function.__globals__)
        if key not in modules:
            found = {name: value for name, value in function.__globals__.items() if inspect.ismodule(value)}
            modules[key] = SimpleNamespace(__globals__=found, kept=function.__globals__)  # or its id is given again
        return patch_lang(modules[key])

    interpreter._patch_lang = patch_modules


def _build_shapes_once() -> None:
    """A shape is a tuple of constants, each with a type, and that of a block is checked."""
    tensor, block = tl.core.tensor, tl.core.block_type
    init_tensor, init_block = tensor.__init__, block.__init__
    of_tensors: dict[tuple[int, ...], tuple[tl.constexpr, tl.tuple]] = {}
    of_blocks: dict[tuple[int, ...], tuple[tl.tuple, int, str]] = {}

    def new_tensor(self, handle, type):
        shape = tuple(getattr(type.shape, "values", type.shape)) if type.is_block() else ()
        if shape not in of_tensors:
            init_tensor(self, handle, type)
            of_tensors[shape] = self.numel, self.shape
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = of_tensors[shape]

    def new_block(self, element_ty, shape):
        sizes = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
        if sizes not in of_blocks:
            init_block(self, element_ty, shape)  # refuses what is no shape
            of_blocks[sizes] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, written = of_blocks[sizes]
        self.name = f"<{written}, {element_ty}>"

    tensor.__init__, block.__init__ = new_tensor, new_block
