"""Times the whole attention module, norm to output projection: ours, full attention, layer mixes.

    python tools/benchmarks/layer.py --out layer.json --picture layer.png
    python tools/benchmarks/layer.py --plans uneven --lengths 4096 131072

Qwen3-1.7B's attention (hidden 2,048, 16 heads, 8 query groups, head dimension 128) in bf16 on
Transformer Engine; weights are random. Of a layer-wise mix only two kinds of layer exist, so its
time per layer is the mean of a full and an all-LA one, weighted by the ratio. Ours has FA and LA
heads at once on two streams where that is the default (`overlap_branches`); `one stream` and `two
streams` are either, everywhere. `parts` are what ours is made of, each timed alone: attention of
the FA heads, the LA kernel, the two projections. `limit` counts what no kernel can save: the
operations of the projections and of causal attention at this run's own matrix-product rate.

With `--plans uneven` the mean layer of an uneven plan (`uneven_plan`) stands
beside the layer whose number of FA heads is the plan's mean: one layer of each number of FA heads
that the plan has is timed, weighted by how many layers have it; `4 FA` is one with four.

Everything is captured in a CUDA graph and replayed, so that the GPU's time is what is measured;
`--eager` times calls as Python launches them, which up to about 16K tokens is what Python takes.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hydra_kernels.measure import device_figures, median_ms, print_table, write
from qwen3_1p7b import DIM, GROUPS, HEADS, HIDDEN, LAYERS
from torch import Tensor
from uneven_plan import layers_by_count, uneven_plan

from megatron_hydra.files import read_json
from megatron_hydra.head_plan import HeadPlan, LayerHeadPlan

MIXES = {"3:1": 4, "7:1": 2}  # LA to FA heads: FA heads of a layer
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288)
DIRECTIONS = ("forward", "forward+backward")
PLANS = ("uniform", "uneven")
KIND, SCHEMA_VERSION = "megatron_hydra.layer_benchmark", 1


def main() -> int:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="TOKENS")
    parser.add_argument("--fused-kernels", choices=("triton", "reference"), default="triton")
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument(
        "--plans", nargs="+", choices=PLANS, default=PLANS[:1], help="by default the uniform alone"
    )
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--draw", type=Path, metavar="JSON", help="only draw an earlier run")
    args = parser.parse_args()
    if args.draw:
        data = read_json(args.draw, KIND, SCHEMA_VERSION)
    else:
        warnings.simplefilter("ignore")  # Megatron warns of every optional package
        data = {"kind": KIND, "schema_version": SCHEMA_VERSION, "command": " ".join(sys.argv)}
        switches = {"fused_kernels": args.fused_kernels}
        data |= device_figures() | switches | {"graphs": not args.eager}
        timer = _Timer(not args.eager)
        rows = []
        for length in args.lengths:
            layers = _Layers(length, switches, timer)
            of_length = [{"direction": d, "tokens": length} for d in DIRECTIONS]
            if "uniform" in args.plans:
                measure(of_length, layers, args.mixes, data["matmul_tflop_per_s"])
            if "uneven" in args.plans:
                measure_uneven(of_length, layers, args.mixes)
            rows += of_length
            print_table(of_length)
            write(args.out, data, rows)
        data["rows"] = rows
        print(data["device"], data["versions"])
    for direction in DIRECTIONS:
        print(f"\n{direction}, ms")
        print_table([row for row in data["rows"] if row["direction"] == direction])
    if args.picture:
        draw(data, args.picture)
    return 0


def measure(
    rows: list[dict[str, Any]], layers: _Layers, mixes: list[str], tflop_per_s: float
) -> None:
    """Fill in one row per direction: times in ms; None where the memory does not suffice."""
    length, x = layers.length, layers.x
    full, all_la = layers.uniform(None), layers.uniform(0)
    for backward, row in enumerate(rows):
        row["full"], row["all LA"] = full.time(x, backward), all_la.time(x, backward)
        for name in mixes:
            mixed, share = layers.uniform(MIXES[name]), MIXES[name] / HEADS
            row[f"layer-wise {name}"] = _weighted(row["full"], row["all LA"], share)
            ours = row[f"ours {name}"] = mixed.time(x, backward)
            row[f"full / ours {name}"] = _ratio(row["full"], ours)
            row[f"one stream {name}"] = mixed.time(x, backward, False)
            row[f"two streams {name}"] = mixed.time(x, backward, True)
            parts = mixed.parts(x, backward)
            row |= {f"{part} {name}": ms for part, ms in parts.items()}
            total = None if None in parts.values() else sum(parts.values())
            row[f"ours / parts {name}"] = _ratio(ours, total)
            row[f"limit {name}"] = mixed.flop(length)[backward] / tflop_per_s / 1e9
        row["limit full"] = full.flop(length)[backward] / tflop_per_s / 1e9


def measure_uneven(rows: list[dict[str, Any]], layers: _Layers, mixes: list[str]) -> None:
    """Fill in an uneven plan's mean layer beside the uniform one, and each number of FA heads."""
    plans = {name: uneven_plan(LAYERS * MIXES[name]) for name in mixes}
    kinds: dict[int, LayerHeadPlan] = {}
    for plan in plans.values():  # both plans' layers of so many FA heads are timed as one
        kinds = layers_by_count(plan) | kinds
    for backward, row in enumerate(rows):
        times = {
            count: layers.of_plan(kind).time(layers.x, backward)
            for count, kind in sorted(kinds.items())
        }
        for name, plan in plans.items():
            counts = [len(layer.fa_heads) for layer in plan.layers]
            of_layers = [times[count] for count in counts]
            mean = None if None in of_layers else sum(of_layers) / len(of_layers)
            if f"ours {name}" not in row:
                uniform = layers.uniform(MIXES[name])
                row[f"ours {name}"] = uniform.time(layers.x, backward)
            row[f"uneven {name}"] = mean
            row[f"uneven / uniform {name}"] = _ratio(mean, row[f"ours {name}"])
        row |= {f"{count} FA": ms for count, ms in times.items()}


