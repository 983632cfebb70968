"""Gated delta rule: the mixer of a linear-attention head."""

from hydra_kernels.gated_delta_rule.api import GatedDeltaRuleOutput, gated_delta_rule

__all__ = ["GatedDeltaRuleOutput", "gated_delta_rule"]
