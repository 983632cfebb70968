"""What a kind of head is: its rows of the in-projection, its parameters, its part of the layer.

The layer, checkpoints, weight reuse, the optimizer and the certificate ask each kind for what they
need of it, and know none by name; `megatron_hydra.model.mixers.kinds` lists them.

Legend: s = sequence, b = batch, n = heads of the kind on the rank, d = head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from megatron_hydra.head_plan import HeadKind
from megatron_hydra.model.config import HydraConfig
from megatron_hydra.model.context_parallel import Pieces
from megatron_hydra.model.decoding import LayerState
from megatron_hydra.model.head_parameters import HeadModule
from megatron_hydra.model.mixers.costs import KindCosts
from megatron_hydra.model.options import HydraFields
from megatron_hydra.model.placement import LayerPlacement
from megatron_hydra.model.projection import Section, Sections, Units


@dataclass(frozen=True)
class Stream:
    """A rank's tokens: where they belong, and their rotary angles.

    Attributes:
        pieces: Of the stream of all context-parallel ranks; `pieces.layout` is how they lie.
        packed_seq_params: Megatron's description of a packed row, b = 1; None for whole rows.
        angles: `[s, 1, 1, d]` at `pieces.layout.positions`; None without RoPE.
        piece_angles: The same at `pieces.positions`, where a recurrence runs.
        state: What the layer has kept of the tokens before, in decoding; None for whole sequences.
    """

    pieces: Pieces
    packed_seq_params: PackedSeqParams | None
    angles: Tensor | None
    piece_angles: Tensor | None
    state: LayerState | None = None

    @classmethod
    def of(
        cls,
        pieces: Pieces,
        packed_seq_params: PackedSeqParams | None,
        angles: Tensor | None,
        state: LayerState | None = None,
    ) -> Stream:
        """Arguments as the layer's.

        `angles` of a packed row, and in decoding, are those of positions 0 and up.
        """
        if state is not None and angles is not None:
            angles = angles[state.num_tokens :][: pieces.layout.num_tokens]
        if packed_seq_params is None or angles is None:
            return cls(pieces, packed_seq_params, angles, angles, state)
        at = (pieces.layout.positions, pieces.positions)
        return cls(pieces, packed_seq_params, *(angles[positions] for positions in at))


class CalibratedStart(NamedTuple):
    """Where a kind's own values start that no teacher has.

    Attributes:
        parameters: By name, of all heads.
        rows: Of sections of the in-projection, `[n, width, h]`.
    """

    parameters: dict[str, Tensor]
    rows: dict[str, Tensor]


class Mixer(HeadModule):
    """The heads of one kind that one tensor-parallel rank owns, from their rows to their outputs.

    A rank without a head of the kind has none of `head_tensors`, but all norms: Megatron flattens
    the gradients of replicated parameters into one all-reduce, which must match on all ranks.

    Args:
        config: The model's configuration.
        submodules: A `HydraAttentionSubmodules`.
        placement: The layer's heads on all ranks.
        layer_number: Counts from 1; seeds the heads' initialisation.
        pg_collection: Process groups, of which `tp` and `cp` are used.
        cp_comm_type: How keys and values pass between context-parallel ranks, see Megatron's field.
    """

    kind: ClassVar[HeadKind]
    """As plans name it: what `costs` says."""
    label: ClassVar[str]
    """As messages call its heads."""
    module_name: ClassVar[str]
    """The layer's attribute, and so part of its parameters' names in checkpoints."""
    costs: ClassVar[KindCosts]
    """What a head costs: one of `costs.COSTS`, where planning finds it without PyTorch."""
    gate_name: ClassVar[str]
    """The section whose rows gate the outputs, see :meth:`gate_activation`."""
    teacher_norms: ClassVar[tuple[str, ...]] = ("q_layernorm", "k_layernorm")
    """Norms per head dimension that start as the teacher's of the same names; they do nothing and
    have no weight where the teacher has none (`config.qk_layernorm`)."""
    head_tensors: ClassVar[tuple[str, ...]] = ()
    """Parameters of its own, each head's values side by side along dimension 0. No teacher has
    them, and no weight decay shrinks them."""

    def __init__(
        self,
        config: HydraConfig,
        submodules: Any,
        placement: LayerPlacement,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        cp_comm_type: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.placement, self.layer_number = placement, layer_number
        self.pg_collection, self.tp_group = pg_collection, pg_collection.tp
        self.heads = placement.heads_of(self.tp_group.rank(), self.kind)
        self.all_heads = placement.layer_plan.heads_of(self.kind)
        self._build(submodules, cp_comm_type)

    def _build(self, submodules: Any, cp_comm_type: str | None) -> None:
        """Make the kind's modules and parameters; arguments as the constructor's."""
        raise NotImplementedError

    @classmethod
    def sections(
        cls, config: HydraFields, head_dim: int, heads: Units, groups: Units
    ) -> list[Section]:
        """The kind's rows of the in-projection, in order.

        Args:
            config: Decides which of them exist.
            head_dim: d.
            heads: Its heads, here and on all ranks.
            groups: The query groups whose keys and values are shared by heads of kinds that share
                them, here and on all ranks.
        """
        raise NotImplementedError

    @classmethod
    def gate_activation(cls, config: HydraFields) -> Literal["silu", "sigmoid2"]:
        """What the fusion makes of the gate's rows; `sigmoid2` is 2 sigmoid, 1 at zero."""
        return "sigmoid2"

    def parameter_sections(self) -> Mapping[str, Sequence[Section]]:
        """By each of `head_tensors`, where a head's values lie along dimension 0."""
        return {}

    def forward(self, sections: Sections, stream: Stream) -> Tensor:
        """The heads' outputs `[s, b, n, d]`, of all the in-projection's parts by name."""
        raise NotImplementedError

    def empty_state(self, num_rows: int, num_tokens: int, like: Tensor) -> dict[str, Tensor]:
        """Zeros by name for what decoding keeps, `[num_rows, ...]`; none without a head here.

        Args:
            num_rows: Most rows of a batch.
            num_tokens: Most tokens of a row.
            like: Gives number format and device of all but recurrent states, which are float32.
        """
        raise NotImplementedError

    def calibrated_start(self, distance: Tensor, write: Tensor) -> CalibratedStart:
        """The start of heads whose teacher's look so far back, and at such tokens; none by default.

        Args:
            distance: `[n]`, in tokens, as `teachers/attention_statistics.py` measures.
            write: `[n, h]`; its product with the layer's normed input is large where many look.
        """
        return CalibratedStart({}, {})

    def load_kernels(self, num_sequences: int, num_tokens: int) -> None:
        """Load what :meth:`forward` and its backward pass of such rows would load when first run.

        Here for kernels whose loading takes long.
        """

    def faults_of_weights(self) -> list[str]:
        """For each loaded value that the forward pass cannot take, what it is and what may be."""
        return []

    def _build_norms(self, submodules: Any) -> None:
        config = self.config
        for name in self.teacher_norms:
            spec = getattr(submodules, name)
            options = dict(hidden_size=config.kv_channels, eps=config.layernorm_epsilon)
            setattr(self, name, build_module(spec, config=config, **options))

    def _stay_in_graph(self, output: Tensor, *others: Tensor) -> Tensor:
        """The output of a rank without a head: norms (and others) get their gradient, zero."""
        norms = [getattr(self, name, None) for name in self.teacher_norms]
        sums = [w.sum() for norm in norms if norm is not None for w in norm.parameters()]
        sums += [other.sum() for other in others]
        return output + 0.0 * sum(sums) if sums else output
