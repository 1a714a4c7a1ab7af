#!/usr/bin/env bash
# The whole set of measurements on one GPU, inside 8 minutes.
#
#   OUT=DIR [WHEELS=DIR] tools/perf/gpu_suite.sh [--dry-run]
#
#   OUT       where suite.log, summary.txt and a JSON file for each measurement go (8 files at most)
#   WHEELS    wheels to install first, without an index and without what they depend on
#   PYTHON    the interpreter (default python3)
#   LIMIT     seconds for all of it (default 480)
#   CPU=1     the same path on a CPU with tiny sizes, to try the script
#   --dry-run prints the commands and runs nothing
#
# Needs no network, TensorFlow, TFDS or tokenizer file. It goes on after a failure, and exits with 1
# and the names of what failed. The batches fit 80 GB together with the peers' models.
set -uo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." || exit 2

dry_run=""
case ${1:-} in
  "") ;;
  --dry-run) dry_run=yes ;;
  *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "tools/perf/gpu_suite.sh" >&2; exit 2 ;;
esac
: "${OUT:?set OUT to a folder for the results}"
python=${PYTHON:-python3} limit=${LIMIT:-480} cpu=${CPU:-} wheels=${WHEELS:-}
began=$SECONDS
failed=()
rows=()

export XLA_PYTHON_CLIENT_PREALLOCATE=false # PyTorch runs in the same process
export HF_HUB_OFFLINE=1 PIP_BREAK_SYSTEM_PACKAGES=1
if [[ -n $cpu ]]; then
  export JAX_PLATFORMS=cpu
else
  # shellcheck source=launch/env/gpu_hopper.sh
  source launch/env/gpu_hopper.sh
fi

# step NAME SECONDS COMMAND...: runs it, with its output in suite.log, and notes how it went.
step() {
  local name=$1 most=$2 begin=$SECONDS status left
  shift 2
  if [[ -n $dry_run ]]; then
    printf 'timeout %s %s\n' "$most" "${*@Q}"
    return
  fi
  left=$((limit - (SECONDS - began)))
  [[ -z $cpu ]] || most=$((most * 4))
  if ((left < 5)); then
    status="no time left"
  else
    ((most < left)) || most=$left
    printf '\n=== %s: %s\n' "$name" "$*" | tee -a "$OUT/suite.log"
    timeout --kill-after=10 "$most" "$@" 2>&1 | tee -a "$OUT/suite.log"
    status=${PIPESTATUS[0]}
    ((status != 124 && status != 137)) || status="longer than $most s"
  fi
  [[ $status == 0 ]] || failed+=("$name ($status)")
  rows+=("$(printf '%-22s %6s s  %s' "$name" $((SECONDS - begin)) "${status/#0/ok}")")
}

# bench NAME SECONDS ARGUMENTS...: a measurement of a step, in NAME.json.
bench() {
  local name=$1 most=$2
  shift 2
  step "$name" "$most" "$python" -m tools.perf.step --json "$OUT/$name.json" "$@"
}

# tiny OVERRIDE...: overrides of config.objective, for CPU=1 alone.
tiny() {
  [[ -z $cpu ]] || printf -- '--config.objective.%s\n' "$@"
}

# size GPU_BATCH: the arguments that say how much is measured.
size() {
  if [[ -n $cpu ]]; then
    printf '%s\n' --batch 4 --rounds 1 --steps 2
  else
    printf '%s\n' --batch "$1" --rounds 3 --steps 10
  fi
}

install_wheels() {
  local found=("$wheels"/*.whl)
  [[ -e ${found[0]} ]] || { echo "no wheels in $wheels" >&2; return 1; }
  step wheels 60 "$python" -m pip install -q --no-index --no-deps "${found[@]}"
}

gpu_tests() {
  local files
  mapfile -t files < <(grep -rlE 'mark\.gpu\b' --include='test_*.py' tests | sort)
  if ((${#files[@]})); then
    step tests 90 "$python" -m pytest -q -m gpu -p no:cacheprovider "${files[@]}"
  else
    rows+=("$(printf '%-22s no test is marked gpu' tests)")
  fi
}

# The peers' optimizer is AdamW, so ours is.
measurements() {
  local trace sized small adamw=--config.optimizer.name=adamw
  local decoder=(decoder.{width=32,depth=1,mlp_dim=32,heads=2}) text=(text.variant=mu embed_dim=32)
  trace=$(mktemp -d)
  mapfile -t small < <(tiny image.variant=mu/16 "${text[@]}")
  mapfile -t sized < <(size 256)
  bench siglip_b16 170 --config configs/siglip_b16.py "${sized[@]}" "${small[@]}" $adamw \
    --peer plain --peer open_clip --profile "$trace"
  # cuDNN's attention beside XLA's above; a CPU has none.
  [[ -n $cpu ]] || bench siglip_b16_cudnn 60 --config configs/siglip_b16.py "${sized[@]}" $adamw \
    --config.objective.attention=cudnn
  mapfile -t small < <(tiny image.variant=mu/16 "${decoder[@]}")
  mapfile -t sized < <(size 384)
  bench mae_b16 110 --config configs/mae_b16.py "${sized[@]}" "${small[@]}" --peer transformers
  mapfile -t sized < <(size 256)
  bench mae_l16 110 --config configs/mae_l16.py "${sized[@]}" "${small[@]}" --peer transformers
  mapfile -t small < <(tiny image.variant=mu/14 "${text[@]}")
  mapfile -t sized < <(size 96)
  bench clip_l14 130 --config configs/clip_l14.py "${sized[@]}" "${small[@]}" \
    --config.objective.remat=dots --peer open_clip
  rm -rf "$trace"
}

summary() {
  printf '\n=== summary, %s s\n' $((SECONDS - began))
  printf '%s\n' "${rows[@]}"
  "$python" - "$OUT" <<'PYTHON'
import json, pathlib, sys

for file in sorted(pathlib.Path(sys.argv[1]).glob("*.json")):
    found = json.loads(file.read_text())
    for name, one in found.get("contenders", {}).items():
        ratio = found["ours_over"].get(name)
        part = "" if found["complete"] else "  NOT COMPLETE"
        told = f"  ours x {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else ""
        print(
            f"{file.stem:<12} {name:<13} batch {found['batch_size']:<5} {1e3 * one['step_seconds']:8.1f} ms"
            f" {one['examples_per_second']:9.1f}/s {one['model_flops_per_second'] / 1e12:7.1f} TFLOP/s"
            f"  MFU {one['mfu'] or float('nan'):.1%}{told}{part}"
        )
PYTHON
  if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[@]}"
  fi
}

[[ -n $dry_run ]] || { mkdir -p "$OUT" && : >"$OUT/suite.log"; } || exit 2
if [[ -n $wheels ]]; then
  install_wheels || failed+=("wheels (none in $wheels)")
fi
gpu_tests
measurements
[[ -z $dry_run ]] || exit 0
summary 2>&1 | tee "$OUT/summary.txt"
((${#failed[@]} == 0))
