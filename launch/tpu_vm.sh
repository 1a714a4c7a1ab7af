#!/usr/bin/env bash
# Trains on Cloud TPU VMs: one slice or several, on demand, reserved or spot.
#
#   launch/tpu_vm.sh COMMAND --name NAME --zone ZONE --topology v5e:16x16 [OPTIONS] [-- ARGUMENTS]
#
# Commands, in the order of use:
#   create     asks for the slices (a queued resource) and returns; wait waits until they are there
#   wait
#   install    copies this repository's HEAD to every worker and installs it there
#   start      starts launch/local.sh, detached, on every worker, with the ARGUMENTS of vlp_jax.train
#   status     state of the slices; of every worker: runs or not, last checkpointed attempt, last line
#   logs       follows the log of a worker (--worker I, default 0)
#   stop       SIGTERM to every worker's launcher: training saves and ends; waits for it
#   delete     gives the slices back; what costs money ends here
#   watch      create, wait, install, start, and again whenever the slices are taken away (spot) or
#              a worker restarted, until training is complete. Run it where it can stay, e.g. in tmux
#
# Options:
#   --topology G:SIZES        as in tools.plan: v4:4x4x4, v5e:16x16, v5p:4x4x8, v6e:16x16, ...
#   --slices N                joined over the data-centre network (default 1)
#   --spot | --reserved       (default on demand)
#   --project P               (default: that of gcloud)
#   --runtime-version V       (default by generation: see launch/topology.sh)
#   --create-option OPTION    any other option of `queued-resources create`, for example
#                             --create-option=--service-account=ADDRESS; may be repeated
#   --python VERSION          of the environment that install makes, with uv (default 3.11)
#   --save-grace S            seconds to save when told to stop (default 300)
#   --max-restarts-without-progress K   (default 3) on each worker, and for watch
#   --worker I                for logs
#   --poll S                  seconds between two looks of wait and watch (default 60)
#   --dry-run                 prints the commands and runs nothing
#
# On every worker, one process drives the host's chips; the processes find each other (JAX's own
# detection), and --expect-processes makes the start fail if the job has another number. Each
# worker's launcher restarts its process; they meet again at the coordinator.
#
# Sources: https://docs.cloud.google.com/tpu/docs/queued-resources,
# https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/create,
# https://docs.cloud.google.com/tpu/docs/spot-compute,
# https://cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/ssh
#
# shellcheck disable=SC2329  # functions are called by the name of the command
set -uo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/restart.sh
source "$here/restart.sh"
# shellcheck source=launch/topology.sh
source "$here/topology.sh"

name="" zone="" slice="" slices=1 tier="" project="" runtime="" python=3.11 save_grace=300
retries=3 worker=0 poll=60 dry_run="" create_options=()
[[ ${1-} != --help && ${1-} != -h ]] || { print_help "${BASH_SOURCE[0]}"; exit 0; }
(($#)) || die "name a command; see --help"
command=$1
shift
while (($#)); do
  case $1 in
    --help | -h) print_help "${BASH_SOURCE[0]}"; exit 0 ;;
    --dry-run) dry_run=yes; shift; continue ;;
    --spot | --reserved) tier=$1; shift; continue ;;
    --) shift; break ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
  esac
  need "$1" $#
  case $1 in
    --name) name=$2 ;;
    --zone) zone=$2 ;;
    --topology) slice=$2 ;;
    --slices) need_number "$1" "$2"; slices=$2 ;;
    --project) project=$2 ;;
    --runtime-version) runtime=$2 ;;
    --create-option) create_options+=("$2") ;;
    --python) python=$2 ;;
    --save-grace) need_number "$1" "$2"; save_grace=$2 ;;
    --max-restarts-without-progress) need_number "$1" "$2"; retries=$2 ;;
    --worker) need_number "$1" "$2"; worker=$2 ;;
    --poll) need_number "$1" "$2"; poll=$2 ;;
    *) die "unknown option '$1'; the arguments of vlp_jax.train come after --; see --help" ;;
  esac
  shift 2
done
[[ -n $name && -n $zone && -n $slice ]] || die "--name, --zone and --topology are needed"
((slices >= 1)) || die "--slices must be at least 1"
tpu_slice "$slice"
processes=$((hosts * slices))
runtime=${runtime:-$runtime_version}
where=("--zone=$zone")
[[ -z $project ]] || where+=("--project=$project")
nodes=("$name")
if ((slices > 1)); then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done # what --node-prefix makes
fi
train=("$@")

run() {
  if [[ -n $dry_run ]]; then print_command "$@"; else "$@"; fi
}

# on_workers WHICH COMMAND: in the home folder of the workers of every slice
on_workers() {
  local node failed=0
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker="$1" --command="$2" || failed=1
  done
  return "$failed"
}

