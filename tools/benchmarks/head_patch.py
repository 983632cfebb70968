"""Times the patch of one head in one pair against one full forward, and what a whole model takes.

    python tools/benchmarks/head_patch.py --preset qwen3_1p7b --length 4096 --out head_patch.json

Weights are random: time does not depend on them. On a GPU the model runs in bf16 on Transformer
Engine, on a CPU in float32 on the local backend. Each figure is the median of several runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen3_1p7b import DIM, FFN, GROUPS, HEADS, HIDDEN, LAYERS, VOCAB

from megatron_hydra import cpu
from megatron_hydra.files import versions, write_json

PRESETS: dict[str, dict[str, Any]] = {
    "qwen3_1p7b": dict(
        num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=HEADS,
        num_query_groups=GROUPS, kv_channels=DIM, vocab_size=VOCAB, rotary_base=1e6,
    ),
    "quickstart": dict(
        num_layers=4, hidden_size=128, ffn_hidden_size=384, num_attention_heads=8,
        num_query_groups=4, kv_channels=32, vocab_size=1024,
    ),
}  # fmt: skip
_ANSWER_TOKENS = 4
_WHOLE = (448, 40)  # heads and pairs of the paper's scoring
_CRITICAL = 0.065  # share of heads that the paper found critical: 29 of 448


def main() -> int:
    """Measure; print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="qwen3_1p7b")
    parser.add_argument(
        "--num-layers", type=int, help="fewer than the preset's, on a small machine"
    )
    parser.add_argument("--length", type=int, default=4096, help="tokens per sample")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--receivers-only", action="store_true", help="no path patching")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # Megatron warns of every optional package
    cpu.install_if_needed()
    figures = measure(args)
    for name, value in figures.items():
        print(f"{name:>40}: {value:.4g}" if isinstance(value, float) else f"{name:>40}: {value}")
    if args.out:
        write_json(args.out, figures, overwrite=True)
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times in seconds, and the extrapolation to the paper's scoring."""
    import torch

    from megatron_hydra.selection.scorers.activation_patching import ActivationPatching, patch_heads
    from megatron_hydra.selection.scorers.activations import run_with_activations
    from megatron_hydra.selection.scorers.path_patching import PathPatching
    from megatron_hydra.tasks.readout import answer_logits

    model, batch = _model_and_pair(args)
    config = model.config
    num_heads = config.num_layers * config.num_attention_heads
    every = {i: range(config.num_attention_heads) for i in range(config.num_layers)}
    kept = (batch.num_answer_tokens,)
    with torch.no_grad():
        forward = _median(args.runs, lambda: answer_logits(model, batch.clean, *kept))
        clean = run_with_activations(model, batch.clean, *kept)
        corrupt = run_with_activations(model, batch.corrupt, *kept)
        patches = _median(args.runs, lambda: patch_heads(model, batch, clean, corrupt, every))
        whole = _median(args.runs, lambda: ActivationPatching().measure(model, batch))
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "preset": args.preset,
        "num_layers": config.num_layers,
        "length_tokens": args.length,
        "forward_s": forward,
        "head_pair_patch_s": patches / num_heads,
        "patches_per_forward": forward / (patches / num_heads),
        "pair_receivers_s": whole,
        "receivers_448_heads_40_pairs_min": _extrapolate(whole, num_heads),
    }
    if not args.receivers_only:
        scorer = PathPatching(max_rounds=1)
        scorer.start_round({"activation_patching": {"random": _critical_heads(config)}})
        seconds = _median(max(1, args.runs // 2), lambda: scorer.measure(model, batch))
        figures["num_targets"] = len(scorer.targets)
        figures["pair_senders_s"] = seconds
        figures["senders_448_heads_40_pairs_a_round_min"] = _extrapolate(seconds, num_heads)
    return {**figures, "versions": versions(), "command": " ".join(sys.argv)}


def _extrapolate(pair_s: float, num_heads: int) -> float:
    """Minutes for the paper's heads and pairs, from the seconds of all heads on one pair."""
    return _WHOLE[1] * pair_s * _WHOLE[0] / num_heads / 60


def _critical_heads(config: Any) -> Any:
    """Effects [1, layers, heads] of as many receivers as the paper found, evenly spread."""
    import torch

    num_heads = config.num_layers * config.num_attention_heads
    effects = torch.zeros(num_heads)
    effects[torch.linspace(0, num_heads - 1, max(1, round(_CRITICAL * num_heads))).long()] = 1.0
    return effects.view(1, config.num_layers, config.num_attention_heads)


def _median(runs: int, function: Callable[[], Any]) -> float:
    import torch

    function()
    seconds = []
    for _ in range(runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _model_and_pair(args: argparse.Namespace) -> tuple[Any, Any]:
    """A teacher of random weights and one pair whose needle stands in the middle."""
    import torch

    from megatron_hydra.model.build import build_model
    from megatron_hydra.model.config import HydraConfig
    from megatron_hydra.parallel import initialize_model_parallel
    from megatron_hydra.selection.scorers.base import collate
    from megatron_hydra.tasks.needles import CounterfactualPair, Sample
    from megatron_hydra.tasks.probes import Probe
    from megatron_hydra.teachers.loading import megatron_fields

    initialize_model_parallel()
    on_gpu = torch.cuda.is_available()
    shape = dict(PRESETS[args.preset])
    shape["num_layers"] = args.num_layers or shape["num_layers"]
    dtype = torch.bfloat16 if on_gpu else torch.float32
    backend = "transformer_engine" if on_gpu else "local"
    config = HydraConfig(
        **{**megatron_fields(dtype), "qk_layernorm": True, **shape},
        seq_length=args.length,
        backend=backend,
    )
    model = build_model(config, None).eval()
    if on_gpu:
        model.cuda()
    tokens = torch.randint(config.vocab_size, (args.length - _ANSWER_TOKENS,)).tolist()
    middle = len(tokens) // 2
    samples = []
    for answer in ([1, 2, 3, 4], [5, 6, 7, 8]):
        words = [*tokens[:middle], *answer, *tokens[middle + _ANSWER_TOKENS :]]
        samples.append(Sample(words, answer, tuple(range(middle, middle + _ANSWER_TOKENS))))
    pair = CounterfactualPair(*samples)
    return model, collate(Probe("random", "retrieval", [pair], args.length, 0), [0], [1.0])


if __name__ == "__main__":
    sys.exit(main())
