"""Builds Megatron's GPTModel for a hybrid or for its teacher, from one configuration."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel

from megatron_hydra.config import HydraConfig
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.layer_specs import get_hydra_block_spec, get_teacher_block_spec


def build_model(
    config: HydraConfig,
    plan: HeadPlan | None,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    **kwargs: Any,
) -> GPTModel:
    """Build this rank's part of a model; Megatron's parallel state must be set up.

    Args:
        config: Shapes, switches and parallel sizes.
        plan: Which heads are FA; None builds the teacher, on Megatron's own SelfAttention.
        pre_process: Whether this pipeline stage has the embedding.
        post_process: Whether this pipeline stage has the output layer.
        vp_stage: Virtual pipeline stage, if there are any.
        **kwargs: More of GPTModel's arguments, such as `pg_collection`.

    Returns:
        A model that maps token ids `[b, s]` and position ids `[b, s]` to logits
        `[b, s, vocab / tp]`. Attention is always causal; pass None for the mask.

    Raises:
        UserError: If plan and config disagree.
    """
    if plan is None:
        spec = get_teacher_block_spec(config, vp_stage=vp_stage)
    else:
        spec = get_hydra_block_spec(config, plan, vp_stage=vp_stage)
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=config.vocab_size,
        max_sequence_length=config.seq_length,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=config.rotary_base,
        vp_stage=vp_stage,
        **kwargs,
    )
