"""The one error type for what a user can put right."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input from a user: the message is one sentence with what, where and what is allowed.

    Command-line tools print the message alone and exit with code 2.
    """
