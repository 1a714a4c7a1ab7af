#!/usr/bin/env bash
# Trains on the GPU nodes of a SLURM cluster: writes a batch script and submits it.
#
#   launch/slurm.sh [OPTIONS] -- --config FILE --workdir DIR [ARGUMENTS OF vlp_jax.train]
#
#   --nodes N                 (default 1)
#   --gpus-per-node G         (default 8)
#   --process-per node|gpu    (default node) one process for all GPUs of a node: one input pipeline
#                             and one copy of Python a node, as on TPU hosts. With gpu, each
#                             process drives one GPU, which is JAX's own default under SLURM
#   --cpus-per-node C         cores of a node to use (default: with --exclusive all)
#   --time LIMIT              of one run; the job is requeued until it is complete (default 24:00:00)
#   --partition P  --account A  --qos Q  --constraint C  --job-name NAME
#   --sbatch OPTION           any other option of sbatch, e.g. --sbatch=--mem=0; may be repeated
#   --accelerator NAME        flags of launch/env/NAME.sh (default gpu_hopper)
#   --container IMAGE         runs in a container, by the pyxis plugin (srun --container-image)
#   --container-mounts LIST   more of its mounts, SOURCE:TARGET,...; the repository, this folder,
#                             the state and the folder of WORKDIR are mounted by themselves
#   --python PATH             (default: .venv/bin/python of this repository; in a container, python)
#   --save-grace S            seconds to save before the time limit, and for the other processes
#                             once one has ended (default 300)
#   --max-restarts-without-progress K   (default 3) progress is a newer checkpoint
#   --state DIR               statuses and counts of starts, on a file system that all nodes see
#                             (default WORKDIR.slurm)
#   --log FILE                a line of JSON per attempt (default WORKDIR.restarts.jsonl)
#   --dry-run                 prints the batch script and submits nothing
#
# In the job, a failed attempt is started again on the same nodes; before the time limit training
# saves (status 75) and the job is requeued; status 2 ends it. VLP_TRAIN_COMMAND replaces
# "python -m vlp_jax.train". Stop a job so that it saves:
#   scontrol update JobId=N Requeue=0 && scancel --signal=TERM N
#
# Sources: https://slurm.schedmd.com/sbatch.html, https://slurm.schedmd.com/srun.html,
# https://github.com/NVIDIA/pyxis
set -uo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/restart.sh
source "$here/restart.sh"

nodes=1 gpus=8 per=node cpus="" limit=24:00:00 job_name=vlp_jax accelerator=gpu_hopper
container="" mounts="" python="" save_grace=300 retries=3 state="" log="" dry_run=""
directives=()
while (($#)); do
  case $1 in
    --help | -h) print_help "${BASH_SOURCE[0]}"; exit 0 ;;
    --dry-run) dry_run=yes; shift; continue ;;
    --) shift; break ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
  esac
  need "$1" $#
  case $1 in
    --nodes) need_number "$1" "$2"; nodes=$2 ;;
    --gpus-per-node) need_number "$1" "$2"; gpus=$2 ;;
    --process-per) per=$2 ;;
    --cpus-per-node) need_number "$1" "$2"; cpus=$2 ;;
    --time) limit=$2 ;;
    --job-name) job_name=$2 ;;
    --partition | --account | --qos | --constraint) directives+=("$1=$2") ;;
    --sbatch) directives+=("$2") ;;
    --accelerator) accelerator=$2 ;;
    --container) container=$2 ;;
    --container-mounts) mounts=,$2 ;;
    --python) python=$2 ;;
    --save-grace) need_number "$1" "$2"; save_grace=$2 ;;
    --max-restarts-without-progress) need_number "$1" "$2"; retries=$2 ;;
    --state) state=$2 ;;
    --log) log=$2 ;;
    *) die "unknown option '$1'; the arguments of vlp_jax.train come after --; see --help" ;;
  esac
  shift 2