class _Layers:
    """Layers of one length, each built once, and their input.

    Args:
        length: Tokens.
        switches: More of HydraConfig's fields.
        timer: What times them.
    """

    def __init__(self, length: int, switches: dict[str, Any], timer: _Timer) -> None:
        self.length, self._built = length, {}
        self._build = lambda plan: _Layer(plan, length, switches, timer)
        self.x = torch.randn(length, 1, HIDDEN, device="cuda", dtype=torch.bfloat16)

    def uniform(self, num_fa: int | None) -> _Layer:
        """With so many FA heads at equal distances; None for Megatron's own full attention."""
        if num_fa is None:
            return self.of_plan(None)
        heads = tuple(range(0, HEADS, HEADS // num_fa)) if num_fa else ()
        return self.of_plan(HeadPlan.from_fa_heads({0: heads}, 1, HEADS, GROUPS).layers[0])

    def of_plan(self, plan: LayerHeadPlan | None) -> _Layer:
        """As planned."""
        if plan not in self._built:
            self._built[plan] = self._build(plan)
        return self._built[plan]


class _Layer:
    """Norm and attention of one transformer layer.

    Args:
        layer_plan: The kinds of its heads; None for Megatron's own full attention.
        length: Tokens.
        switches: More of HydraConfig's fields.
        timer: What times it.
    """

    def __init__(
        self,
        layer_plan: LayerHeadPlan | None,
        length: int,
        switches: dict[str, Any],
        timer: _Timer,
    ) -> None:
        from megatron_hydra.model.build import build_model
        from megatron_hydra.model.config import HydraConfig
        from megatron_hydra.parallel import initialize_model_parallel
        from megatron_hydra.teachers.loading import megatron_fields

        initialize_model_parallel()
        fields = megatron_fields(torch.bfloat16) | dict(
            qk_layernorm=True,
            num_layers=1, hidden_size=HIDDEN, ffn_hidden_size=64, num_attention_heads=HEADS,
            num_query_groups=GROUPS, kv_channels=DIM, vocab_size=64, rotary_base=1e6,
            seq_length=length, backend="transformer_engine",
            apply_rope_fusion=layer_plan is None, **switches,
        )  # fmt: skip
        plan = None if layer_plan is None else HeadPlan((layer_plan,), GROUPS)
        model = build_model(HydraConfig(**fields), plan).cuda().bfloat16()
        self.num_fa = HEADS if layer_plan is None else len(layer_plan.fa_heads)
        self.timer = timer
        self.layer, self.angles = model.decoder.layers[0], model.rotary_pos_emb(length)

    def time(self, x: Tensor, backward: bool, overlap_branches: bool | None = None) -> float | None:
        """Median ms of the module."""
        self.layer.config.overlap_branches = overlap_branches
        norm, attention = self.layer.input_layernorm, self.layer.self_attention
        return self.timer(
            lambda x, *_: [attention(norm(x), None, rotary_pos_emb=self.angles)[0]],
            [x, *norm.parameters(), *attention.parameters()],
            backward,
        )

    def parts(self, x: Tensor, backward: bool) -> dict[str, float | None]:
        """Median ms of what the module is made of, each alone on inputs of its own."""
        from hydra_kernels.gated_delta_rule import gated_delta_rule
        from megatron.core.transformer.enums import AttnMaskType

        attention, length = self.layer.self_attention, x.shape[0]
        num_la = HEADS - self.num_fa

        def attend(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
            core = attention.full_attention.core_attention
            return [core(q, k, v, None, attn_mask_type=AttnMaskType.causal)]

        def recur(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> list[Tensor]:
            return [gated_delta_rule(q, k, v, g, beta, impl="fla").output]

        def project(x: Tensor, fused: Tensor, *_: Tensor) -> list[Tensor]:
            return [attention.in_proj(x)[0], attention.linear_proj(fused)[0]]

        fa = [_random(length, 1, self.num_fa, DIM) for _ in range(3)]
        la = [_random(1, num_la, length, DIM) for _ in range(3)]
        la[:2] = (F.normalize(t.float(), dim=-1).bfloat16() for t in la[:2])
        gates = [_random(1, num_la, length).float() for _ in range(2)]
        la += [F.logsigmoid(gates[0] + 4), gates[1].sigmoid()]
        la = [t.transpose(1, 2) for t in la]  # as LA preparation writes them
        weights = [attention.in_proj.weight, attention.linear_proj.weight]
        return {
            "FA alone": self.timer(attend, fa, backward),
            "LA alone": self.timer(recur, la, backward),
            "projections": self.timer(
                project, [x, _random(length, 1, HEADS * DIM), *weights], backward
            ),
        }

    def flop(self, length: int) -> tuple[float, float]:
        """Operations of projections and causal attention: forward, forward and backward."""
        weights = [p for p in self.layer.self_attention.parameters() if p.dim() == 2]
        projections = 2 * length * sum(p.numel() for p in weights if p.shape[1] == HIDDEN)
        # Two products forward; five backward, one of which makes the scores anew.
        attention = self.num_fa * 2 * DIM * length**2
        return projections + attention, 3 * projections + 3.5 * attention


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


class _Timer:
    """Median ms of a function of inputs.

    Args:
        graphs: Capture the function in a CUDA graph, and time its replays.
    """

    def __init__(self, graphs: bool) -> None:
        self.graphs = graphs

    def __call__(
        self, function: Callable[..., list[Tensor]], inputs: list[Tensor], backward: bool
    ) -> float | None:
        """With `backward`, also of the gradients of all inputs; None if memory does not suffice."""
        try:
            if not backward:
                with torch.no_grad():
                    return self._median_ms(lambda: function(*inputs), [])
            leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in inputs]
            upstream = [torch.randn_like(output) for output in function(*leaves)]
            return self._median_ms(
                lambda: torch.autograd.backward(function(*leaves), upstream), leaves
            )
        except torch.OutOfMemoryError:
            return None
        finally:
            for tensor in inputs:
                tensor.grad = None
            torch.cuda.empty_cache()

    def _median_ms(self, call: Callable[[], Any], leaves: list[Tensor]) -> float:
        if not self.graphs:
            return median_ms(call, grad_to_none=leaves)
        # Twice beforehand on another stream, as PyTorch's manual asks: workspaces are made, and
        # the kernels keep what they look up for a shape.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
                for leaf in leaves:
                    leaf.grad = None
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return median_ms(graph.replay)


def _weighted(full: float | None, all_la: float | None, share: float) -> float | None:
    return None if full is None or all_la is None else share * full + (1 - share) * all_la


def _ratio(over: float | None, under: float | None) -> float | None:
    return None if over is None or under is None else over / under


def draw(data: dict[str, Any], path: Path) -> None:
    """Time against length, log-log, one panel per direction, the limits dashed."""
    from matplotlib.figure import Figure

    from megatron_hydra.report.chart_style import MUTED, PALETTE, chart_style, save_png

    lines = {
        "full": ("full attention", PALETTE[1], "-"),
        "layer-wise 7:1": ("layer-wise mix 7:1", PALETTE[4], "-"),
        "ours 3:1": ("head-level 3:1", PALETTE[5], "-"),
        "ours 7:1": ("head-level 7:1", PALETTE[0], "-"),
        "limit full": ("limit, full attention", PALETTE[1], ":"),
        "limit 7:1": ("limit, head-level 7:1", PALETTE[0], ":"),
    }
    with chart_style():
        figure = Figure(figsize=(10, 4.2))
        for axes, direction in zip(figure.subplots(1, 2), DIRECTIONS, strict=True):
            rows = [row for row in data["rows"] if row["direction"] == direction]
            rows.sort(key=lambda row: row["tokens"])
            lengths = [row["tokens"] for row in rows]
            for key, (label, colour, style) in lines.items():
                if key not in rows[0]:
                    continue
                times = [row.get(key) for row in rows]  # matplotlib leaves a gap for None
                axes.plot(
                    lengths, times, style, color=colour, label=label, marker="o" * (style == "-"),
                    markersize=3.5, linewidth=1.6,
                )  # fmt: skip
            axes.set(xscale="log", yscale="log", xlabel="tokens", title=direction)
            axes.set_xticks(lengths, [f"{n // 1024}K" for n in lengths])
            axes.minorticks_off()
        figure.axes[0].set_ylabel("ms per layer")
        figure.axes[0].legend(loc="upper left")
        figure.text(0.99, -0.02, data["device"], ha="right", color=MUTED, fontsize=8)
        save_png(path, figure, overwrite=True)


if __name__ == "__main__":
    sys.exit(main())
