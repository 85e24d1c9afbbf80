#!/usr/bin/env bash
# bash yamls/launch/ssh.sh                    (from the repository root; the same path on every host)
# One launcher on each host over SSH. Exit status 75: preempted, or time_limit reached; run it again.
CONFIG=${CONFIG:-yamls/imagenet256_w2.yaml}
DATA=${DATA:-s3://bucket/imagenet256/train}
SAVE_FOLDER=${SAVE_FOLDER:-s3://bucket/runs/imagenet256_w2/checkpoints}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
MASTER_PORT=${MASTER_PORT:-29500}
OVERRIDES=${OVERRIDES:-"data.remote=$DATA save_folder=$SAVE_FOLDER log.progress_bar=false"}
HOSTS=${HOSTS:-"node0 node1"} # the first is the master

set -uo pipefail
read -ra NODES <<<"$HOSTS"
MASTER_ADDR=${MASTER_ADDR:-${NODES[0]}}
WORLD_SIZE=$((${#NODES[@]} * GPUS_PER_NODE))

PIDS=()
for i in "${!NODES[@]}"; do
    # -tt: the remote launcher gets a hang-up when this script is ended, and its ranks SIGTERM from it.
    ssh -tt "${NODES[$i]}" "cd '$PWD' && exec .venv/bin/composer -n $GPUS_PER_NODE --world_size $WORLD_SIZE \
        --node_rank $i --master_addr $MASTER_ADDR --master_port $MASTER_PORT recipe/train.py $CONFIG $OVERRIDES" &
    PIDS+=($!)
done
STATUS=0
for pid in "${PIDS[@]}"; do
    wait "$pid" || STATUS=$?
done
exit $STATUS
