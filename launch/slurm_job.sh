# shellcheck shell=bash
# The body of the batch script that launch/slurm.sh writes; sourced by it, on the first node.
#
# The batch script sets: workdir, restart_log, state (a folder that all nodes see), processes,
# per (node or gpu), gpus, save_grace, max_restarts_without_progress, accelerator, srun_options and
# train (arrays).
#
# shellcheck disable=SC2154  # these are the batch script's

# shellcheck source=launch/restart.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/restart.sh"
use_accelerator "$accelerator"

# A requeued job runs this script again, with the same job number.
# shellcheck disable=SC2034  # read by restart_loop
starts_file=$state/starts launch_id=$SLURM_JOB_ID return_on_75=yes backoff=30 max_backoff=300

# With SLURM_* in the environment JAX gives each process the one GPU of its local number. A process
# per node takes all of them. jax/_src/clusters/slurm_cluster.py, jax/_src/distributed.py
if [[ $per == node ]]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 $((gpus - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi

# --signal=TERM@S signals the tasks alone. This shell gets SIGTERM from scancel or preemption, which
# also reach the tasks: nothing to pass on, but no restart and no requeue.
stop_signals=0
trap 'stop_signals=$((stop_signals + 1))' TERM INT

run_attempt() {
  local attempt=$1 folder started i
  folder=$state/job-$SLURM_JOB_ID.restart-${SLURM_RESTART_COUNT:-0}.attempt-$attempt
  mkdir -p -- "$folder"
  # Another port each time: a process that outlived the attempt before cannot join.
  export JAX_COORDINATOR_PORT=$((20000 + (SLURM_JOB_ID * 16 + attempt) % 12000))
  started=$(microseconds)
  srun "${srun_options[@]}" --kill-on-bad-exit=1 --wait="$save_grace" --label \
    "$(dirname -- "${BASH_SOURCE[0]}")/slurm_task.sh" "$folder" "${train[@]}" &
  local step=$!
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done # a trapped signal ends one wait
  statuses=()
  for ((i = 0; i < processes; i++)); do
    statuses[i]=137 # killed with its node, or by srun after another one failed
    [[ -r $folder/$i ]] && statuses[i]=$(<"$folder/$i")
  done
  # shellcheck disable=SC2034  # read by restart_loop; srun does not say when the first task ended
  ran=$(($(microseconds) - started)) stopping=0
}

restart_loop
status=$?
if ((status == STATUS_TOLD_TO_STOP && !stop_signals)) && [[ -z $gave_up ]]; then
  if scontrol requeue "$SLURM_JOB_ID"; then
    say "requeued"
    sleep 60 # until SLURM ends this shell
  else
    say "not requeued (Requeue=0?); the same launch/slurm.sh command goes on"
  fi
fi
exit "$status"
