"""The section `model` of a training's YAML: what a run may change of the model's own options.

Their values, ranges and meanings are declared in `model/options.py` alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import Annotated, Any, Literal, get_type_hints

from megatron_hydra.model.options import HydraFields
from megatron_hydra.schema import Limits

MODEL_OPTIONS = {
    "backend": "None: Transformer Engine on a GPU, `local` on a CPU.",
    "la_kernel": "",
    "fused_kernels": "",
    "overlap_branches": "None: by the tokens of each micro-batch, as `HydraConfig` says; the run "
    "folder keeps None.",
    "placement": "",
    "fa_query_scale": "",
    "fa_query_scale_start": "",
}
"""What a run may change of the model's options, and what None means where that is not to keep what
is stored."""
_TYPES = get_type_hints(HydraFields, include_extras=True)
_Options: Any = make_dataclass(
    "_Options",
    [
        (name, _TYPES[name] | None, field(default=None, metadata={"none": none}))
        for name, none in MODEL_OPTIONS.items()
    ],
)


@dataclass
class ModelSection(_Options):
    """Changes to the configuration stored in the checkpoint; None keeps what is stored there.

    Only fields that leave the parameters' names and shapes alone can be changed here. The run
    folder's run_config.yaml holds what was chosen for None and `auto`.
    """

    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass instead of kept: those between an
    attention's two projections, or each layer's."""
    recompute_layers: Annotated[int, Limits(least=1, below=2**31)] | None = None
    """With `recompute: full`, the first so many layers of each pipeline stage alone; None: all.
    As few as the memory allows are the fastest (`megatron_hydra.training.memory`)."""
    cuda_graphs: bool = False
    """Replay the student's layers from Megatron's CUDA graphs, captured after the first step: below
    some 16,384 tokens per micro-batch Python launches kernels more slowly than a GPU runs them.

    Only where each micro-batch is like the last and keeps all activations: stages 2 and 3, samples
    whole, nothing recomputed, neither pipeline nor context parallel."""
