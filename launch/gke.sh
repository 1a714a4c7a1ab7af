#!/usr/bin/env bash
# Trains on a GKE cluster as a JobSet: on TPU slices, one or several, or on GPU nodes.
#
#   launch/gke.sh COMMAND --name NAME [OPTIONS] [-- ARGUMENTS OF vlp_jax.train]
#
# Commands:
#   nodes      makes the node pools for --topology and --slices (needs --cluster and --location)
#   start      fills in launch/manifests/jobset_tpu.yaml or jobset_gpu.yaml and applies it
#   status     the JobSet, its restarts and its pods
#   logs       follows the log of the first pod
#   stop       suspends the JobSet: the pods get SIGTERM, save and end; nothing is lost
#   resume     ends the suspension: training goes on from the newest checkpoint
#   delete     deletes the JobSet (the pods save as with stop); --node-pools deletes those of `nodes`
#
# Options:
#   --topology G:SIZES        TPU, as in tools.plan: v5e:16x16, v5p:4x4x8, ...
#   --slices N                (default 1) joined over the data-centre network
#   --gpu TYPE                GPU instead: the node label cloud.google.com/gke-accelerator, such as
#                             nvidia-h100-80gb, nvidia-h200-141gb, nvidia-a100-80gb
#   --nodes N                 GPU nodes (default 1)
#   --gpus-per-node G         (default 8)
#   --accelerator NAME        flags of launch/env/NAME.sh (default: by topology, else gpu_hopper, or
#                             gpu_ampere for nvidia-*a100*)
#   --image IMAGE             of launch/Dockerfile, in a registry of yours
#   --service-account S       Kubernetes service account that may use the bucket (default: default)
#   --namespace NS            (default: default)
#   --compilation-cache DIR   gs://... : compiled programs, so that a restart is quick
#   --spot
#   --save-grace S            seconds to save when told to stop (default 300)
#   --max-restarts N          after anything but status 2, 75 and lost nodes (default 50)
#   --max-restarts-without-progress K   (default 3) any restarts: the first pod then fails the JobSet
#   --cluster C --location L  for nodes and delete --node-pools
#   --dry-run                 prints the manifest or the commands and changes nothing
#
# Status 2 fails the JobSet at once; 75 (told to stop and saved) and nodes that are taken away restart
# it without counting; everything else restarts it, at most --max-restarts times. JobSet 0.10 or newer
# is needed (rules on messages of failures): https://jobset.sigs.k8s.io/docs/installation/
#
# Sources: those named in launch/manifests, and
# https://docs.cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice (node pools)
set -uo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/restart.sh
source "$here/restart.sh"
# shellcheck source=launch/topology.sh
source "$here/topology.sh"

name="" slice="" slices=1 gpu="" nodes=1 gpus=8 accelerator="" image="" account=default
namespace=default cache="" spot="" save_grace=300 max_restarts=50 retries=3 cluster="" location=""
dry_run="" node_pools="" port=8476
[[ ${1-} != --help && ${1-} != -h ]] || { print_help "${BASH_SOURCE[0]}"; exit 0; }
(($#)) || die "name a command; see --help"
command=$1
shift
while (($#)); do
  case $1 in
    --help | -h) print_help "${BASH_SOURCE[0]}"; exit 0 ;;
    --dry-run) dry_run=yes; shift; continue ;;
    --spot) spot=yes; shift; continue ;;
    --node-pools) node_pools=yes; shift; continue ;;
    --) shift; break ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
  esac
  need "$1" $#
  case $1 in
    --name) name=$2 ;;
    --topology) slice=$2 ;;
    --slices) need_number "$1" "$2"; slices=$2 ;;
    --gpu) gpu=$2 ;;
    --nodes) need_number "$1" "$2"; nodes=$2 ;;
    --gpus-per-node) need_number "$1" "$2"; gpus=$2 ;;
    --accelerator) accelerator=$2 ;;
    --image) image=$2 ;;
    --service-account) account=$2 ;;
    --namespace) namespace=$2 ;;
    --compilation-cache) cache=$2 ;;
    --save-grace) need_number "$1" "$2"; save_grace=$2 ;;
    --max-restarts) need_number "$1" "$2"; max_restarts=$2 ;;
    --max-restarts-without-progress) need_number "$1" "$2"; retries=$2 ;;
    --cluster) cluster=$2 ;;
    --location) location=$2 ;;
    *) die "unknown option '$1'; the arguments of vlp_jax.train come after --; see --help" ;;
  esac
  shift 2
