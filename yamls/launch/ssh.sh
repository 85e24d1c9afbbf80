#!/usr/bin/env bash
# bash yamls/launch/ssh.sh                    (from the repository root; the same path on every host)
# One launcher on each host over SSH. Exit status 75: preempted, or time_limit reached; run it again.
CONFIG=${CONFIG:-yamls/imagenet256_w2.yaml}
DATA=${DATA:-s3://bucket/imagenet256/train}
SAVE_FOLDER=${SAVE_FOLDER:-s3://bucket/runs/imagenet256_w2/checkpoints}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
MASTER_PORT=${MASTER_PORT:-29500}
OVERRIDES=${OVERRIDES:-log.progress_bar=false}
HOSTS=${HOSTS:-"node0 node1"} # the first is the master

set -uo pipefail
read -ra NODES <<<"$HOSTS"
MASTER_ADDR=${MASTER_ADDR:-${NODES[0]}}
WORLD_SIZE=$((${#NODES[@]} * GPUS_PER_NODE))

# Ended by a signal, this script ends its ssh processes. That saves nothing: up to save_interval is lost. To save
# first, send SIGTERM to the launcher on one host, or set time_limit.
PIDS=()
trap 'kill "${PIDS[@]}" 2>/dev/null' TERM INT HUP
for i in "${!NODES[@]}"; do
    # -tt: when ssh ends, its terminal hangs up, and the remote launcher and ranks end with it.
    ssh -tt "${NODES[$i]}" "cd '$PWD' && exec .venv/bin/composer -n $GPUS_PER_NODE --world_size $WORLD_SIZE \
        --node_rank $i --master_addr $MASTER_ADDR --master_port $MASTER_PORT recipe/train.py $CONFIG \
        data.remote=$DATA save_folder=$SAVE_FOLDER $OVERRIDES" &
    PIDS+=($!)
done
STATUS=0
for pid in "${PIDS[@]}"; do
    wait "$pid" || STATUS=$?
done
exit $STATUS
