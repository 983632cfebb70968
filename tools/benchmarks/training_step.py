"""Times one optimizer step of a Qwen3-1.7B-shaped hybrid in each stage, and of full attention.

    python tools/benchmarks/training_step.py --out training_step.json
    torchrun --nproc-per-node 2 tools/benchmarks/training_step.py --cp 2 --lengths 131072 \\
        --stages align distill long_context full
    torchrun --nproc-per-node 2 tools/benchmarks/training_step.py --tp 2 --plan uniform uneven \\
        --lengths 16384 --stages distill

One GPU, or several with --tp (then sequence parallel too) and --cp; bf16 with float32 main weights
(Megatron's distributed optimizer), one sequence per step, random weights and tokens. `full` trains
the teacher's own architecture with the loss of stage 3: what each stage would cost without linear
attention, or, for `distill`, beside its teacher. `distill, modelopt` is the hybrid and its teacher
under NeMo's own distillation by ModelOpt, with the same two losses. With --cuda-graphs the layers
that train replay Megatron's CUDA graphs; nothing is recomputed, and the peak is all that PyTorch
holds on to, as the graphs' memory is not among what it calls allocated. MFU counts the model's own
operations (no recomputation; the teacher's forward where there is one) against the 989 TFLOP/s of
an H100 or H200; memory is of the rank that takes most.
`first step s` is the first step's time, after the heads' kernels are loaded as in training, and
compiled where no cache has them.

`--plan uneven` has as many FA heads as `uniform`, dealt to the layers as a global top-K of scores
does (`uneven_plan`); with both, `/ uniform` is the ratio of their times. Of
tensor-parallel ranks, heads placed `balanced`, the row says the attentions' forward TFLOP that the
placement predicts for each rank, of all layers, and, as `dearest`, the sum over the layers of the
dearest rank's: the others wait for it in each layer. `NCCL ms` is how long NCCL's kernels ran on
each rank in one more step, under the profiler: a rank that waits is in them for longer.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra_kernels.linear_kl import LossOptions
from hydra_kernels.measure import device_figures, median_ms, peak_gib, print_table, write
from megatron.core.parallel_state import get_context_parallel_group
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.cuda_graphs import create_cudagraphs
from qwen3_1p7b import DIM, FFN, GROUPS, HEADS, HIDDEN, LAYERS, VOCAB
from step_costs import MODELOPT, PEAK_TFLOP_PER_S, model_tflop, predicted_gib, rank_tflop
from uneven_plan import uneven_plan

from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.build import build_model, load_kernels, release_cuda_graphs
from megatron_hydra.model.sequence import shard_batch
from megatron_hydra.parallel import initialize_model_parallel

STAGES = ("align", "distill", "long_context", "full", "full distill", MODELOPT)
PLANS = ("uniform", "uneven")
LENGTHS = (4096, 16384, 65536)
KIND, SCHEMA_VERSION = "megatron_hydra.training_step_benchmark", 1


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="TOKENS")
    parser.add_argument("--plan", nargs="+", choices=PLANS, default=PLANS[:1], dest="plans")
    parser.add_argument("--fa-heads-per-layer", type=int, default=4, help="of uneven, the mean")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--chunk-tokens", type=int, default=1024)
    parser.add_argument("--fused-kernels", choices=("triton", "reference"), default="triton")
    parser.add_argument("--fp8", action="store_true", help="the linears in FP8, as in training")
    parser.add_argument("--overlap-branches", action=argparse.BooleanOptionalAction)
    parser.add_argument("--cuda-graphs", action="store_true", help="of the layers that train")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--cp", type=int, default=1, help="context-parallel ranks")
    parser.add_argument(
        "--recompute-layers", type=int, help="by default none up to 4,096 tokens, then all"
    )
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # Megatron warns of every optional package
    data = {"kind": KIND, "schema_version": SCHEMA_VERSION, "command": " ".join(sys.argv)}
    initialize_model_parallel(args.tp, context=args.cp)
    if dist.get_world_size() != args.tp * args.cp:
        parser.error(f"{dist.get_world_size()} ranks are not tp {args.tp} x cp {args.cp}")
    if "uneven" in args.plans and args.layers != LAYERS:
        parser.error(f"--plan uneven has {LAYERS} layers; --layers is {args.layers}")
    if args.cuda_graphs and {"align", MODELOPT} & {*args.stages}:
        parser.error("--cuda-graphs is for --stages whose own layers train, whole")
    if args.cuda_graphs:  # which take random numbers from Transformer Engine's tracker alone
        model_parallel_cuda_manual_seed(1234, te_rng_tracker=True, force_reset_rng=True)
    is_first = dist.get_rank() == 0
    data |= device_figures() | {"tp": args.tp, "cp": args.cp}
    rows: list[dict[str, Any]] = []
    if args.stages is STAGES and find_spec("nemo") is None:
        print(f"NeMo is not installed: without its {MODELOPT!r}")
        args.stages = [stage for stage in STAGES if stage != MODELOPT]
    if MODELOPT in args.stages:
        # Here, as NeMo keeps what failed to be imported, and with it the frames that asked for it:
        # of a function that holds models, those would never be freed.
        import nemo.collections.llm.modelopt.distill.model  # noqa: F401
    for length, stage, plan_name in _runs(args):
        rows.append(measure(stage, length, plan_name, args))
        rows[-1]["/ uniform"] = _over_uniform(rows[-1], rows)
        if is_first:
            print_table(rows[-1:])
            write(args.out, data, rows)
    if is_first:
        print()
        print_table(rows)
        print(data["device"], data["versions"])
    dist.destroy_process_group()
    return 0


def _runs(args: argparse.Namespace) -> Iterator[tuple[int, str, str | None]]:
    """Length, stage and name of the plan of each row; full attention has no plan."""
    for length, stage in product(args.lengths, args.stages):
        if stage.startswith("full"):
            yield length, stage, None
        else:
            yield from ((length, stage, name) for name in PLANS if name in args.plans)


def _over_uniform(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """A row's time over that of the uniform plan at the same stage and length, if it is there."""
    uniform = {(r["stage"], r["tokens"]): r["step ms"] for r in rows if r["plan"] == "uniform"}
    of_uniform = uniform.get((row["stage"], row["tokens"]))
    return None if None in (of_uniform, row["step ms"]) else row["step ms"] / of_uniform


