#!/bin/bash
# One training stage on several machines without a scheduler. On every machine, from the
# repository's root (the same checkout, environment and file system on all), run the same line:
#
#   HEAD_NODE=node0 NUM_NODES=2 examples/multinode/torchrun.sh \
#       --config examples/qwen3_1p7b/stage1_align.yaml
#
# HEAD_NODE is the name or address of one of them, as the others reach it. The order does not
# matter: each waits for the rest. To resume, run the same lines again. Not yet run on several machines.

set -euo pipefail

: "${HEAD_NODE:?name or address of one of the machines}"
: "${NUM_NODES:?number of machines}"

exec torchrun \
    --nnodes="$NUM_NODES" \
    --nproc-per-node="${GPUS_PER_NODE:-8}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$HEAD_NODE:${RENDEZVOUS_PORT:-29500}" \
    --rdzv-id="${RENDEZVOUS_ID:-hydra}" \
    -m hydra_tools.train \
    "$@"
