"""The three stages by NeMo-Run on Slurm, a job each, that waits for the one before.

    python examples/nemo_run/slurm.py --account A --partition P --nodes 4 [key=value ...]

From a login node. Five minutes before its time limit Slurm sends SIGTERM: the ranks save, the job
ends with a code that is not 0, and NeMo-Run requeues it; so it does after a crash, --retries times.
The next stage starts when its job has ended well. See examples/slurm/transfer.sbatch for what has
to be the same on all nodes.

PreemptionPlugin sets that signal too, and trainings need no more of it. NeMo's takes functions
alone, as run.Partial(hydra_tools.train.train_stage, config=…), Megatron-Bridge's scripts, with
script_args_converter_fn=lambda args: []. With strategy.heartbeat_seconds the launcher has to be
run.FaultTolerance(max_restarts=3), which is nvidia-resiliency-ext's.
"""

from __future__ import annotations

import nemo_run as run
from stages import launch, parser

if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--account", required=True)
    arguments.add_argument("--partition", required=True)
    arguments.add_argument("--nodes", type=int, default=1)
    arguments.add_argument("--gpus-per-node", type=int, default=8)
    arguments.add_argument("--time", default="24:00:00")
    arguments.add_argument("--retries", type=int, default=20)
    arguments.add_argument("--container-image", help="for Pyxis; this folder is mounted as it is")
    args = arguments.parse_args()
    home = run.config.get_nemorun_home()
    launch(
        args,
        run.SlurmExecutor(
            account=args.account,
            partition=args.partition,
            nodes=args.nodes,
            ntasks_per_node=1,  # torchrun, which starts the ranks
            gpus_per_node=args.gpus_per_node,
            torchrun_nproc_per_node=args.gpus_per_node,
            time=args.time,
            exclusive=True,
            mem="0",
            signal="TERM@300",
            retries=args.retries,
            container_image=args.container_image,
            container_mounts=[f"{p}:{p}" for p in {args.configs.resolve().parents[1], home}],
            # On this very machine; nothing is copied.
            tunnel=run.LocalTunnel(job_dir=f"{home}/experiments"),
            packager=run.Packager(),
        ),
    )