def measure(
    stage: str, length: int, plan_name: str | None, args: argparse.Namespace
) -> dict[str, Any]:
    """Step time, rate and memory of one stage at one length.

    None where memory does not suffice; of several ranks that is an error, as the others wait.
    """
    layers = args.recompute_layers
    if layers is None:
        layers = 0 if length <= 4096 or args.cuda_graphs else args.layers
    plan = None if plan_name is None else _plan(plan_name, args)
    row: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "stage": stage, "plan": plan_name or "",
        "FA heads": args.layers * HEADS if plan is None else plan.num_fa_heads,
        "tokens": length, "layers recomputed": layers, "first step s": None,
    }  # fmt: skip
    student = milliseconds = peak = nccl_ms = costs = dearest = None
    gc.collect()  # DDP's hooks hold the model in a cycle
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        student = _student(plan, length, layers, args)
        if plan is not None and args.tp > 1:
            costs, dearest = rank_tflop(student)
        step, row["first step s"] = _training_step(student, stage, length, args)
        state = (torch.cuda.memory_allocated() - before) / 2**30
        row["weights and optimizer GiB"] = max(_of_all_ranks(state))
        milliseconds = median_ms(step, rep_ms=1)
        if args.cuda_graphs:
            peak = torch.cuda.max_memory_reserved() / 2**30
        else:
            peak = peak_gib(step) + torch.cuda.memory_allocated() / 2**30
        peak = max(_of_all_ranks(peak))
        if args.tp > 1:
            nccl_ms = _of_all_ranks(_nccl_ms(step))
        if args.profile:
            table = dict(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=70)
            print(_profiled(step).table(**table))
    except torch.OutOfMemoryError:
        if dist.get_world_size() > 1:
            raise
        row["weights and optimizer GiB"] = None
    finally:
        if args.cuda_graphs and student is not None:
            release_cuda_graphs(student)
    tflop = model_tflop(stage, length, args.layers, plan)
    seconds = None if milliseconds is None else milliseconds / 1e3
    predicted = None  # of FP8 and graphs the formula knows nothing
    if not args.fp8 and not args.cuda_graphs:
        sizes = (args.layers, args.chunk_tokens, args.tp, args.cp)
        predicted = predicted_gib(stage, length, layers, plan, *sizes)
    row |= {
        "peak GiB": peak,
        "predicted GiB": predicted,
        "step ms": milliseconds,
        "tokens/s": None if seconds is None else length / seconds,
        "MFU": None if seconds is None else tflop / seconds / PEAK_TFLOP_PER_S / args.tp / args.cp,
    }
    if args.tp > 1:
        row |= {"rank TFLOP": costs, "dearest": dearest, "NCCL ms": nccl_ms}
    return row


def _of_all_ranks(value: Any) -> list[Any]:
    """Each rank's value."""
    values: list[Any] = [value] * dist.get_world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def _nccl_ms(step: Callable[[], Any]) -> float | None:
    """How long NCCL's kernels run on this rank in a step, waiting for the others counted in.

    None, which is said, where the profiler shows none: some machines let nobody profile.
    """
    events = _profiled(step)  # among them may be PyTorch's own marks around the kernels, "nccl:..."
    kernels = [x for x in events if x.key.startswith("nccl") and "Kernel" in x.key]
    if not kernels:
        print("the profiler shows no kernel of NCCL's")
        return None
    return sum(event.self_device_time_total for event in kernels) / 1e3


