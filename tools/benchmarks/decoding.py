"""Times prefill and decoding of an exported Qwen3-1.7B-shaped hybrid and of its teacher.

    python tools/benchmarks/decoding.py --out decoding.json
    python tools/benchmarks/decoding.py --draw decoding.json [more.json] --picture decoding.png

One GPU, bf16, random weights and tokens, transformers' own model class for the teacher and the
exported folder's for the hybrid (fla's kernels), SDPA in both, `forward` called as `generate` does.
The hybrid's plan is `uneven_plan`'s: as many FA heads, on the mean of four per layer, as a global
top-K of scores deals to the layers. One sequence is filled in one call; for larger batches what it
leaves in the cache is repeated. With a static cache a step is compiled as `generate` compiles it:
the hybrid's is recorded, the teacher's has torch.compile's own CUDA graphs. Nothing is read before
static caches and contexts beyond `--read-up-to`: their keys and values are random. `floor ms` is
the time that weights and cache take to be read once at the bandwidth of this run's own copy. Where
weights and cache of one batch alone exceed the memory, a row has no times. `--largest-batch` finds,
by trying, how many sequences of a context decode at all, with a dynamic cache.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hydra_kernels.measure import device_figures, print_table, write
from qwen3_1p7b import DIM, FFN, GROUPS, HEADS, HIDDEN, LAYERS, SHAPE, VOCAB
from transformers import Qwen3Config, Qwen3ForCausalLM, StaticCache
from uneven_plan import uneven_plan

from megatron_hydra.export.cache_hydra import HydraCache
from megatron_hydra.export.configuration_hydra import HydraHeadConfig
from megatron_hydra.export.modeling_hydra import HydraForCausalLM
from megatron_hydra.export.stream_hydra import CACHE
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.mixers.costs import DEFAULT_LA_KIND
from megatron_hydra.selection.cost import total_cache_bytes

KIND, SCHEMA_VERSION = "megatron_hydra.decoding_benchmark", 2
CACHES = ["dynamic", "static"]
_PROMPT = 64
_OPTIONS = {"use_cache": True, "logits_to_keep": 1}


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--models", nargs="+", choices=("teacher", "hybrid"), default=None)
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 32768, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--steps", type=int, default=24, help="of decoding, whose median is taken")
    parser.add_argument("--layers", type=int, default=LAYERS, help="the plan's first so many")
    parser.add_argument("--fa-heads-per-layer", type=int, default=4, help="the mean")
    parser.add_argument("--read-up-to", type=int, default=131072, metavar="TOKENS")
    parser.add_argument("--largest-batch", action="store_true", help="in place of --batches")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draw", type=Path, nargs="+", help="rows of earlier runs; none is made")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    if (args.draw is None) != (args.picture is None):
        parser.error("--draw and --picture go together")
    if args.draw:
        draw(
            [row for path in args.draw for row in json.loads(path.read_text())["rows"]],
            args.picture,
        )
        return 0
    warnings.simplefilter("ignore")
    data = {"kind": KIND, "schema_version": SCHEMA_VERSION, "command": " ".join(sys.argv)}
    data |= device_figures()
    shape, plan = (
        replace(SHAPE, num_layers=args.layers),
        uneven_plan(LAYERS * args.fa_heads_per_layer),
    )
    plan = replace(plan, layers=plan.layers[: args.layers])
    rows: list[dict[str, Any]] = []
    for name in args.models or ("teacher", "hybrid"):
        with torch.device("cuda"):
            model = make_model(None if name == "teacher" else plan, num_hidden_layers=args.layers)
        caches, batches = args.caches, args.batches
        if args.largest_batch:
            caches, batches = ["dynamic"], [0]
        for cache, context, batch in product(caches, args.contexts, batches):
            row_bytes = total_cache_bytes(shape, context).of(None if name == "teacher" else plan)
            batch = batch or largest_batch(model, context, row_bytes)
            cache_bytes = batch * row_bytes
            row = {"device": torch.cuda.get_device_name(), "model": name, "cache": cache}
            row |= {"batch": batch, "context": context, "cache GiB promised": cache_bytes / 2**30}
            sizes = (context, batch, args.steps, cache_bytes, data["copy_gb_per_s"])
            is_read = context <= args.read_up_to and not args.largest_batch
            row |= measure(model, cache == "static", is_read, *sizes)
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
        max_position_embeddings=2**20, tie_word_embeddings=True,
    )  # fmt: skip
    shape |= sizes
    if plan is None:
        model: Any = Qwen3ForCausalLM(Qwen3Config(**shape))
    else:
        kinds = [list(layer.kinds) for layer in plan.resolved(DEFAULT_LA_KIND).layers]
        model = HydraForCausalLM(HydraHeadConfig(head_kinds=kinds, **shape))
    return model.to(torch.bfloat16).eval()


@torch.no_grad()
def measure(
    model: Any,
    is_static: bool,
    is_read: bool,
    context: int,
    batch: int,
    steps: int,
    cache_bytes: float,
    gb_per_s: float,
) -> dict[str, Any]:
    """Prefill of one sequence, then steps of a batch; None where memory does not suffice."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.compiler.reset()
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    row: dict[str, Any] = {"prefill s": None, "prefill tokens/s": None, "cache GiB": None}
    row |= {"first step s": None, "step ms": None, "/ floor": None}
    row |= {"floor ms": (weight_bytes + cache_bytes) / gb_per_s / 1e6}
    row |= {"tokens/s": None, "peak GiB": None}
    if weight_bytes + cache_bytes > torch.cuda.get_device_properties(0).total_memory:
        return row
    tokens = torch.randint(model.config.vocab_size, (1, context), device="cuda")
    new = tokens[:, -1:].repeat(batch, 1)
    try:
        if is_static:
            step, cache = _static_step(model, context, new, context + steps + 1)
        else:
            if is_read:
                found, prefill = _prefill(model, tokens)
                row |= prefill
            else:
                found = model(tokens[:, :_PROMPT], **_OPTIONS)
            cache = found[CACHE]
            if batch > 1:
                cache.batch_repeat_interleave(batch)
            if not is_read:  # last: a batch may fit that one row beside it would not
                _fill(cache, context)
            step = partial(model, new, **_OPTIONS, **{CACHE: cache})
        row["cache GiB"] = _cache_bytes(cache) / 2**30
        row["first step s"] = _timed(step)[0]
        torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median([_timed(step)[0] for _ in range(steps)][steps // 4 :])
    except torch.OutOfMemoryError:
        return row
    row |= {"step ms": 1e3 * seconds, "tokens/s": batch / seconds}
    row |= {"/ floor": row["step ms"] / row["floor ms"]}
    return row | {"peak GiB": torch.cuda.max_memory_allocated() / 2**30}


def _prefill(model: Any, tokens: torch.Tensor) -> tuple[Any, dict[str, float]]:
    model(tokens[:, :256], **_OPTIONS)  # what is loaded or compiled at first
    model(tokens, **_OPTIONS)
    seconds, found = _timed(lambda: model(tokens, **_OPTIONS))
    return found, {"prefill s": seconds, "prefill tokens/s": tokens.shape[1] / seconds}


def _static_step(
    model: Any, context: int, new: torch.Tensor, length: int
) -> tuple[Callable[[], Any], Any]:
    """A compiled step into a static cache that holds `context` tokens, and the cache."""
    is_hybrid = isinstance(model, HydraForCausalLM)
    make: Any = HydraCache if is_hybrid else StaticCache
    cache = make(model.config, length)
    mask = new.new_ones(len(new), _PROMPT)
    prompt = new.expand(-1, _PROMPT)
    model(prompt, attention_mask=mask, **_OPTIONS, **{CACHE: cache})
    _fill(cache, context)
    options: dict[str, Any] = dict(_OPTIONS)
    room = cache.max_length if is_hybrid else length
    options["attention_mask"] = torch.ones(len(new), room, dtype=torch.bool, device=new.device)
    if not is_hybrid:
        # In transformers 4 the caller says where a token lies.
        options["cache_position"] = new.new_full((1,), context)
    call = model.get_compiled_call(None)
    return partial(call, input_ids=new, **options, **{CACHE: cache}), cache


def _fill(cache: Any, context: int) -> None:
    """With random keys and values of so many tokens, as if they had been read."""
    for layer in cache.layers:
        is_static = layer.is_compileable
        for name in ("keys", "values"):
            tensor = getattr(layer, name)
            if tensor is not None and not is_static:
                tensor = tensor.new_empty((*tensor.shape[:2], context, tensor.shape[-1]))
                setattr(layer, name, tensor)
            if tensor is not None:
                tensor.normal_()
        for name in ("num_tokens", "cumulative_length"):
            count = getattr(layer, name, None)
            if isinstance(count, torch.Tensor):
                count.fill_(context)
            elif count is not None:
                setattr(layer, name, context)


@torch.no_grad()
def largest_batch(model: Any, context: int, row_bytes: float) -> int:
    """Sequences of a context that decode a step in this device's memory; 0 if not one does."""
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    room = torch.cuda.get_device_properties(0).total_memory - weight_bytes
    low, high = 0, int(room / row_bytes)
    while low < high:
        batch = (low + high + 1) // 2
        try:
            cache = model(torch.zeros(batch, 1, dtype=torch.int64, device="cuda"), **_OPTIONS)[
                CACHE
            ]
            _fill(cache, context)
            model(
                torch.zeros(batch, 1, dtype=torch.int64, device="cuda"),
                **_OPTIONS,
                **{CACHE: cache},
            )
            low = batch
        except torch.OutOfMemoryError:
            high = batch - 1
        cache = None
        gc.collect()
        torch.cuda.empty_cache()
    return low


def _timed(function: Any) -> tuple[float, Any]:
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _cache_bytes(cache: Any) -> int:
    """That a cache of either model holds."""
    if isinstance(cache, HydraCache):
        return int(cache.num_bytes)
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def _over_teacher(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """A step's time over the teacher's at the same cache, batch and context, if it is there."""
    for other in rows:
        same = all(other[key] == row[key] for key in ("cache", "batch", "context"))
        if same and other["model"] == "teacher" and other["step ms"] and row["step ms"]:
            return float(row["step ms"] / other["step ms"])
    return None


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A step of one sequence against its context, log-log, the floors dotted, as PNG."""
    from matplotlib.figure import Figure

    from megatron_hydra.report.chart_style import MUTED, PALETTE, chart_style, save_png

    rows = sorted((row for row in rows if row["batch"] == 1), key=lambda row: row["context"])
    with chart_style():
        figure = Figure(figsize=(9, 4.2))
        ax = figure.add_subplot(xscale="log", yscale="log")
        for model, colour in (("teacher", PALETTE[1]), ("hybrid", PALETTE[0])):
            of_model = [row for row in rows if row["model"] == model]
            for cache, style in (("dynamic", "o-"), ("static", "s--")):
                found = [row for row in of_model if row["cache"] == cache and row["step ms"]]
                if found:
                    times = [row["step ms"] for row in found]
                    label = f"{model}, {cache} cache"
                    ax.plot([row["context"] for row in found], times, style, c=colour, label=label)
            floors = {row["context"]: row["floor ms"] for row in of_model}
            label = f"{model}: weights and cache read once"
            ax.plot(list(floors), list(floors.values()), ":", color=colour, label=label)
        contexts = sorted({row["context"] for row in rows})
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set(xlabel="context, tokens", ylabel="ms per token", title="Decoding, one sequence")
        ax.set_xticks(contexts, [f"{n // 1024}K" for n in contexts])
        ax.minorticks_off()
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        devices = ", ".join(sorted({row["device"] for row in rows}))
        figure.text(0.99, -0.02, devices, ha="right", color=MUTED, fontsize=8)
        save_png(path, figure, overwrite=True)


if __name__ == "__main__":
    sys.exit(main())
