#!/usr/bin/env bash
# A SLURM job: Ray on the job's nodes, and a command on the first of them that finds it by RAY_ADDRESS.
#
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=96 --time=24:00:00 cluster/slurm.sh \
#       python -m lgd train --config configs/bci.yaml --run.dir /shared/runs/bci --data.shards /shared/shards/bci \
#       --train.workers 16
#
# Submit it where `python` and `ray` are those of the environment that has lgd, on all nodes. Two minutes before its
# time is over SLURM warns the script: the command gets SIGTERM, training saves a checkpoint, and the job is queued
# again. Keep run.dir on a file system that all nodes share: the same command goes on from its checkpoints, also after
# a lost node. Ray's logs stay in /tmp/lgd-ray-JOB on each node.
#SBATCH --job-name=lgd
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: sbatch [options of sbatch] cluster/slurm.sh COMMAND..." >&2
    exit 2
fi

for program in python ray; do
    if ! command -v "$program" >/dev/null; then
        echo "slurm.sh: \`$program\` is not in PATH: activate the environment that has lgd before \`sbatch\`" >&2
        exit 1
    fi
done

stopping=
training=
stop() {
    stopping=yes
    trap '' TERM USR1
    if [ -n "$training" ]; then kill -TERM "$training" 2>/dev/null || true; fi
}
trap stop TERM USR1
# Only what this script started; SLURM ends the steps on the other nodes with it.
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT

# Handed on by the environment: command lines are seen by every user of a node.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# Metrics are served without the token. The two servers that have no switch fail to start at this port.
export RAY_enable_metrics_collection=0 AUTOSCALER_METRIC_PORT=-1 DASHBOARD_METRIC_PORT=-1
# Sites that submit with --export=NONE would start the steps without it.
export SLURM_EXPORT_ENV=ALL
# Since SLURM 22.05 a step has one CPU unless told.
cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
export SRUN_CPUS_PER_TASK=$cpus

# Three ports of its own, so that two jobs may share a node; all lie below those that Linux gives to clients.
port=$((20000 + SLURM_JOB_ID % 4000 * 3))
ip=$(python -c 'import ray; print(ray.util.get_node_ip_address())')
# The agent's port 0 is any free one. A socket's path must be short, so not TMPDIR.
node=(--block --num-cpus="$cpus" --dashboard-agent-listen-port=0 --temp-dir="/tmp/lgd-ray-$SLURM_JOB_ID")

# The script itself runs on the first node.
srun --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" ray start --head --node-ip-address="$ip" --port="$port" \
    --dashboard-host=127.0.0.1 --dashboard-port=$((port + 1)) --ray-client-server-port=$((port + 2)) "${node[@]}" &
head=$!
until (exec 3<>"/dev/tcp/$ip/$port") 2>/dev/null; do
    if ! kill -0 "$head" 2>/dev/null; then
        echo "slurm.sh: Ray's head ended before it listened on $ip:$port; its output is above" >&2
        exit 1
    fi
    sleep 1
done
others=$((SLURM_JOB_NUM_NODES - 1))
if [ "$others" -gt 0 ]; then
    srun --nodes="$others" --ntasks="$others" --exclude="$SLURMD_NODENAME" ray start --address="$ip:$port" \
        "${node[@]}" &
fi

export RAY_ADDRESS=$ip:$port
python - "$SLURM_JOB_NUM_NODES" <<'PYTHON'
import sys, time, ray

wanted, end = int(sys.argv[1]), time.monotonic() + 300
ray.init(logging_level="ERROR", log_to_driver=False)
while (here := sum(node["Alive"] for node in ray.nodes())) < wanted:
    if time.monotonic() > end:
        sys.exit(f"slurm.sh: {here} of {wanted} nodes joined Ray in 5 minutes; the output of the others is above")
    time.sleep(1)
PYTHON

status=1
if [ -z "$stopping" ]; then
    "$@" &
    training=$!
    wait "$training" && status=0 || status=$?
    # The signal ended that `wait`; the command is still saving.
    if [ -n "$stopping" ]; then wait "$training" && status=0 || status=$?; fi
fi
if [ -n "$stopping" ] && [ "$status" -ne 0 ]; then
    echo "slurm.sh: stopped before the end; queued again, to go on from the last checkpoint" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
