#!/usr/bin/env bash
# Trains on this machine with one or several processes, and starts them again when they fail.
#
#   launch/local.sh [OPTIONS] -- --config FILE --workdir DIR [ARGUMENTS OF vlp_jax.train]
#
#   --processes N             how many processes form the job (default 1)
#   --devices-per-process D   CPU devices of each (sets JAX_NUM_CPU_DEVICES)
#   --accelerator NAME        flags of launch/env/NAME.sh: cpu, gpu_hopper, gpu_ampere, tpu_v5e, ...
#                             With gpu_* and several processes, process I uses GPU I
#   --grace S                 seconds from SIGTERM to SIGKILL for the others once a process has
#                             failed (default 30); one that is stopped or hangs only knows SIGKILL
#   --save-grace S            the same when they were told to stop and save (default 300)
#   --max-restarts-without-progress K   (default 3) progress is a newer checkpoint
#   --backoff S               seconds before a restart (none after 75 with progress), doubled with every
#                             further one without progress (default 10, at most 300)
#   --log FILE                a line of JSON per attempt (default WORKDIR.restarts.jsonl)
#   --logs DIR                also keeps the output of each process and attempt in DIR
#   --dry-run                 prints the commands and runs nothing
#
# Exit status: 0 complete; 2 a mistake in config, data or workdir, or in these options (never
# restarted); 75 told to stop (SIGTERM, Ctrl-C); else that of the last attempt. A second SIGTERM or
# Ctrl-C kills the processes at once. VLP_TRAIN_COMMAND replaces "python -m vlp_jax.train".
set -uo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/restart.sh
source "$here/restart.sh"
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) || die "bash 5.1 or newer is needed"
for tool in setsid flock; do
  command -v "$tool" >/dev/null || die "the command $tool (util-linux) is needed"
done

processes=1 devices="" accelerator="" grace=30 save_grace=300 restart_log="" logs="" dry_run=""
max_restarts_without_progress=3 backoff=10 max_backoff=300
while (($#)); do
  case $1 in
    --help | -h) print_help "${BASH_SOURCE[0]}"; exit 0 ;;
    --dry-run) dry_run=yes; shift; continue ;;
    --) shift; break ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
  esac
  need "$1" $#
  case $1 in
    --processes) need_number "$1" "$2"; processes=$2 ;;
    --devices-per-process) need_number "$1" "$2"; devices=$2 ;;
    --accelerator) accelerator=$2 ;;
    --grace) need_number "$1" "$2"; grace=$2 ;;
    --save-grace) need_number "$1" "$2"; save_grace=$2 ;;
    --max-restarts-without-progress) need_number "$1" "$2"; max_restarts_without_progress=$2 ;;
    --backoff) need_number "$1" "$2"; backoff=$2 ;;
    --log) restart_log=$2 ;;
    --logs) logs=$2 ;;
    *) die "unknown option '$1'; the arguments of vlp_jax.train come after --; see --help" ;;
  esac
  shift 2
