#!/bin/bash
# One training stage on several machines without a scheduler. On every machine, from the
# repository's root (the same checkout, environment and file system on all), run the same line:
#
#   HEAD_NODE=node0 NUM_NODES=2 examples/multinode/torchrun.sh \
#       --config examples/qwen3_1p7b/stage1_align.yaml
#
# HEAD_NODE is the name or address of one of them, as the others reach it. The order does not
# matter: each waits for the rest. To resume, run the same lines again. A signal (kill, Ctrl-C, a
# terminal that closes) to one machine's torchrun saves and stops all. Clocks must agree to 15 s.
#
# More of the environment, each with its default:
#   GPUS_PER_NODE=8         ranks on each machine
#   RENDEZVOUS_PORT=29500   another for each run that shares its HEAD_NODE
#   TORCHRUN_OPTIONS=       such as "--max-restarts=3": a dead rank or machine starts anew and all go
#                           on from the newest checkpoint (run the line again on a machine that died)
#   TORCHRUN=torchrun       or ft_launcher (nvidia-resiliency-ext, strategy.heartbeat_seconds)
#   IS_HEAD=                1 on HEAD_NODE and 0 elsewhere, where that is an address of a second
#                           network, or a machine cannot look up its own name
# Where machines have several networks, or know their own name as 127.0.1.1 only, name the one to use:
#   export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0

set -euo pipefail

: "${HEAD_NODE:?name or address of one of the machines}"
: "${NUM_NODES:?number of machines}"
read -ra options <<<"${IS_HEAD:+--rdzv-conf=is_host=$IS_HEAD} ${TORCHRUN_OPTIONS:-}"

# Ranks compare it with those that torchrun has brought together.
export HYDRA_NUM_NODES=$NUM_NODES
# Else ranks that start anew read addresses of the dead (PyTorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Seconds that torchrun gives a save, once it has had a signal.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

exec "${TORCHRUN:-torchrun}" \
    --nnodes="$NUM_NODES" \
    --nproc-per-node="${GPUS_PER_NODE:-8}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$HEAD_NODE:${RENDEZVOUS_PORT:-29500}" \
    --rdzv-id="${RENDEZVOUS_ID:-hydra}" \
    "${options[@]}" \
    -m hydra_tools.train \
    "$@"