def _training_step(
    student: Any, stage: str, length: int, args: argparse.Namespace
) -> tuple[Callable[[], Any], float]:
    """A function that runs one step, called once, and the seconds that the call took."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megatron_hydra.model.gradients import finalize_model_grads
    from megatron_hydra.transfer.alignment import Alignment
    from megatron_hydra.transfer.distillation import distillation_loss

    teacher = None
    if stage not in ("long_context", "full"):
        teacher = _model(None, length, args).eval().requires_grad_(False)
    if stage == "align":
        theirs = dict(teacher.named_parameters())
        for name, parameter in student.named_parameters():
            if name in theirs and "self_attention" not in name:
                parameter.data = theirs[name].data
        alignment = Alignment(student, teacher)
    if stage == MODELOPT:
        reduce_losses = _modelopt(student, teacher)
    ddp = DistributedDataParallel(
        student.config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
        student,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=1e-5, bf16=True, params_dtype=torch.bfloat16,
            use_distributed_optimizer=True, barrier_with_L1_time=False,
        ),
        [ddp],
    )  # fmt: skip
    torch.manual_seed(0)  # the same tokens on all ranks
    tokens = torch.randint(VOCAB, (1, length), device="cuda")
    whole = {
        "tokens": tokens,
        "positions": torch.arange(length, device="cuda")[None],
        "labels": tokens.roll(-1, 1),
        "mask": torch.ones(1, length, device="cuda"),
    }
    batch = shard_batch(whole, get_context_parallel_group())
    tokens, positions, labels, mask = batch.values()

    def loss() -> torch.Tensor:
        if stage == "align":
            losses = torch.stack(list(alignment.forward(tokens, positions).values()))
            return alignment.pipeline_output(losses.sum() / length)
        if stage == MODELOPT:
            losses = student(tokens, positions, None, labels=labels)
            return reduce_losses({"loss_mask": mask}, losses)[0]
        parts = distillation_loss(
            student, teacher, tokens, positions, labels, mask,
            loss=LossOptions(
                kl_weight=0.0 if teacher is None else 1.0, ce_weight=1.0,
                chunk_tokens=args.chunk_tokens,
            ),
        )  # fmt: skip
        return parts.loss_sum / length

    def step() -> None:
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        ddp.set_is_first_microbatch()  # FP8 rounds the new weights
        loss().backward()
        finalize_model_grads([ddp])
        optimizer.step()

    load_kernels(student, 1)
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first_s = time.perf_counter() - start
    if args.cuda_graphs:
        create_cudagraphs()
    return step, first_s


def _modelopt(student: Any, teacher: Any) -> Callable[..., Any]:
    """Make the student a ModelOpt distillation model as NeMo does; what reduces its losses."""
    import modelopt.torch.distill as mtd
    from nemo.collections.llm.modelopt.distill import loss, model, utils

    config = utils.load_distillation_config(None, student.config, teacher.config)
    config.skip_lm_loss = False
    config.loss_balancer = loss.LogitsAndIntermediatesLossBalancer()
    fields = dict(criterion=config.criterion, loss_balancer=config.loss_balancer)
    mtd.convert(student, mode=[("kd_loss", {"teacher_model": teacher, **fields})])
    utils.adjust_distillation_model_for_mcore(student, config)
    student.train()
    return model._DistillationLossReduction(student.compute_kd_loss).forward


def _student(
    plan: HeadPlan | None, length: int, recompute_layers: int, args: argparse.Namespace
) -> Any:
    from megatron_hydra.model.config import recompute_fields

    some = recompute_layers if recompute_layers < args.layers else None
    fields = recompute_fields("full" if recompute_layers else "none", some)
    if args.cuda_graphs:
        fields["cuda_graph_impl"] = "local"
    return _model(plan, length, args, **fields)


def _model(plan: HeadPlan | None, length: int, args: argparse.Namespace, **more: Any) -> Any:
    from megatron_hydra.model.config import HydraConfig
    from megatron_hydra.teachers.loading import megatron_fields

    fields = megatron_fields(torch.bfloat16) | dict(
        qk_layernorm=True,
        num_layers=args.layers, hidden_size=HIDDEN, ffn_hidden_size=FFN,
        num_attention_heads=HEADS, num_query_groups=GROUPS, kv_channels=DIM, vocab_size=VOCAB,
        rotary_base=1e6, share_embeddings_and_output_weights=True, seq_length=length,
        backend="transformer_engine", fused_kernels=args.fused_kernels,
        overlap_branches=args.overlap_branches, placement="balanced",
        apply_rope_fusion=True, bias_activation_fusion=True,
        tensor_model_parallel_size=args.tp, sequence_parallel=args.tp > 1,
        context_parallel_size=args.cp, **more,
    )  # fmt: skip
    if args.fp8:
        fields |= {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
    return build_model(HydraConfig(**fields), plan).cuda().bfloat16()


def _plan(name: str, args: argparse.Namespace) -> HeadPlan:
    if name == "uneven":
        return uneven_plan(args.layers * args.fa_heads_per_layer)
    stride = HEADS // args.fa_heads_per_layer
    heads = {i: tuple(range(i % stride, HEADS, stride)) for i in range(args.layers)}
    return HeadPlan.from_fa_heads(heads, args.layers, HEADS, GROUPS)


def _profiled(step: Callable[[], Any]) -> Any:
    """What the GPU ran in a step, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return profiler.key_averages()


if __name__ == "__main__":
    sys.exit(main())