done
(($#)) || die "no arguments for vlp_jax.train after --; see --help"
((processes >= 1)) || die "--processes must be at least 1"
workdir=$(option_of workdir "$@") || workdir=""
check_workdir "$workdir"
if [[ -z $restart_log ]]; then
  [[ $workdir != gs://* ]] || die "with a workdir on gs://, name a local file with --log"
  restart_log=${workdir%/}.restarts.jsonl
fi
[[ -z $accelerator ]] || use_accelerator "$accelerator"
[[ -z $devices ]] || export JAX_NUM_CPU_DEVICES=$devices

python=$here/../.venv/bin/python
[[ -x $python ]] || python=python
read -ra train <<<"${VLP_TRAIN_COMMAND:-$python -m vlp_jax.train}"
train+=("$@")
option_of expect-processes "$@" >/dev/null || train+=(--expect-processes "$processes")

# free_port: one below the range from which the kernel takes ports itself
free_port() {
  local port
  while true; do
    port=$((20000 + RANDOM % 12000))
    (: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  printf '%s\n' "$port"
}

# command_of INDEX PORT: sets `command`
command_of() {
  command=(env)
  [[ $accelerator == gpu_* ]] && ((processes > 1)) && command+=("JAX_LOCAL_DEVICE_IDS=$1")
  ((${#command[@]} > 1)) || command=()
  command+=("${train[@]}")
  ((processes == 1)) ||
    command+=(--coordinator "127.0.0.1:$2" --processes "$processes" --process-id "$1")
}

if [[ -n $dry_run ]]; then
  port=$(free_port)
  for variable in JAX_PLATFORMS JAX_NUM_CPU_DEVICES XLA_FLAGS LIBTPU_INIT_ARGS \
    XLA_PYTHON_CLIENT_MEM_FRACTION NCCL_DEBUG GLIBC_TUNABLES; do
    [[ -z ${!variable-} ]] || print_command export "$variable=${!variable}"
  done
  for ((i = 0; i < processes; i++)); do
    command_of "$i" "$port"
    print_command "${command[@]}"
  done
  exit 0
fi

# Training locks a local workdir while it runs. This one also holds between two attempts and for gs://;
# the processes inherit it, so that it outlasts a launcher that was killed.
mkdir -p -- "$(dirname -- "$restart_log")" || exit 2
exec 8>>"$restart_log.lock"
flock --nonblock 8 ||
  die "a launcher, or what one left running, has $restart_log.lock: another job in this workdir"

# Events arrive in one queue: "started INDEX PID", "end INDEX STATUS", "signal NAME 0".
queue=$(mktemp -u)
mkfifo -m 600 "$queue" || die "could not make a named pipe in ${TMPDIR:-/tmp}"
exec 9<>"$queue"
rm -f "$queue"

# output INDEX ATTEMPT: prefixes lines. The signals of a terminal go to all programs in it, and this
# one has to outlive them.
output() {
  trap '' INT TERM HUP
  if [[ -n $logs ]]; then
    tee "$logs/attempt-$2.process-$1.log" | sed -u "s/^/[$1] /"
  else
    exec sed -u "s/^/[$1] /"
  fi
}

# start_process INDEX ATTEMPT COMMAND...: each in a session of its own, so that Ctrl-C reaches the
# launcher alone, which then tells all of them once
start_process() {
  local index=$1 attempt=$2
  shift 2
  (
    trap : INT TERM HUP
    # shellcheck disable=SC2016  # expanded by the inner shell
    setsid --wait bash -c 'echo "started $0 $$" >&9; exec "$@" 9>&-' "$index" "$@" \
      </dev/null > >(output "$index" "$attempt" 9>&-) 2>&1
    echo "end $index $?" >&9
  ) 2>/dev/null &
}

signal_all() { # NAME
  local i
  for i in "${!pids[@]}"; do
    # The whole session dies with SIGKILL; SIGTERM is for the training process, which saves.
    if [[ $1 == KILL ]]; then kill -KILL -- "-${pids[i]}" 2>/dev/null; else
      kill -s "$1" "${pids[i]}" 2>/dev/null
    fi
  done
  sent=$1
}

# in_seconds S: sets the time at which the next, harsher step is due, unless it is due before
in_seconds() {
  local due=$(($(microseconds) + $1 * 1000000))
  [[ -n $deadline ]] && ((deadline < due)) || deadline=$due
}

# ended INDEX STATUS
ended() {
  statuses[$1]=$2
  unset "pids[$1]"
  running=$((running - 1))
  ((first_end)) || first_end=$(microseconds)
  ((running)) || return 0
  case $2 in
    0 | "$STATUS_TOLD_TO_STOP") in_seconds "$save_grace" ;; # the others save the same step
    *)
      say "process $1 ended with status $2"
      # Those that notice by themselves that a peer is gone get the time to say what they saw.
      [[ -n $sent ]] || in_seconds 1
      ;;
  esac
}

# told_to_stop: this launcher got a signal
told_to_stop() {
  if ((stop_signals > 1)); then
    say "told to stop again: killing"
    signal_all KILL
  else
    say "told to stop: the processes save and end, within $save_grace s"
    # Once only: a second SIGTERM would end a process that is saving.
    [[ -n $sent ]] || signal_all TERM
    in_seconds "$save_grace"
  fi
}

# overdue: the time that was given to the processes is over
overdue() {
  deadline=""
  if [[ -z $sent ]]; then
    say "stopping the $running of $processes processes that still run"
    signal_all TERM
    in_seconds "$grace"
  else
    say "killing $running of $processes processes that do not react"
    signal_all KILL
    in_seconds 30
  fi
}

run_attempt() {
  local attempt=$1 port started i event index value line rest status
  port=$(free_port)
  statuses=() pids=() running=$processes sent="" deadline="" first_end=0
  [[ -z $logs ]] || mkdir -p -- "$logs"
  started=$(microseconds)
  for ((i = 0; i < processes; i++)); do
    command_of "$i" "$port"
    start_process "$i" "$attempt" "${command[@]}"
  done
  line=""
  while ((running)); do
    # Never long: a signal that comes just before the program begins to wait is seen only afterwards.
    local left=1000000
    if [[ -n $deadline ]]; then
      left=$((deadline - $(microseconds)))
      ((left > 1000)) || left=1000
      ((left < 1000000)) || left=1000000
    fi
    IFS= read -r -u 9 -t "$(as_seconds "$left")" rest
    status=$?
    line+=$rest # also the beginning of a line, if the time was up then
    if ((status)); then
      [[ -n $deadline ]] && (($(microseconds) >= deadline)) && overdue
      continue
    fi
    read -r event index value <<<"$line"
    line=""
    case $event in
      started)
        pids[index]=$value
        [[ -z $sent ]] || signal_all "$sent" # it started after the others were told
        ;;
      end) ended "$index" "$value" ;;
      signal) told_to_stop ;;
    esac
  done
  ran=$((first_end - started))
  stopping=$(($(microseconds) - first_end))
}

stop_signals=0 pids=() sent="" deadline="" running=0
trap 'stop_signals=$((stop_signals + 1)); echo "signal TERM 0" >&9' TERM INT
trap '' HUP # a detached launcher goes on when its terminal is closed
# On one line: bash reads a script as it goes, and this one may be replaced while the job runs.
restart_loop; exit "$?"
