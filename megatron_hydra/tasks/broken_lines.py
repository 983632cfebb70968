"""Lines and rows of text files that cannot be read: left out up to a limit, and counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_hydra.errors import UserError

_NAMED_FILES = 10


@dataclass
class BrokenLines:
    """What was left out of the files that were read.

    Attributes:
        limit: So many are left out, of all files together; the next one ends the reading.
        found: Per file its number of broken lines and the number of the first, from 1.
    """

    limit: int = 0
    found: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def num_lines(self) -> int:
        """Of all files."""
        return sum(count for count, _ in self.found.values())

    def attempt(
        self, path: Path, number: int, read: Callable[[str], str], what: str = "line"
    ) -> str | None:
        """The text of a line or row; None if it is broken, and left out.

        Args:
            path: Its file.
            number: Of the line or row in the file, from 1.
            read: Gets the words that name its place, for errors; returns the text.
            what: `line` or `row`.

        Raises:
            UserError: Of ``read``, if it is one more than may be left out.
        """
        try:
            return read(f"{what} {number} of {path}")
        except UserError as error:
            left_out = self.num_lines
            if not self.limit:
                raise
            if left_out >= self.limit:
                raise UserError(
                    f"{error} (after {left_out:,} broken lines, as many as are allowed)"
                ) from error
        count, first = self.found.get(str(path), (0, number))
        self.found[str(path)] = (count + 1, first)
        return None

    def in_words(self) -> str:
        """`3 broken lines left out: a.jsonl (2, first line 7), b.parquet (1, first line 9)`."""
        files = [
            f"{name} ({count:,}, first line {first:,})"
            for name, (count, first) in self.found.items()
        ]
        if len(files) > _NAMED_FILES:
            files[_NAMED_FILES:] = [f"and {len(files) - _NAMED_FILES:,} more files"]
        lines = f"{self.num_lines:,} broken line{'s' if self.num_lines > 1 else ''}"
        return f"{lines} left out: {', '.join(files)}"
