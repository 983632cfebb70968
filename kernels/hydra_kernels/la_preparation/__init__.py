"""LA preparation: everything between the in-projection and the gated delta rule."""

from hydra_kernels.la_preparation.api import LAPreparationOutput, la_preparation

__all__ = ["LAPreparationOutput", "la_preparation"]
