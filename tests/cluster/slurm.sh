#!/bin/bash
# Slurm over the hosts of hosts.sh: slurm.sh up | down | slurmd node1 (start one again after a crash)
# Packages: slurmctld slurmd slurm-client munge. Then, from this machine: sinfo, sbatch, …
set -euo pipefail
here=$(dirname "$(realpath "$0")")
state=/tmp/hydra-slurm
case ${1:?up, down or slurmd HOST} in
up)
    rm -rf $state # jobs of an earlier cluster
    mkdir -p $state/state /run/munge /etc/slurm
    cp "$here"/slurm/*.conf /etc/slurm/
    sed -i "s/^SlurmctldHost=.*/SlurmctldHost=$(hostname -s)(10.77.0.254)/" /etc/slurm/slurm.conf
    if [ ! -S /run/munge/munge.socket.2 ]; then
        chown munge: /run/munge; su -s /bin/sh munge -c /usr/sbin/munged
    fi
    slurmctld
    for file in /tmp/hydra-hosts/node*.pid; do "$0" slurmd $(basename $file .pid); done
    sleep 2
    scontrol update NodeName=ALL State=RESUME 2>/dev/null || true # what an earlier end left behind
    ;;
slurmd)
    mkdir -p $state/$2
    # nice: what it starts inherits it
    setsid nice "$here/hosts.sh" on $2 slurmd -N $2
    ;;
down)
    scancel --state=running,pending,suspended --user=root 2>/dev/null || true
    sleep 2
    for file in $state/slurmctld.pid; do [ -e $file ] && kill $(cat $file); done
    for file in /tmp/hydra-hosts/node*.pid; do
        host=$(basename $file .pid)
        [ -e $state/$host.pid ] && "$here/hosts.sh" on $host kill $(cat $state/$host.pid) || true
    done
    munged=$(cat /run/munge/munged.pid 2>/dev/null || true)
    [ -z "$munged" ] || kill $munged
    ;;
esac
