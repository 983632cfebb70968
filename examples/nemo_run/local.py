"""The three stages by NeMo-Run on this machine.

python examples/nemo_run/local.py --ranks 8 [[STAGE.]section.key=value ...]
"""

from __future__ import annotations

import nemo_run as run
from stages import launch, parser

if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--ranks", type=int, default=8, help="GPUs, or processes (8)")
    args = arguments.parse_args()
    launch(args, run.LocalExecutor(ntasks_per_node=args.ranks))
