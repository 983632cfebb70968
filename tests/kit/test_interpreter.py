"""The shortcut through Triton's interpreter: the same bits, and the language as it was before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of Triton's interpreter")


@triton.jit
def _softmax(x):
    e = tl.exp(x - tl.max(x, axis=1)[:, None])
    return e / tl.sum(e, axis=1)[:, None]


@triton.jit
def _kernel(x, y, FAILS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    places = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tile = tl.load(x + places)
    for _ in tl.static_range(3):
        tile = _softmax(tile)
        tl.static_assert(not FAILS)
    tl.store(y + places, tile)


def _run(fails: bool = False) -> torch.Tensor:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    y = torch.full_like(x, torch.nan)
    _kernel[(2,)](x, y, fails, 4, 8)
    return y


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What of the language is looked through."""
    seen: list[Any] = []
    patch_builtin: Callable = interpreter._patch_builtin

    def watched(package: Any, *args: Any) -> None:
        seen.append(package)
        patch_builtin(package, *args)

    monkeypatch.setattr(interpreter, "_patch_builtin", watched)
    return seen


def test_same_bits_with_fewer_searches(
    searches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _run()
    # For the kernel, and for Triton's own functions, which may know the language's core as well.
    assert 1 <= searches.count(tl) <= 2
    monkeypatch.setattr(interpreter, "_patch_lang", interpreter._patch_lang.__wrapped__)
    assert torch.equal(_run(), found)
    assert searches.count(tl) > 4, "the shortcut has nothing left to save"
    torch.testing.assert_close(found.sum(1), torch.ones(4))


@pytest.mark.parametrize("fails", [False, True])
def test_language_is_as_before_and_ready_for_the_next_kernel(fails: bool) -> None:
    before = (tl.load, tl.static_range, tl.tensor.__add__, tl.dtype.to_ir)
    if fails:
        with pytest.raises(interpreter.InterpreterError):
            _run(fails=True)
    else:
        _run()
    assert (tl.load, tl.static_range, tl.tensor.__add__, tl.dtype.to_ir) == before
    assert _run().isfinite().all()
