"""Times prefill and decoding of an exported Qwen3-1.7B-shaped hybrid and of its teacher.

    python tools/benchmarks/decoding.py --out decoding.json

One GPU, bf16, random weights and tokens, transformers' own model class for the teacher and the
exported folder's for the hybrid (fla's kernels), SDPA in both, `forward` called as `generate` does.
The hybrid's plan is `uneven_plan`'s: as many FA heads, on the mean of four a layer, as a global
top-K of scores deals to the layers. One sequence is filled in one call; for larger batches what it
leaves in the cache is repeated. `floor ms` is the time that weights and cache take to be read once
at the bandwidth of this run's own copy. Where weights and cache of one batch alone exceed the
memory, a row has no times.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hydra_kernels.measure import device_figures, print_table, write
from step_costs import DIM, FFN, GROUPS, HEADS, HIDDEN, LAYERS, SHAPE, VOCAB
from transformers import Qwen3Config, Qwen3ForCausalLM
from uneven_plan import uneven_plan

from megatron_hydra.export.configuration_hydra import HydraHeadConfig
from megatron_hydra.export.modeling_hydra import CACHE, HydraForCausalLM
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.cost import total_cache_bytes

KIND, SCHEMA_VERSION = "megatron_hydra.decoding_benchmark", 1


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--models", nargs="+", choices=("teacher", "hybrid"), default=None)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 32768, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--steps", type=int, default=24, help="of decoding, whose median is taken")
    parser.add_argument("--fa-heads-per-layer", type=int, default=4, help="the mean")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    data = {"kind": KIND, "schema_version": SCHEMA_VERSION, "command": " ".join(sys.argv)}
    data |= device_figures()
    plan = uneven_plan(LAYERS * args.fa_heads_per_layer)
    rows: list[dict[str, Any]] = []
    for name in args.models or ("teacher", "hybrid"):
        with torch.device("cuda"):
            model = make_model(None if name == "teacher" else plan)
        for context, batch in product(args.contexts, args.batches):
            bytes_of = total_cache_bytes(SHAPE, context)
            cache_bytes = batch * bytes_of.of(None if name == "teacher" else plan)
            row = {"device": torch.cuda.get_device_name(), "model": name}
            row |= {"batch": batch, "context": context, "cache GiB promised": cache_bytes / 2**30}
            row |= measure(model, context, batch, args.steps, cache_bytes, data["copy_gb_per_s"])
            rows.append(row | {"/ teacher": _over_teacher(row, rows)})
            print_table(rows[-1:])
            write(args.out, data, rows)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    print()
    print_table(rows)
    print(data["device"], data["copy_gb_per_s"], data["versions"])
    return 0


def make_model(plan: HeadPlan | None, **sizes: Any) -> Any:
    """The teacher, or the hybrid of a plan, with random weights in bf16."""
    shape: dict[str, Any] = dict(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, head_dim=DIM, rope_theta=1e6,
        max_position_embeddings=2**20, tie_word_embeddings=True, **sizes,
    )  # fmt: skip
    if plan is None:
        model: Any = Qwen3ForCausalLM(Qwen3Config(**shape))
    else:
        kinds = [list(layer.kinds) for layer in plan.resolved("gated_delta_net").layers]
        model = HydraForCausalLM(HydraHeadConfig(head_kinds=kinds, **shape))
    return model.to(torch.bfloat16).eval()


@torch.inference_mode()
def measure(
    model: Any, context: int, batch: int, steps: int, cache_bytes: float, gb_per_s: float
) -> dict[str, Any]:
    """Prefill of one sequence, then steps of a batch; None where memory does not suffice."""
    gc.collect()
    torch.cuda.empty_cache()
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    row: dict[str, Any] = {"prefill s": None, "prefill tokens/s": None, "cache GiB": None}
    row |= {"step ms": None, "floor ms": (weight_bytes + cache_bytes) / gb_per_s / 1e6}
    row |= {"/ floor": None, "tokens/s": None, "peak GiB": None}
    if weight_bytes + cache_bytes > torch.cuda.get_device_properties(0).total_memory:
        return row
    tokens = torch.randint(model.config.vocab_size, (1, context), device="cuda")
    options = {"use_cache": True, "logits_to_keep": 1}
    try:
        model(tokens[:, :256], **options)  # what is loaded or compiled at first
        cache = model(tokens, **options)[CACHE]
        del cache
        torch.cuda.reset_peak_memory_stats()
        seconds, found = _timed(lambda: model(tokens, **options))
        row |= {"prefill s": seconds, "prefill tokens/s": context / seconds}
        cache = found[CACHE]
        del found
        if batch > 1:
            cache.batch_repeat_interleave(batch)
        row["cache GiB"] = _cache_bytes(cache) / 2**30
        new = tokens[:, -1:].expand(batch, 1)
        times = [_timed(lambda: model(new, **options, **{CACHE: cache}))[0] for _ in range(steps)]
    except torch.OutOfMemoryError:
        return row
    seconds = statistics.median(times[steps // 4 :])
    row |= {"step ms": 1e3 * seconds, "tokens/s": batch / seconds}
    row |= {"/ floor": row["step ms"] / row["floor ms"]}
    return row | {"peak GiB": torch.cuda.max_memory_allocated() / 2**30}


def _timed(function: Any) -> tuple[float, Any]:
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _cache_bytes(cache: Any) -> int:
    """That a cache of either model holds."""
    if hasattr(cache, "num_bytes"):
        return int(cache.num_bytes)
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def _over_teacher(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """A step's time over the teacher's at the same batch and context, if it is there."""
    for other in rows:
        same = all(other[key] == row[key] for key in ("batch", "context"))
        if same and other["model"] == "teacher" and other["step ms"] and row["step ms"]:
            return float(row["step ms"] / other["step ms"])
    return None


if __name__ == "__main__":
    sys.exit(main())
