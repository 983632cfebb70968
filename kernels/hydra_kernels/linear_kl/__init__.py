"""KL to a teacher and cross entropy from hidden states and output weights, logits never kept."""

from hydra_kernels.linear_kl.api import LinearKLOutput, linear_kl
from hydra_kernels.loss_options import Kind, LossOptions

__all__ = ["Kind", "LinearKLOutput", "LossOptions", "linear_kl"]
