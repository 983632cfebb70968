"""`megatron-hydra train`, or `torchrun -m hydra_tools.train`: one stage from YAML."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra_tools import launch, stops
from hydra_tools.progress import SHOWN_SCALARS
from megatron_hydra.api.train import Training, train
from megatron_hydra.errors import UserError
from megatron_hydra.training.config import RunConfig, load_config
from megatron_hydra.training.run_files import NEEDLES, VALIDATION

if TYPE_CHECKING:
    from megatron_hydra.api.dry_run import DryRun

_HELD_OUT = f"{VALIDATION}loss"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--chdir",
        metavar="DIR",
        help="go there first: relative paths are from DIR, where a launcher starts elsewhere",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start anew: first remove what an earlier run wrote to log.folder, and nothing else",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check configuration, plan, data, layout and disk, predict the memory, and end; needs "
        "neither GPU nor torchrun",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the resolved YAML (defaults, what the file takes from others, overrides), and "
        "end; looks at no other file",
    )
    parser.add_argument(
        "--ranks", type=int, help="with --dry-run: GPUs in all (default: the fewest of the layout)"
    )
    parser.epilog = (
        "The same command again goes on from the newest checkpoint. SIGTERM, SIGINT, SIGHUP and "
        "SIGUSR1 save after the step in progress (torchrun gives that 30 seconds, or what "
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT says); a second one ends at once. Exit codes: 0 when the "
        f"trained model is written, 2 for bad input, {stops.EXIT_CODE} when stopped by a signal "
        "(torchrun has a code of its own for that, which is not 0)."
    )


def run(args: argparse.Namespace) -> int:
    """Train, or go on with, one stage; return the exit code."""
    if args.chdir is not None:
        try:
            os.chdir(args.chdir)
        except OSError as error:
            raise UserError(f"--chdir {args.chdir}: {error.strerror}") from error
    if args.ranks is not None and (not args.dry_run or args.ranks < 1):
        raise UserError("--ranks is the number of GPUs, 1 or more, that --dry-run is to assume")
    if args.print_config:
        sys.stdout.write(load_config(args.config, args.overrides).to_yaml())
        return 0
    if args.dry_run:
        return _dry_run(args)
    with stops.listening(_say) as asked:
        config = load_config(args.config, args.overrides)
        launch.check_launcher("train")
        shown = _Progress(config)

        def tell_of_the_stop(stopped: Training) -> None:
            shown.close()  # what is said next starts on a line of its own
            asked.end()
            _say(_words_on_a_stop(stopped, asked.name, args.overwrite))

        try:
            done = train(
                config,
                config_file=args.config,
                overwrite=args.overwrite,
                on_step=shown.show,
                asks_to_stop=asked.is_asked,
                on_stop=tell_of_the_stop,
            )
        finally:
            shown.close()
        if not done.is_complete:
            stops.keep_from_restarting(asked.name)
            return stops.EXIT_CODE
        if launch.rank() == 0:
            folder = done.folder
            print(f"{folder.path} is complete: the trained model is {folder.hybrid}")
        return 0


def train_stage(config: str, overrides: Sequence[str] = (), chdir: str | None = None) -> None:
    """The verb as a function, which a task of NeMo-Run's can be: `run.Partial(train_stage, …)`.

    NeMo's PreemptionPlugin takes such a task: on SIGTERM it saves and stops by itself.

    Args:
        config: YAML file of the run.
        overrides: Each `section.key=value`.
        chdir: Where relative paths are from; None: where the launcher starts.

    Raises:
        SystemExit: With the verb's exit code.
    """
    at = [] if chdir is None else ["--chdir", chdir]
    sys.exit(launch.main("train", [*at, "--config", config, *overrides]))


def _dry_run(args: argparse.Namespace) -> int:
    from megatron_hydra.api.dry_run import dry_run

    config = load_config(args.config, args.overrides)
    found = dry_run(config, args.ranks, args.config)
    max_steps = config.trainer.max_steps
    start = f", going on from step {found.saved_step:,}" if found.saved_step else ""
    seen = found.num_tokens / max(1, found.dataset_tokens)
    print(f"{found.folder}: {config.transfer.stage}, {max_steps:,} steps{start}")
    print(f"  plan: {found.fa_heads} of {found.total_heads} heads keep full attention")
    print(f"  ranks: {found.num_ranks}, of which {found.data_parallel} data-parallel replicas")
    print(
        f"  tokens: {found.num_tokens:,}, {seen:.3g} times the {found.dataset_tokens:,} there are"
    )
    print(f"  {found.lengths}")
    if found.up_sampling is not None:
        long = found.up_sampling
        print(
            f"  up-sampled: the {long.num_long:,} of {long.num_documents:,} documents of "
            f"{config.data.long_document_tokens:,} tokens or more; they have {100 * long.share:.3g}"
            f"% of the tokens, and {100 * long.share_seen:.3g}% of those that the run sees, each "
            f"{long.times_seen:.3g} times"
        )
    print(
        f"  disk: {found.checkpoint_bytes / 2**30:.3g} GiB or more for each checkpoint, of which "
        f"{config.resume.keep} are kept, {found.hybrid_bytes / 2**30:.3g} GiB for the model"
    )
    if found.memory is None:
        print(f"  memory: not predicted, as {found.why_no_memory}")
    else:
        print(
            f"  memory: {found.memory.peak / 2**30:.3g} GiB predicted on the GPU that needs most: "
            f"{found.memory.state / 2**30:.3g} for weights, gradients and optimizer, the rest for "
            "activations"
            + " (of pipeline stages: counted, never measured)"
            * (config.strategy.pipeline_model_parallel_size > 1)
        )
    if found.needles is not None:
        print(f"  {_words_on_needles(found)}")
    return 0


def _words_on_needles(found: DryRun) -> str:
    needles = found.needles
    assert needles is not None
    teacher = " and one of the teacher" if needles.asks_teacher else ""
    words = (
        f"needles: {needles.num_rounds:,} rounds{teacher} of {needles.num_questions:,} questions "
        f"of {needles.num_tokens:,} tokens, each round {needles.num_batches:,} times "
        f"{needles.num_passes} forward passes of a replica; caches of "
        f"{found.needle_cache_bytes / 2**30:.3g} GiB on the GPU that needs most"
    )
    if found.memory is None:
        return words
    whole = (found.memory.state + found.memory.decoding) / 2**30
    return f"{words}, where it then needs {whole:.3g} GiB in all (counted, never measured)"


def _words_on_a_stop(stopped: Training, signal_name: str, overwrite: bool) -> str:
    folder = stopped.folder
    command = "the same command without --overwrite" if overwrite else "the same command"
    return (
        f"{signal_name or 'a signal to another rank'}: stopped after step {stopped.num_steps} of "
        f"{folder.config.trainer.max_steps}, which is saved in {folder.checkpoints}; {command} "
        "goes on from there"
    )


def _say(sentence: str) -> None:
    """Tell torchrun, and on rank 0 the user; one write, as the thread that takes signals tells."""
    line = f"megatron-hydra: {sentence}"
    launch.tell_torchrun(line)
    if launch.rank() == 0:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


class _Progress:
    """One updating line: step, rate, time left and losses; made at the first finished step."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.bar: Any = None
        self.validation: dict[str, float] = {}  # the newest
        self.needles = ""  # likewise, and when

    def show(self, step: int, scalars: dict[str, float]) -> None:
        """Move the line to ``step`` finished steps."""
        from hydra_tools.progress import meter

        if self.bar is None:
            stage, max_steps = self.config.transfer.stage, self.config.trainer.max_steps
            self.bar = meter(stage, "step", max_steps, initial=step - 1)
        if _HELD_OUT in scalars:  # of some steps alone; shown until the next one has another
            self.validation = {_HELD_OUT: scalars[_HELD_OUT]}
        for name in scalars:
            if name.startswith(NEEDLES):
                self.needles = f", {name} {scalars[name]:.4g} at step {step:,}"
        text = _progress_text({**scalars, **self.validation}) + self.needles
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(step - self.bar.n)

    def close(self) -> None:
        """Leave the finished line standing."""
        if self.bar is not None:
            self.bar.close()


def _progress_text(scalars: dict[str, float]) -> str:
    """Losses and rates; of the layers' alignment losses the worst, as a line holds no more."""
    shown = {name: scalars[name] for name in SHOWN_SCALARS if name in scalars}
    layers = {name: value for name, value in scalars.items() if name.startswith("alignment/")}
    if layers:
        worst = max(layers, key=lambda name: layers[name])
        shown = {"loss": shown.pop("loss"), f"worst {worst}": layers[worst], **shown}
    if _HELD_OUT in scalars:
        shown[_HELD_OUT] = scalars[_HELD_OUT]
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())


if __name__ == "__main__":
    sys.exit(launch.main("train"))
