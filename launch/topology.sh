# shellcheck shell=bash
# What Google Cloud calls a TPU slice, from the name that tools.plan uses: GENERATION:TOPOLOGY, for
# example v5e:16x16. Sourced.
#
# Sources:
#   chips, hosts, types: https://docs.cloud.google.com/tpu/docs/v4 /v5e /v5p /v6e
#     (v4 and v5p count TensorCores, two a chip; v5e and v6e count chips)
#   runtime versions: https://docs.cloud.google.com/tpu/docs/runtimes
#   GKE labels and machine types: https://github.com/AI-Hypercomputer/xpk/blob/main/src/xpk/core/system_characteristics.py
#     and https://docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
#
# shellcheck disable=SC2034  # read by tpu_vm.sh and gke.sh

# tpu_slice NAME: sets topology, chips, hosts, chips_per_host, accelerator (the file in env/),
# accelerator_type, runtime_version, gke_accelerator, machine_type
tpu_slice() {
  local generation=${1%%:*} sizes size
  topology=${1#*:}
  [[ $1 == *:* && $topology =~ ^[0-9]+x[0-9]+(x[0-9]+)?$ ]] ||
    die "'$1' is not a topology; write GENERATION:SIZES, for example v5e:16x16 or v5p:4x4x8"
  IFS=x read -ra sizes <<<"$topology"
  chips=1
  for size in "${sizes[@]}"; do chips=$((chips * size)); done
  case $generation in
    v4 | v5p) ((${#sizes[@]} == 3)) || die "$generation has three dimensions, not $topology" ;;
    v5e | v6e) ((${#sizes[@]} == 2)) || die "$generation has two dimensions, not $topology" ;;
    *) die "unknown TPU generation '$generation'; there are v4, v5e, v5p and v6e" ;;
  esac
  # A host has four chips. v5e and v6e also come as one host with one or eight.
  chips_per_host=4
  case $generation:$topology in
    v5e:1x1 | v6e:1x1) chips_per_host=1 ;;
    v5e:2x4 | v6e:2x4) chips_per_host=8 ;;
  esac
  ((chips % chips_per_host == 0)) || die "$1 is not a whole number of hosts"
  hosts=$((chips / chips_per_host))
  accelerator=tpu_$generation
  case $generation in
    v4)
      accelerator_type=v4-$((2 * chips)) runtime_version=tpu-ubuntu2204-base
      gke_accelerator=tpu-v4-podslice machine_type=ct4p-hightpu-${chips_per_host}t
      ;;
    v5e)
      accelerator_type=v5litepod-$chips runtime_version=v2-alpha-tpuv5-lite
      gke_accelerator=tpu-v5-lite-podslice machine_type=ct5lp-hightpu-${chips_per_host}t
      ;;
    v5p)
      accelerator_type=v5p-$((2 * chips)) runtime_version=v2-alpha-tpuv5
      gke_accelerator=tpu-v5p-slice machine_type=ct5p-hightpu-${chips_per_host}t
      ;;
    v6e)
      accelerator_type=v6e-$chips runtime_version=v2-alpha-tpuv6e
      gke_accelerator=tpu-v6e-slice machine_type=ct6e-standard-${chips_per_host}t
      ;;
  esac
}
