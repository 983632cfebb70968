"""What a rank needs imported; the fork server imports it once, so that a test's ranks start fast."""

from megatron_hydra.cpu import install_if_needed

install_if_needed()

import megatron_hydra.conversion.checkpoint  # noqa: E402,F401
