"""Builds Megatron's GPTModel of a hybrid or its teacher, or a layer of it; loads kernels."""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.cuda_graphs import CudaGraphManager, delete_cuda_graphs

from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.config import HydraConfig
from megatron_hydra.model.layer_specs import get_hydra_block_spec, get_teacher_block_spec
from megatron_hydra.model.mixers.base import Mixer
from megatron_hydra.model.padding import PaddedVocabularyModel, needs_padding
from megatron_hydra.model.rotary import scale_rotary

logger = logging.getLogger(__name__)


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
        `[b, s, vocab / tp]`, see `padding.py` where the vocabulary is not divisible by tp.
        Attention is always causal; pass None for the mask.

    Raises:
        UserError: If plan and config disagree.
    """
    if plan is None:
        spec = get_teacher_block_spec(config, vp_stage=vp_stage)
    else:
        spec = get_hydra_block_spec(config, plan, vp_stage=vp_stage)
    padded = needs_padding(config, config.vocab_size)
    model = (PaddedVocabularyModel if padded else GPTModel)(
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
    scale_rotary(model.rotary_pos_emb, config)
    return model


def build_layer(
    config: HydraConfig, plan: HeadPlan | None, index: int, initialize: bool = False
) -> GPTModel:
    """Build one layer of a model, from hidden states to hidden states, whole on one rank.

    It counts itself, and names its parameters in a checkpoint, as the whole model's layer does;
    as a module it is `decoder.layers.0`.

    Args:
        config: The whole model's.
        plan: The whole model's; None for a teacher's layer.
        index: Of the layer, from 0.
        initialize: Whether its weights start at random, as a whole model's do; else matrices hold
            what was in memory, and are to be written.
    """
    # A copy: made anew, it would start weights by the depth of one layer.
    of_layer = copy.copy(config)
    of_layer.num_layers = 1
    of_layer.perform_initialization = initialize
    if plan is not None:
        plan = dataclasses.replace(plan, layers=(plan.layers[index],))
    model = build_model(of_layer, plan, pre_process=False, post_process=False)
    for module in model.decoder.layers.modules():
        if hasattr(module, "layer_number"):
            module.layer_number = index + 1
    return model


def load_kernels(model: torch.nn.Module, num_sequences: int) -> None:
    """Load the kernels that a model's heads would else load in the first step.

    Args:
        model: This rank's part.
        num_sequences: Of a micro batch, each of `config.seq_length` tokens.
    """
    start = time.monotonic()
    for mixer in model.modules():
        if isinstance(mixer, Mixer):
            config = mixer.config
            mixer.load_kernels(num_sequences, config.seq_length // config.context_parallel_size)
    if (seconds := time.monotonic() - start) > 1:
        logger.info("the heads' kernels are loaded, after %.0f s", seconds)


def release_cuda_graphs(model: torch.nn.Module) -> None:
    """Let go of the CUDA graphs that Megatron has captured of a model's layers.

    Their memory is free afterwards, the process groups in their collectives can be destroyed (while
    a graph exists, that hangs: https://github.com/pytorch/pytorch/issues/115388), and another
    model's can be captured. Megatron's own function does the last alone: it no longer knows graphs
    that are finished.
    """
    for manager in model.modules():
        if isinstance(manager, CudaGraphManager):
            for runner in manager.cudagraph_runners:
                for graph in (runner.fwd_graph, runner.bwd_graph):
                    if graph is not None:
                        graph.reset()
                # They hold the last step's autograd node, which holds the runner and with it the
                # layer: a cycle through C++, which Python's collector does not see.
                runner.fwd_graph_outputs = runner.fwd_graph_output_surface = None
            manager.cudagraph_runners.clear()
    delete_cuda_graphs()
