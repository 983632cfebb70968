"""What a rank imports: the fork server does it once, so that the ranks of a test start fast."""

import os

from megatron_hydra.cpu import install_if_needed
from megatron_hydra.processes import end_with_parent

install_if_needed()

from kit.interpreter import patch_interpreter  # noqa: E402

import megatron_hydra.teachers.checkpoint  # noqa: E402,F401

patch_interpreter()
end_with_parent(os.getppid())  # pytest: its end is not seen while a rank lives
