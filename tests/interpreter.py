"""Triton's interpreter, without work that it repeats for each operation of each program."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def speed_up() -> None:
    """Make it faster, for the same results, in a process that compiles no kernel."""
    patched: Any = interpreter
    # It builds a table of all dtypes at each call.
    dtype_of_scalar = functools.cache(patched._get_np_dtype)

    def get_np_dtype(dtype: Any) -> Any:
        if isinstance(dtype, tl.block_type):
            dtype = dtype.element_ty
        return np.dtype(np.uint64) if isinstance(dtype, tl.pointer_type) else dtype_of_scalar(dtype)

    patched._get_np_dtype = get_np_dtype
    # It replaces functions of triton.language at each launch, and at each call of a function by a
    # kernel; here once and for all.
    patched._patch_attr = _call_directly
    patched._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    patched._patch_lang = lambda function: patched._LangPatchScope()
    builder = patched.interpreter_builder
    # It computes whether integers overflow, but says so only with `debug`.
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    _remember_shapes()
    _broadcast_only_other_shapes()
    patched_tl: Any = tl
    patched_tl.sort = functools.partial(_sort, patched.TensorHandle)
    patched_tl.topk = functools.partial(_topk, patched.TensorHandle)
    patched.ScanOps.generic_scan = _scan


def _call_directly(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """Replace a function of triton.language without the checks that others wrap it in."""
    function = getattr(member, "__wrapped__", member)
    semantic = interpreter.interpreter_semantic

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return function(*args, **kwargs)

    scope.set_attr(owner, name, call)


def _remember_shapes() -> None:
    """Check and wrap each shape once, and not again for each tensor."""
    block_type, tensor = (cls.__init__ for cls in (tl.block_type, tl.tensor))
    blocks: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, dict[str, Any]] = {}

    def attributes_of_tensors(type: Any) -> dict[str, Any]:
        example: Any = object.__new__(tl.tensor)
        tensor(example, None, type)
        return {"shape": example.shape, "numel": example.numel}

    def init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([getattr(size, "value", size) for size in shape])
        key = (element_ty.name, getattr(element_ty, "address_space", None), sizes)
        if key not in blocks:
            block_type(self, element_ty, shape)
            if sizes not in shapes:
                shapes[sizes] = attributes_of_tensors(self)
            self.of_tensors = shapes[sizes]
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    of_scalars = attributes_of_tensors(tl.int32)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        shape = type.of_tensors if isinstance(type, tl.block_type) else of_scalars
        vars(self).update(shape, handle=handle, type=type, dtype=type.scalar)

    patched: Any = tl
    patched.block_type.__init__, patched.tensor.__init__ = init_block_type, init_tensor


def _broadcast_only_other_shapes() -> None:
    """Leave operands of the same shape as they are; the original makes views of both."""
    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    patched: Any = TritonSemantic
    patched.broadcast_impl_value = broadcast_impl_value


def _sort(handle_of: Any, x: Any, dim: Any = None, descending: bool = False) -> Any:
    """Sort the last dimension; the original interprets a network of comparisons."""
    data = np.sort(x.handle.data, axis=-1)
    if descending:
        data = np.flip(data, axis=-1)
    return tl.tensor(handle_of(data, x.handle.dtype), x.type)


def _topk(handle_of: Any, x: Any, k: int) -> Any:
    """Largest `k` of the last dimension, largest first."""
    data = np.flip(np.sort(x.handle.data, axis=-1), axis=-1)[..., :k]
    return tl.tensor(handle_of(data, x.handle.dtype), tl.block_type(x.dtype, list(data.shape)))


def _scan(self: Any, inputs: Any) -> list[Any]:
    """Scan along an axis in its order, all other indices at a time; the original one by one."""
    axis = self.axis
    arrays = [np.moveaxis(one.handle.data, axis, 0) for one in inputs]
    dtypes = [one.dtype for one in inputs]
    scanned = [np.zeros_like(array) for array in arrays]
    before: tuple[Any, ...] = ()
    for place in range(len(arrays[0])):
        found = tuple(
            self.to_tensor(array[place], dtype) for array, dtype in zip(arrays, dtypes, strict=True)
        )
        if before:
            found = self.combine_fn.fn(*before, *found)
            found = found if isinstance(found, tuple) else (found,)
        before = found
        for array, one in zip(scanned, found, strict=True):
            array[place] = one.handle.data.reshape(array[place].shape)
    results = zip(scanned, dtypes, strict=True)
    return [self.to_tensor(np.moveaxis(array, 0, axis), dtype) for array, dtype in results]
