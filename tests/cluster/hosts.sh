#!/bin/bash
# Several hosts on one Linux machine: network namespaces on a bridge, each with its own hostname,
# /etc/hosts, process numbers and (if wanted) folders. Root only; needs iproute2 and util-linux.
#
#   hosts.sh up 2                     # node0 10.77.0.10, node1 10.77.0.11, … on bridge hydra0
#   hosts.sh on node0 CMD...          # run a command there, in the current folder
#   hosts.sh crash node1              # power cut: SIGKILL to everything there at once
#   hosts.sh boot node1               # start it, if it was killed by other means
#   hosts.sh unplug node1             # network failure: link down, processes live on
#   hosts.sh plug node1
#   hosts.sh down                     # remove all of it
#
# PRIVATE="a/folder b/folder" hosts.sh on node1 CMD: those folders are that host's own (no shared
# file system): each is bound to /tmp/hydra-hosts/node1/<path>.
# BARE=1 hosts.sh on node1 CMD: there the host knows its own name as 127.0.1.1, as a plain Debian does.
set -euo pipefail
state=/tmp/hydra-hosts
subnet=10.77.0

# boot HOST: its process 1, which reaps; while it lives the host does, and killing it kills all there.
boot() {
    # not `ip netns exec`, which hides /sys/fs/cgroup
    setsid nsenter --net=/run/netns/$1 unshare --uts --pid --fork --mount --mount-proc --kill-child=KILL \
        bash -c "hostname $1; mount --bind /etc/netns/$1/hosts /etc/hosts
            mount --bind /etc/netns/$1/hostname /etc/hostname; while :; do sleep 100000 & wait; done" \
        </dev/null >/dev/null 2>&1 3>&- 4>&- 5>&- 9>&- & # no lock of the caller's is held on
    disown
    local unshare=$!
    until pgrep -P $unshare -x bash >$state/$1.pid; do sleep 0.1; done
    sleep 0.3
}

case ${1:?up, on, crash, unplug, plug or down} in
up)
    n=${2:-2}
    mkdir -p $state
    ip link add hydra0 type bridge
    ip addr add $subnet.254/24 dev hydra0
    ip link set hydra0 up
    for ((i = 0; i < n; i++)); do
        ip netns add node$i
        ip link add veth$i type veth peer name eth0 netns node$i
        ip link set veth$i master hydra0 up
        ip -n node$i addr add $subnet.$((10 + i))/24 dev eth0
        ip -n node$i link set eth0 up
        ip -n node$i link set lo up
        mkdir -p /etc/netns/node$i
        {
            echo "127.0.0.1 localhost"
            echo "$subnet.254 ctl $(hostname)"
            for ((j = 0; j < n; j++)); do echo "$subnet.$((10 + j)) node$j"; done
        } >/etc/netns/node$i/hosts
        sed "s/.* node$i\$/127.0.1.1 node$i/" /etc/netns/node$i/hosts >$state/node$i.bare
        echo node$i >/etc/netns/node$i/hostname
        boot node$i
    done
    ;;
on)
    host=$2; shift 2
    pid=$(cat $state/$host.pid)
    setup=':'
    for folder in ${PRIVATE:-}; do
        folder=$(realpath -m "$folder")
        own=$state/$host$folder
        mkdir -p "$own" "$folder"
        setup+="; mount --bind $own $folder"
    done
    [ -z "${BARE:-}" ] || setup+="; mount --bind $state/$host.bare /etc/hosts"
    exec nsenter -t "$pid" --net --uts --pid --mount -- \
        unshare --mount bash -c "cd '$PWD'; $setup"'; exec "$@"' bash "$@"
    ;;
boot) boot $2 ;;
crash)
    pid=$(cat $state/$2.pid)
    parent=$(awk '{print $4}' /proc/$pid/stat)
    kill -KILL "$pid"
    [ "$parent" = 1 ] || kill -KILL "$parent" 2>/dev/null || true
    sleep 0.5
    boot $2 # empty again
    ;;
unplug) ip -n $2 link set eth0 down ;;
plug) ip -n $2 link set eth0 up ;;
down)
    for file in $state/node*.pid; do
        [ -e "$file" ] || continue
        kill -KILL "$(cat $file)" 2>/dev/null || true # and with it all there
        rm -f "$file"
    done
    for path in /run/netns/node*; do
        [ -e "$path" ] || continue
        host=$(basename $path)
        for pid in $(ip netns pids $host); do kill -KILL $pid 2>/dev/null || true; done
        ip netns del $host
        rm -rf /etc/netns/$host
        ip link del veth${host#node} 2>/dev/null || true # a process that ends slowly keeps it
    done
    ip link del hydra0 2>/dev/null || true
    ;;
esac