done
# Names of pods are NAME-slice-I-J-xxxxx, and at most 63 characters.
[[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
  die "--name must be at most 40 of a-z, 0-9 and -, beginning with a letter, not '$name'"
[[ -z $cache || $cache =~ ^gs://[A-Za-z0-9._/-]+$ ]] || die "--compilation-cache must be on gs://"
((slices >= 1 && nodes >= 1 && gpus >= 1)) || die "--slices, --nodes and --gpus-per-node start at 1"
train=("$@")

run() {
  if [[ -n $dry_run ]]; then print_command "$@"; else "$@"; fi
}

kubectl_here=(kubectl --namespace "$namespace")

# choose: what the manifest needs to know about the hardware
choose() {
  local given=$accelerator
  if [[ -n $gpu ]]; then
    [[ -z $slice ]] || die "--topology and --gpu exclude each other"
    kind=gpu hosts=$nodes slices=1 chips_per_host=$gpus gke_accelerator=$gpu topology=""
    accelerator=gpu_hopper
    [[ $gpu != nvidia-*a100* ]] || accelerator=gpu_ampere
  else
    [[ -n $slice ]] || die "--topology (TPU) or --gpu is needed"
    kind=tpu
    tpu_slice "$slice"
    ((slices == 1 || hosts > 1)) || die "several slices need slices of several hosts, not $slice"
  fi
  accelerator=${given:-$accelerator}
  (use_accelerator "$accelerator") || exit 2
  processes=$((hosts * slices))
}

json_list() { # WORD...: a JSON list, which is YAML too
  local word list=""
  for word in "$@"; do
    [[ $word != *[[:cntrl:]]* ]] || die "an argument holds a control character: ${word@Q}"
    word=${word//\\/\\\\}
    list+=", \"${word//\"/\\\"}\""
  done
  printf '[%s]' "${list:2}"
}

manifest() {
  local workdir arguments list text key line
  ((${#train[@]})) || die "no arguments for vlp_jax.train after --; see --help"
  [[ -n $image ]] || die "--image is needed: build launch/Dockerfile and push it to a registry"
  workdir=$(option_of workdir "${train[@]}") || workdir=""
  [[ $workdir == gs://?* ]] || die "--workdir must be on gs://: pods share no disk and lose theirs"
  arguments=(--accelerator "$accelerator" --processes "$processes")
  arguments+=(--starts "${workdir%/}.starts" --max-restarts-without-progress "$retries")
  # The name that JobSet gives to the first pod: JOBSET-REPLICATEDJOB-JOB-POD.JOBSET
  [[ $kind != gpu ]] || arguments+=(--coordinator "$name-worker-0-0.$name:$port")
  list=$(json_list "${arguments[@]}" -- "${train[@]}") || exit 2
  declare -A values=(
    [NAME]=$name [NAMESPACE]=$namespace [SLICES]=$slices [HOSTS]=$hosts [IMAGE]=$image [PORT]=$port
    [MAX_RESTARTS]=$max_restarts [SAVE_GRACE]=$save_grace [SERVICE_ACCOUNT]=$account
    [GKE_ACCELERATOR]=$gke_accelerator [TOPOLOGY]=$topology [CHIPS_PER_HOST]=$chips_per_host
    [SPOT_SELECTOR]="" [SPOT_TOLERATION]="" [CACHE]=""
    [ARGS]=$list
  )
  if [[ -n $spot ]]; then
    values[SPOT_SELECTOR]='cloud.google.com/gke-spot: "true"'
    values[SPOT_TOLERATION]='- {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}'
  fi
  [[ -z $cache ]] || values[CACHE]="- {name: JAX_COMPILATION_CACHE_DIR, value: \"$cache\"}"
  while IFS= read -r line; do
    text=$line
    # One replacement a line: what is filled in is never looked at again.
    if [[ $line =~ @([A-Z_]+)@ ]]; then
      key=${BASH_REMATCH[1]}
      text=${line%%@"$key"@*}${values[$key]}${line#*@"$key"@}
      [[ -n ${values[$key]} || -n ${line//[[:space:]]@"$key"@/} ]] || continue
      [[ -n ${text//[[:space:]]/} ]] || continue # an option that was not given leaves no line
    fi
    printf '%s\n' "$text"
  done <"$here/manifests/jobset_$kind.yaml"
}

start() {
  local text
  choose
  text=$(manifest) || exit 2
  if [[ -n $dry_run ]]; then printf '%s\n' "$text"; else
    "${kubectl_here[@]}" apply --filename - <<<"$text"
  fi
}

pool_names() {
  local i
  for ((i = 0; i < slices; i++)); do printf '%s-%d\n' "$name" "$i"; done
}

nodes() {
  local pool options
  [[ -n $cluster && -n $location ]] || die "nodes needs --cluster and --location"
  [[ -z $gpu ]] || die "nodes makes TPU node pools; GPU pools depend on the cluster's networks"
  choose
  options=("--cluster=$cluster" "--location=$location" "--machine-type=$machine_type")
  # A slice of one host has no --tpu-topology to share between hosts.
  ((hosts == 1)) || options+=("--tpu-topology=$topology")
  options+=("--num-nodes=$hosts" "--scopes=cloud-platform")
  [[ -z $spot ]] || options+=(--spot)
  for pool in $(pool_names); do
    run gcloud container node-pools create "$pool" "${options[@]}" || return 1
  done
}

status() {
  run "${kubectl_here[@]}" get jobset "$name" --output wide
  run "${kubectl_here[@]}" get pods --selector "jobset.sigs.k8s.io/jobset-name=$name" --output wide
  run "${kubectl_here[@]}" get events --field-selector "involvedObject.name=$name"
}

logs() {
  run "${kubectl_here[@]}" logs --follow --tail 100 --selector \
    "jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
}

suspend() { run "${kubectl_here[@]}" patch jobset "$name" --type merge --patch "{\"spec\":{\"suspend\":$1}}"; }

delete() {
  local pool
  run "${kubectl_here[@]}" delete jobset "$name" --ignore-not-found || return 1
  [[ -n $node_pools ]] || return 0
  [[ -n $cluster && -n $location ]] || die "--node-pools needs --cluster and --location"
  for pool in $(pool_names); do
    run gcloud container node-pools delete "$pool" "--cluster=$cluster" "--location=$location" --quiet
  done
}

case $command in
  nodes | start | status | logs | delete) "$command" ;;
  stop) suspend true ;;
  resume) suspend false ;;
  *) die "unknown command '$command'; see --help" ;;
esac