create() {
  local options=("--accelerator-type=$accelerator_type")
  # Three dimensions: several shapes have the same number of chips.
  [[ $topology != *x*x* ]] || options=("--type=${accelerator_type%%-*}" "--topology=$topology")
  if ((slices == 1)); then options+=("--node-id=$name"); else
    options+=("--node-count=$slices" "--node-prefix=$name")
  fi
  [[ -z $tier ]] || options+=("$tier")
  run gcloud compute tpus queued-resources create "$name" "${where[@]}" "${options[@]}" \
    --runtime-version="$runtime" "${create_options[@]}"
}

# https://docs.cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.queuedResources#State
state_of() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)'
}

wait_until_active() {
  local state
  if [[ -n $dry_run ]]; then
    print_command gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
      "--format=value(state.state)"
    return
  fi
  while true; do
    state=$(state_of) || return 1
    case $state in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED) say "the queued resource is $state"; return 1 ;;
    esac
    say "the queued resource is $state"
    sleep "$poll"
  done
}

install() {
  local archive node
  archive=${TMPDIR:-/tmp}/$name-vlp_jax.tar.gz
  run git -C "$here/.." archive --format=tar.gz --output="$archive" HEAD || return 1
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm scp "$archive" "$node:vlp_jax.tar.gz" "${where[@]}" \
      --worker=all || return 1
  done
  # The runtimes have Ubuntu 22.04 with Python 3.10; uv brings a newer one.
  on_workers all "set -e; mkdir -p vlp_jax; tar -xzf vlp_jax.tar.gz -C vlp_jax; cd vlp_jax; \
python3 -m pip install --quiet --user uv; \
python3 -m uv venv --quiet --allow-existing --python $python .venv; \
python3 -m uv pip install --quiet --python .venv/bin/python -r requirements.txt \
-r requirements-tpu.txt -e ."
}

# worker_command WORD...: launch/tpu_worker.sh on a worker
worker_command() { print_command vlp_jax/launch/tpu_worker.sh "$@"; }

start() {
  check_training
  on_workers all "$(worker_command start --accelerator "$accelerator" --save-grace "$save_grace" \
    --max-restarts-without-progress "$retries" -- "${train[@]}" --expect-processes "$processes")"
}

check_training() {
  ((${#train[@]})) || die "no arguments for vlp_jax.train after --; see --help"
  workdir=$(option_of workdir "${train[@]}") || workdir=""
  [[ $workdir == gs://?* ]] ||
    die "--workdir must be on gs://: the disks of TPU VMs are not shared and are lost with them"
}

status() {
  run gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    "--format=value(state.state)"
  on_workers all "$(worker_command status)"
}

logs() { on_workers "$worker" "tail -n 100 -f vlp_jax.log"; }

stop() { on_workers all "$(worker_command stop $((save_grace + 60)))"; }

delete() {
  run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

bring_up() { create && wait_until_active && install && start; }

# outcome: of worker 0 of the first slice (see launch/tpu_worker.sh); empty if it does not answer
outcome() {
  gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${where[@]}" --worker=0 \
    --command="$(worker_command outcome)"
}

watch() {
  local idle=0 before after state result
  check_training
  if [[ -n $dry_run ]]; then
    bring_up
    echo "# every $poll s; when it is FAILED, SUSPENDING or SUSPENDED: delete, and all of the above"
    print_command gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
      "--format=value(state.state)"
    return
  fi
  check_workdir "$workdir"
  before=$(newest_checkpoint "$workdir") || return 1
  state=$(state_of 2>/dev/null) || state=ABSENT
  while true; do
    result=""
    case $state in
      ABSENT) bring_up || say "the slices did not come up" ;;
      FAILED | SUSPENDING | SUSPENDED)
        after=$(newest_checkpoint "$workdir") || after=$before
        if is_progress "$before" "$after"; then idle=0; else idle=$((idle + 1)); fi
        if ((idle > retries)); then
          say "$idle times in a row the slices were lost before a checkpoint newer than" \
            "${before:-none}: not created again (but still to be deleted)"
          return 1
        fi
        say "the queued resource is $state; creating it again ($idle of $retries without progress)"
        before=$after
        { delete && bring_up; } || say "the slices did not come up"
        ;;
      ACTIVE)
        result=$(outcome) || result=""
        case $result in
          running | "") ;;
          gone) install && start ;;
          *)
            say "training ended with status $result; the slices still cost money: delete them with" \
              "launch/tpu_vm.sh delete --name $name --zone $zone --topology $slice"
            return "$result"
            ;;
        esac
        ;;
    esac
    sleep "$poll"
    state=$(state_of) || say "the state of the queued resource is unknown"
  done
}

case $command in
  create | install | start | status | logs | stop | delete | watch) "$command" ;;
  wait) wait_until_active ;;
  *) die "unknown command '$command'; see --help" ;;
esac; exit "$?" # on one line: bash reads a script as it goes, and watch runs for days
