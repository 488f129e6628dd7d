#!/usr/bin/env bash
# What a container of the image runs.
#
#   train CONFIG [section.key=value ...]    this container's ranks of a run. From the environment:
#       NNODES       containers that train together (default: 1)
#       NODE_RANK    which of them this is, from 0
#       MASTER_ADDR  name or address of the container of node rank 0
#       MASTER_PORT  port that it listens on (default: 29500)
#       PROCESSES    ranks in this container (default: one for each GPU, or 1)
#   anything else                           that command, for instance: python -m pretrain prepare ...
#
# Everything is started by exec: the signals of `docker stop` and Ctrl-C reach the launcher, which has all ranks save and end.
set -euo pipefail

# A user that the image does not know (docker run --user) has no name, which torch's caches ask for, and no home.
if ! id -un >/dev/null 2>&1; then
    export USER="${USER:-user}" LOGNAME="${LOGNAME:-user}"
    HOME=$(mktemp -d)
    export HOME
fi

if [[ ${1:-} != train ]]; then
    exec "$@"
fi

count_gpus() {
    local count
    count=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ') || true
    echo "$((count > 0 ? count : 1))"
}

exec python -m launch node "${@:2}" \
    --processes "${PROCESSES:-$(count_gpus)}" \
    --nodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" \
    --master "${MASTER_ADDR:-localhost}:${MASTER_PORT:-29500}"
