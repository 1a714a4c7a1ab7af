#!/usr/bin/env bash
# The program of a pod of launch/manifests: prepares and becomes python -m vlp_jax.train.
#
#   launch/pod.sh OPTIONS -- ARGUMENTS OF vlp_jax.train
#     --accelerator NAME         flags of launch/env/NAME.sh
#     --processes N              how many pods form the job
#     --coordinator HOST:PORT    of process 0. Left out on TPU, where GKE tells the processes of one
#                                another and JAX finds out by itself
#     --starts FILE              a line per start, on gs:// or a shared disk
#     --max-restarts-without-progress K
#
# JobSet restarts all pods when one fails and knows nothing of checkpoints. So the first pod counts the
# starts from one and the same checkpoint and ends with status 2, which fails the JobSet, when
# there are too many. LAUNCH_ID is the JobSet's own id, SLICE the number of the pod's Job,
# JOB_COMPLETION_INDEX that of the pod in it (the Job controller sets it).
set -uo pipefail

# shellcheck source=launch/restart.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/restart.sh"
processes="" coordinator="" accelerator="" starts="" retries=3
while (($#)); do
  case $1 in
    --help | -h) print_help "${BASH_SOURCE[0]}"; exit 0 ;;
    --) shift; break ;;
  esac
  need "$1" $#
  case $1 in
    --accelerator) accelerator=$2 ;;
    --processes) need_number "$1" "$2"; processes=$2 ;;
    --coordinator) coordinator=$2 ;;
    --starts) starts=$2 ;;
    --max-restarts-without-progress) need_number "$1" "$2"; retries=$2 ;;
    *) die "unknown option '$1'; see --help" ;;
  esac
  shift 2
done
[[ -n $processes && -n $starts ]] || die "--processes and --starts are needed"
[[ -z $accelerator ]] || use_accelerator "$accelerator"
index=${JOB_COMPLETION_INDEX:?is set by the Job controller} slice=${SLICE:-0}
workdir=$(option_of workdir "$@") || workdir=""

if ((index == 0 && slice == 0)); then
  check_workdir "$workdir"
  newest=$(newest_checkpoint "$workdir") || exit 1
  before=$(starts_at "$starts" "${LAUNCH_ID:-job}" "${newest:-none}")
  ((before <= retries)) ||
    die "$before starts from checkpoint ${newest:-none} of $workdir led nowhere: not started again"
  add_start "$starts" "${LAUNCH_ID:-job} ${newest:-none} $(date -u +%Y-%m-%dT%H:%M:%SZ)" || exit 1
fi

read -ra train <<<"${VLP_TRAIN_COMMAND:-python -m vlp_jax.train}"
train+=("$@" --expect-processes "$processes")
[[ -z $coordinator ]] ||
  train+=(--coordinator "$coordinator" --processes "$processes" --process-id "$index")
exec "${train[@]}" # so that SIGTERM reaches Python