done
(($#)) || die "no arguments for vlp_jax.train after --; see --help"
((nodes >= 1 && gpus >= 1)) || die "--nodes and --gpus-per-node must be at least 1"
[[ $per == node || $per == gpu ]] || die "--process-per must be node or gpu, not '$per'"
(use_accelerator "$accelerator") || exit 2
workdir=$(option_of workdir "$@") || workdir=""
if [[ $workdir == gs://* ]]; then
  [[ -n $state && -n $log ]] || die "with a workdir on gs://, give --state and --log"
else
  check_workdir "$workdir"
  workdir=$(realpath -m -- "$workdir")
fi
state=$(realpath -m -- "${state:-$workdir.slurm}")
# In a directive sbatch would take a space for the end of a value.
[[ $state =~ ^[A-Za-z0-9_./+=:,@-]+$ ]] || die "'$state' has a character that SLURM may not take in the \
name of a file; give a plain path with --state"
log=$(realpath -m -- "${log:-$workdir.restarts.jsonl}")

tasks=1
[[ $per == node ]] || tasks=$gpus
processes=$((nodes * tasks))
if [[ -z $python ]]; then
  python=$here/../.venv/bin/python
  [[ -z $container && -x $python ]] || python=python
fi
read -ra train <<<"${VLP_TRAIN_COMMAND:-$python -m vlp_jax.train}"
train+=("$@" --expect-processes "$processes")

directives=(
  "--job-name=$job_name" "--nodes=$nodes" "--ntasks-per-node=$tasks" "--gpus-per-node=$gpus"
  "--time=$limit" "--exclusive"
  # SIGTERM for the tasks (not the batch shell) this long before the limit: they save and end
  "--signal=TERM@$save_grace"
  # SLURM may start the job again after the failure of a node, and the batch script asks for it
  "--requeue" "--open-mode=append" "--output=$state/%x-%j.out"
  "${directives[@]}"
)
srun_options=()
if [[ -n $cpus ]]; then
  directives+=("--cpus-per-task=$((cpus / tasks))")
  srun_options+=("--cpus-per-task=$((cpus / tasks))") # srun has not taken it over since 22.05
fi
if [[ -n $container ]]; then
  root=$(realpath -m -- "$here/..")
  folders=("$root" "$PWD" "$state")
  [[ $workdir == gs://* ]] || folders+=("$(dirname -- "$workdir")")
  mapfile -t folders < <(printf '%s\n' "${folders[@]}" | sort -u)
  for folder in "${folders[@]}"; do mounts=$mounts,$folder:$folder; done
  srun_options+=("--container-image=$container" "--container-workdir=$PWD")
  srun_options+=("--container-mounts=${mounts#,}")
fi

as_array() { # NAME WORD...
  printf '%s=(' "$1"
  shift
  printf '\n  %q' "$@"
  printf '\n)\n'
}

batch_script() {
  printf '#!/usr/bin/env bash\n'
  printf '#SBATCH %s\n' "${directives[@]}"
  printf '\nset -uo pipefail\ncd %q || exit 2\n' "$PWD"
  printf '%s=%q\n' workdir "$workdir" restart_log "$log" state "$state" accelerator "$accelerator" \
    processes "$processes" per "$per" gpus "$gpus" save_grace "$save_grace" \
    max_restarts_without_progress "$retries"
  if ((${#srun_options[@]})); then as_array srun_options "${srun_options[@]}"; else
    printf 'srun_options=()\n'
  fi
  as_array train "${train[@]}"
  printf 'source %q\n' "$here/slurm_job.sh"
}

if [[ -n $dry_run ]]; then
  batch_script
  exit 0
fi
command -v sbatch >/dev/null || die "sbatch is not here: run this on a login node"
mkdir -p -- "$state" "$(dirname -- "$log")" || die "--state $state cannot be made"
batch_script >"$state/job.sh"
sbatch "$state/job.sh"
