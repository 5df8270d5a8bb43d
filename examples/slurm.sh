#!/bin/bash
# Trains over the nodes of a Slurm allocation; every task is a rank:
#   sbatch examples/slurm.sh CONFIG.yaml --mesh.tp 4 --mesh.dp 2
# The mesh has as many ranks as there are tasks; tp is best no larger than the tasks of a node. run_dir must be on a
# file system that all nodes share. A job that is requeued, or submitted again, goes on from its last checkpoint.
#SBATCH --job-name=colrow
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# With GPUs, one for each task, all of a node's visible to each of its tasks:
##SBATCH --gpus-per-node=4
set -euo pipefail
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
# gloo and NCCL find the network between nodes by themselves; if they take another one, name it:
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0
# ranks find each other by srun's variables: the first node of the step, and a port made of the job's number
exec srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" colrow train "$@" --resume true
