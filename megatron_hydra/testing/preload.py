"""What a rank imports: the fork server does it once, so that the ranks of a test start fast."""

from megatron_hydra.cpu import install_if_needed

install_if_needed()

import megatron_hydra.conversion.checkpoint  # noqa: E402,F401
from megatron_hydra.testing.interpreter import patch_interpreter  # noqa: E402

patch_interpreter()
