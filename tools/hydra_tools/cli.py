"""The console script ``megatron-hydra <verb>``: one file per verb, imported when it is called."""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import logging
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import megatron_hydra
from megatron_hydra.errors import UserError
from megatron_hydra.provenance import COMMAND

# In the order of the work. Each is a module of this package (`-` is `_` there) with
# `add_arguments(parser)` and `run(args) -> int`; importing one may be slow (PyTorch, Megatron), so
# only the called one is.
VERBS = {
    "doctor": "tell what is installed here, missing or slow, and what mends it",
    "score": "measure how much each attention head of a teacher matters",
    "plan": "choose the heads that keep full attention, from scores and a budget",
    "inspect": "tell what a plan keeps, what it costs, and how sure its choice is",
    "pareto": "tabulate what several budgets keep of the scores, and what they cost",
    "convert": "turn a teacher and a plan into a hybrid checkpoint",
    "preprocess": "write text as Megatron's indexed token files",
    "warm-up": "compile the kernels of LA heads before they are needed; for GPUs",
    "estimate": "predict memory, time, disk and cost of stages, before any GPU is taken",
    "train": "run one stage of the transfer from a YAML file; start it with torchrun",
    "transfer": "run all steps from score to report by one YAML file, what is done excepted",
    "study": "train and measure many arms by one YAML file, side by side, and write their page",
    "status": "tell how far trainings are, from their folders",
    "certify": "hold a model to itself at every parallel layout; start it with torchrun",
    "export": "write a checkpoint as a Hugging Face folder that runs without this package",
    "evaluate": "measure retrieval and perplexity of models",
    "report": "write one HTML page about a transfer",
}
# fla says there which of its kernels it runs.
_LOGGERS = ("megatron_hydra", "hydra_kernels", "hydra_tools", "fla.backends")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code: 0, 2 for bad input, 130 when interrupted.

    What a verb writes is written before it prints: 141 says that nobody read all of its words.

    Raises:
        SystemExit: With 143 or 129 when SIGTERM or SIGHUP has ended it, 2 for a wrong option.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in VERBS:
        return _without_verb(arguments)
    log_to_stderr()
    try:
        with _tidy_ends():
            code = run_verb(arguments[0], arguments[1:], f"megatron-hydra {arguments[0]}")
            sys.stdout.flush()
        return code
    except UserError as error:
        print(f"megatron-hydra: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("megatron-hydra: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return _without_reader()


def run_verb(verb: str, arguments: Sequence[str], prog: str) -> int:
    """Import a verb and run it; ``prog`` is what its help calls the command.

    Raises:
        UserError: For bad input.
    """
    # Megatron and Transformer Engine warn of every optional package that is absent, Megatron of its
    # own internal calls; under torchrun on every rank.
    warnings.filterwarnings("ignore", module=r"megatron\.|nemo\.|transformer_engine")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Not every encoding has the lines of a table, and not every file name is UTF-8.
        sys.stdout.reconfigure(errors="replace")
    module = importlib.import_module(f"hydra_tools.{verb.replace('-', '_')}")
    parser = argparse.ArgumentParser(
        prog=prog,
        description=f"{VERBS[verb].capitalize()}.",
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    told = COMMAND.set(shlex.join(typed(verb, arguments)))
    try:
        return int(module.run(parser.parse_args(arguments)))
    finally:
        COMMAND.reset(told)


def typed(verb: str, arguments: Sequence[str]) -> list[str]:
    """What a user types on each node; ``sys.argv`` has a file's place on this machine."""
    start = ["megatron-hydra", verb]
    if "LOCAL_WORLD_SIZE" in os.environ:  # set by torchrun
        num_local = os.environ["LOCAL_WORLD_SIZE"]
        num_nodes = int(os.environ["WORLD_SIZE"]) // int(num_local)
        nodes = [] if num_nodes == 1 else ["--nnodes", str(num_nodes)]
        ranks = [*nodes, "--nproc-per-node", num_local]
        start = ["torchrun", *ranks, "-m", f"hydra_tools.{verb}"]
    return [*start, *arguments]


@contextmanager
def _tidy_ends() -> Iterator[None]:
    """Let signals that end a process end the block as an error does: half an output is removed."""
    main_process = os.getpid()

    def end(number: int, _frame: object) -> None:
        if os.getpid() == main_process:  # not one that it has forked
            print(f"megatron-hydra: ended by {signal.Signals(number).name}", file=sys.stderr)
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in earlier.items():
        if handler is signal.SIG_DFL:  # `nohup` has SIGHUP ignored
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in earlier.items():
            if signal.getsignal(number) is end:
                signal.signal(number, handler)


def _without_reader() -> int:
    """End as `| head` wants it: silent, with the shell's code for SIGPIPE."""
    # Python flushes what is left when it ends, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def _without_verb(arguments: list[str]) -> int:
    """``--help``, ``--version``, or an error that names the nearest verb."""
    width = max(map(len, VERBS))
    parser = argparse.ArgumentParser(
        prog="megatron-hydra",
        usage="megatron-hydra <verb> [options]",
        description=megatron_hydra.__doc__,
        epilog="verbs, in the order of the work:\n"
        + "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
        + "\n\nmegatron-hydra <verb> --help tells the options of a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"megatron-hydra {megatron_hydra.__version__}"
    )
    parser.add_argument("verb", nargs="?", help=argparse.SUPPRESS)
    options, _ = parser.parse_known_args(arguments)
    if options.verb is None:
        parser.error(f"no verb given: use one of {', '.join(VERBS)}")
    near = difflib.get_close_matches(options.verb, VERBS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(VERBS)}"
    parser.error(f"unknown verb {options.verb!r}: {hint}")


def log_to_stderr() -> None:
    """Show what our own packages log; other packages keep their own level."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
