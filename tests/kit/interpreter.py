"""Triton's interpreter, without what it does anew for every function that a kernel calls.

The interpreter puts its own functions into `triton.language` before it runs a kernel and takes
them out afterwards. For every call of a `@triton.jit` function within the kernel it looks through
all of `triton.language` again, although nothing is left to be replaced: half of a kernel's time.

And with what Triton 3.6 lacks for NumPy 2.4: loops whose bounds a kernel is given.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_interpreter() -> None:
    """Let functions that a kernel calls take `triton.language` as the kernel has left it.

    A scalar, for the interpreter an array with one element, becomes the bound of a loop.
    """
    patch_lang, patch_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor
    if hasattr(patch_lang, "__wrapped__"):
        return
    patched: list[Any] = []  # modules, while a kernel runs

    def patch_lang_if_needed(fn: Any) -> Any:
        values = fn.__globals__.values()
        seen = [lang for lang in (tl, tl.core) if any(value is lang for value in values)]
        if seen and all(lang in patched for lang in seen):
            return interpreter._LangPatchScope()
        scope = patch_lang(fn)
        patched.extend(seen)
        restore = scope.restore

        def restore_and_forget() -> None:
            patched.clear()
            restore()

        scope.restore = restore_and_forget  # called where a kernel ends, and nowhere else
        return scope

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    patch_lang_if_needed.__wrapped__ = patch_lang  # type: ignore[attr-defined]
    interpreter._patch_lang = patch_lang_if_needed
    interpreter._patch_lang_tensor = patch_tensor_and_index
