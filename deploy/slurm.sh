#!/bin/sh
# A training on Slurm, two machines with four GPUs each:
#
#     sbatch deploy/slurm.sh CONFIG RUN [KEY.PATH=VALUE]...
#
# Some minutes before its time is over Slurm sends SIGTERM to the tasks of srun (so without `B:`, which would send it to
# this script; and srun would answer a SIGTERM by killing them). The training pauses, what was trained is saved, it ends
# with 143, and the job is queued again to go on. So it is where it was killed or aborted, as long as it was queued again
# fewer than RESTARTS times, for whatever reason (10; a training of weeks needs more), and, by Slurm itself (--requeue),
# where a machine failed. To pause it for good: scancel --signal=INT JOB; to end it: scancel JOB.
#SBATCH --job-name=gpu-bp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --gpu-bind=none
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
# All GPUs of a machine are seen by its tasks, each of which takes its own: NCCL connects them better then.

config=$1 run=$2
shift 2
mpi=${MPI:-pmix} # pmi2 for the MPICH of gpu-bp's extra mpi; `srun --mpi=list` says what there is
export OPENBLAS_NUM_THREADS="$SLURM_CPUS_PER_TASK" # a task's own cores
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # which srun does not take from sbatch

srun --mpi="$mpi" --kill-on-bad-exit=1 gpu-bp train "$config" "$@" --run "$run" --resume
status=$?

case $status in
    0 | 2 | 126 | 127 | 130) exit "$status" ;; # trained; to be mended by the user; paused for good
    143) ;;
    *) [ "${SLURM_RESTART_COUNT:-0}" -lt "${RESTARTS:-10}" ] || exit "$status" ;;
esac
echo "slurm.sh: exit status $status; job $SLURM_JOB_ID is queued again"
scontrol requeue Incomplete "$SLURM_JOB_ID" # Incomplete: not where it is being cancelled
exit "$status"
