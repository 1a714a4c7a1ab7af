#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on every worker, in its home folder:
#   launch/tpu_worker.sh start ARGUMENTS OF launch/local.sh    detached, unless it runs already
#   launch/tpu_worker.sh status                                for people
#   launch/tpu_worker.sh outcome      "running", the launcher's exit status, or "gone" if neither
#   launch/tpu_worker.sh stop S       SIGTERM for the launcher, and at most S seconds of waiting
# In the home folder: vlp_jax.log (output), vlp_jax.restarts.jsonl, vlp_jax.pid, vlp_jax.status.
set -uo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
pid_file=$HOME/vlp_jax.pid status_file=$HOME/vlp_jax.status log=$HOME/vlp_jax.log

# The number of a process may have been given to another one since, above all after a reboot.
running() {
  [[ -r $pid_file ]] && grep -q local.sh "/proc/$(<"$pid_file")/cmdline" 2>/dev/null
}

outcome() {
  if running; then echo running; elif [[ -r $status_file ]]; then cat "$status_file"; else
    echo gone
  fi
}

case ${1-} in
  start)
    if running; then
      echo "$HOSTNAME: already running"
      exit 0
    fi
    rm -f "$pid_file" "$status_file"
    nohup setsid "${BASH_SOURCE[0]}" run "${@:2}" >>"$log" 2>&1 </dev/null &
    ;;
  run)
    cd -- "$here/.." || exit 2
    "$here/local.sh" --log "$HOME/vlp_jax.restarts.jsonl" "${@:2}" &
    echo "$!" >"$pid_file"
    wait "$!"
    echo "$?" >"$status_file"
    ;;
  status)
    echo "$HOSTNAME: $(outcome)"
    tail -n 1 "$HOME/vlp_jax.restarts.jsonl" 2>/dev/null
    tail -n 1 "$log" 2>/dev/null
    ;;
  outcome) outcome ;;
  stop)
    running && kill -TERM "$(<"$pid_file")"
    for ((i = 0; i < ${2:-300}; i++)); do
      running || break
      sleep 1
    done
    echo "$HOSTNAME: $(outcome)"
    ;;
  *)
    echo "error: unknown command '${1-}'; they are start, status, outcome and stop" >&2
    exit 2
    ;;
esac; exit "$?" # on one line: bash reads a script as it goes, and install replaces this one
