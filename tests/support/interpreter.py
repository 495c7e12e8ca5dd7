"""Faults of the interpreter of Triton 3.6, put right where kernels are tested in it."""

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


def repair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indices are numbers, a product of bfloat16 is not one of its bits, and conversions are exact
    or rounded."""
    builder = interpreter.InterpreterBuilder
    patch, product, cast = interpreter._patch_lang_tensor, builder.create_dot, builder.cast_impl

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        # NumPy 2.4 makes no index of an array of one element.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return product(self, _widened(self, a), _widened(self, b), *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        kinds = (source.dtype.scalar, target.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            # Subnormal numbers would be lost.
            bits = np.array(source.data).view(np.uint16).astype(np.uint32) << 16
            return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
        if kinds != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        # What is to be rounded to nearest would be cut off.
        rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16)
        bits = rounded.view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(bits, tl.bfloat16)

    language = interpreter._patch_lang

    def patched_once(function: Any) -> Any:
        # It would be done for every call of a function within a kernel: half of all the time.
        used = [module for module in (tl, tl.core) if module in function.__globals__.values()]
        done = not any(tl.core.is_builtin(module.load) for module in used)
        return interpreter._LangPatchScope() if done else language(function)

    monkeypatch.setattr(interpreter, "_patch_lang", patched_once)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    monkeypatch.setattr(builder, "create_dot", create_dot)
    monkeypatch.setattr(builder, "cast_impl", cast_impl)


def _widened(builder: Any, x: Any) -> Any:
    if x.dtype.scalar != tl.bfloat16:
        return x
    return builder.cast_impl(x, tl.block_type(tl.float32, list(x.data.shape)))
