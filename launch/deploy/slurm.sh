#!/bin/bash
# Three servers under SLURM, a task each: the n-th task is the n-th server of the cluster file (which needs no hosts: they meet
# at the first node of the job). sbatch slurm.sh cluster.toml tokens [more flags of serve]
# Each answers its own users at port 8000 of its node. `scancel` and the end of the job's time drain it first.
#SBATCH --job-name=dancemoe
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@60
set -euo pipefail
cluster=$1 tokens=$2
shift 2
exec srun --kill-on-bad-exit=1 python -m launch serve --cluster "$cluster" --http 0.0.0.0:8000 --tokens "$tokens" \
    --timeout 600 --hold 300 "$@"
