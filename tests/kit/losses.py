"""Losses called with their options as arguments, which tests change one at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from hydra_kernels.linear_kl import LinearKLOutput, LossOptions

_NAMES = {field.name for field in fields(LossOptions)}


def with_options(function: Callable[..., LinearKLOutput]) -> Callable[..., LinearKLOutput]:
    """The function, whose `loss` is made of the arguments that are fields of it."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> LinearKLOutput:
        options = {name: kwargs.pop(name) for name in _NAMES & kwargs.keys()}
        return function(*args, **kwargs, loss=LossOptions(**options))

    return call
