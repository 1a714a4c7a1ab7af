# shellcheck shell=bash
# What all launchers share: which exit statuses are restarted, what counts as progress, the loop
# that starts a job again, and its log. Sourced, never run.
#
# The caller sets, before restart_loop:
#   workdir                        of the run: a local path or gs://...
#   restart_log                    a local file; one line of JSON is appended per attempt
#   max_restarts_without_progress  restarts in a row that are allowed without a newer checkpoint
#   backoff, max_backoff           seconds before the first restart without progress; it doubles
#   starts_file, launch_id         optional: a file that outlives this process, in which starts are
#                                  counted (a SLURM job that is requeued starts a new shell)
#   return_on_75                   optional: "yes" hands 75 back to the caller instead of restarting
# and defines run_attempt NUMBER, which runs the processes once and sets
#   statuses                       exit status of every process, in order
#   ran, stopping                  microseconds until the first process ended, and from then until
#                                  the last one was gone
# stop_signals is the number of SIGTERMs and SIGINTs that the caller's handler has seen: nothing is
# restarted after the first.
#
# After restart_loop, gave_up is "yes" if it ended because of restarts that led nowhere.
#
# shellcheck disable=SC2034,SC2154  # the caller's variables

# Exit statuses of python -m vlp_jax.train
STATUS_MISTAKE=2        # config, data or workdir: a restart would end the same way
STATUS_TOLD_TO_STOP=75  # saved; the same command goes on

say() { printf 'launch: %s\n' "$*" >&2; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit "$STATUS_MISTAKE"
}

# A launcher's --help is the comment at the top of its file.
print_help() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$1"; }

# need NAME COUNT: an option's value must be there
need() { (($2 >= 2)) || die "$1 needs a value"; }

is_number() { [[ $1 =~ ^[0-9]+$ ]]; }

need_number() { is_number "$2" || die "$1 must be a whole number, not '$2'"; }

# print_command ARG...: a command as it can be pasted into a shell
print_command() {
  local word line=""
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then line+="$word "; else line+="${word@Q} "; fi
  done
  printf '%s\n' "${line% }"
}

# option_of NAME ARG...: the value that the training arguments give to --NAME; status 1 if none
option_of() {
  local name=$1 value found=1
  shift
  while (($#)); do
    case $1 in
      "--$name") value=${2-} found=0 ;;
      "--$name="*) value=${1#*=} found=0 ;;
    esac
    shift
  done
  ((found == 0)) && printf '%s\n' "$value"
}

# use_accelerator NAME: the flags of env/NAME.sh
use_accelerator() {
  local folder
  folder=$(dirname -- "${BASH_SOURCE[0]}")/env
  [[ $1 =~ ^[a-z0-9_]+$ && -r $folder/$1.sh ]] ||
    die "unknown accelerator '$1'; there are: $(basename -s .sh -a "$folder"/*.sh | tr '\n' ' ')"
  # shellcheck source=/dev/null
  source "$folder/$1.sh"
}

check_workdir() {
  case $1 in
    gs://?*) command -v gcloud >/dev/null || die "a workdir on gs:// needs the gcloud command" ;;
    *://*) die "the launchers find checkpoints on local paths and gs:// alone, not in $1" ;;
    "") die "--workdir is missing among the arguments of vlp_jax.train" ;;
  esac
}

# newest_checkpoint WORKDIR: the highest step that is saved whole, nothing if there is none.
# Checkpoints that are being written have names with a suffix. Status 1: it could not be found out.
newest_checkpoint() {
  local names name newest="" errors
  if [[ $1 == gs://* ]]; then
    errors=$(mktemp)
    if ! names=$(gcloud storage ls "${1%/}/checkpoints/" 2>"$errors"); then
      if grep -q "matched no objects" "$errors"; then names=""; else
        say "could not list ${1%/}/checkpoints: $(tail -n 1 "$errors")"
        rm -f "$errors"
        return 1
      fi
    fi
    rm -f "$errors"
  else
    names=$(find "$1/checkpoints" -mindepth 1 -maxdepth 1 -type d 2>/dev/null)
  fi
  while IFS= read -r name; do
    name=${name%/}
    name=${name##*/}
    is_number "$name" && { [[ -z $newest ]] || ((10#$name > newest)); } && newest=$((10#$name))
  done <<<"$names"
  [[ -z $newest ]] || printf '%s\n' "$newest"
}

# is_progress BEFORE AFTER: whether a newer checkpoint appeared
is_progress() { [[ -n $2 ]] && { [[ -z $1 ]] || (($2 > $1)); }; }

# overall_status STATUS...: the status that tells most about why a job ended.
# A mistake of the user comes first, then what went wrong first-hand (a crash, the watchdog, ...),
# then its consequences: a lost peer (76), killed (137, 143); last "told to stop" and success.
overall_status() {
  local status best=0 best_rank=0 rank
  for status in "$@"; do
    case $status in
      0) rank=0 ;;
      "$STATUS_TOLD_TO_STOP") rank=1 ;;
      143) rank=2 ;;
      137) rank=3 ;;
      76) rank=4 ;;
      "$STATUS_MISTAKE") rank=6 ;;
      *) rank=5 ;;
    esac
    if ((rank > best_rank)); then best=$status best_rank=$rank; fi
  done
  printf '%s\n' "$best"
}

microseconds() { printf '%s\n' "${EPOCHREALTIME//[^0-9]/}"; }

as_seconds() { printf '%d.%03d' $(($1 / 1000000)) $(($1 / 1000 % 1000)); }

# log_attempt ATTEMPT STATUS BEFORE AFTER RESTARTS
log_attempt() {
  local each
  each=$(printf ', %s' "${statuses[@]}")
  mkdir -p -- "$(dirname -- "$restart_log")"
  printf '{"time": "%s", "attempt": %d, "status": %d, "statuses": [%s], %s, %s, "restarted": %s}\n' \
    "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$1" "$2" "${each:2}" \
    "\"checkpoint_before\": ${3:-null}, \"checkpoint_after\": ${4:-null}" \
    "\"seconds\": $(as_seconds "$ran"), \"seconds_to_stop\": $(as_seconds "$stopping")" \
    "$5" >>"$restart_log"
}

# read_starts FILE / add_start FILE LINE: a few lines that may live on gs://, which cannot append
read_starts() {
  if [[ $1 == gs://* ]]; then gcloud storage cat "$1" 2>/dev/null; else cat -- "$1" 2>/dev/null; fi
}

add_start() {
  if [[ $1 == gs://* ]]; then
    { read_starts "$1"; printf '%s\n' "$2"; } | gcloud storage cp - "$1" --quiet
  else
    mkdir -p -- "$(dirname -- "$1")"
    printf '%s\n' "$2" >>"$1"
  fi
}

# starts_at FILE LAUNCH_ID CHECKPOINT: how many of the last starts of this launch were from this
# checkpoint ("none" if there is none)
starts_at() {
  read_starts "$1" | awk -v id="$2" -v at="$3" '
    $1 == id { count = ($2 == at) ? count + 1 : 0 }
    END { print count + 0 }'
}

# pause SECONDS: sleeps, and returns at once when a trapped signal comes
pause() {
  sleep "$1" &
  wait "$!" || true
  kill "$!" 2>/dev/null || true
}

# restart_loop: runs run_attempt until the job is complete, the user has to do something, the
# launcher was told to stop, or the restarts lead nowhere. Returns the exit status of the launcher.
restart_loop() {
  local attempt=0 idle=0 before after status delay reason
  gave_up=""
  before=$(newest_checkpoint "$workdir") || before=""
  [[ -z ${starts_file-} ]] || idle=$(starts_at "$starts_file" "$launch_id" "${before:-none}")
  if ((idle > max_restarts_without_progress)); then
    say "$idle starts from checkpoint ${before:-none} led nowhere: not started again"
    gave_up=yes
    return 1
  fi
  while true; do
    attempt=$((attempt + 1))
    [[ -z ${starts_file-} ]] || add_start "$starts_file" "$launch_id ${before:-none}"
    run_attempt "$attempt"
    after=$(newest_checkpoint "$workdir") || after=$before
    status=$(overall_status "${statuses[@]}")
    if is_progress "$before" "$after"; then idle=0; else idle=$((idle + 1)); fi
    reason="" delay=0
    if ((status == 0)); then
      reason="complete"
    elif ((status == STATUS_MISTAKE)); then
      reason="a mistake in config, data or workdir: see above; not restarted"
    elif ((${stop_signals:-0})); then
      ((status == 143)) && status=$STATUS_TOLD_TO_STOP
      reason="stopped; the same command goes on from checkpoint ${after:-none}"
    elif ((idle > max_restarts_without_progress)); then
      reason="status $status, and $idle attempts led to no newer checkpoint than ${after:-none}:"
      reason+=" not restarted" gave_up=yes
    elif ((status == STATUS_TOLD_TO_STOP)) && [[ ${return_on_75-} == yes ]]; then
      reason="saved at ${after:-none}"
    elif ((idle > 0)); then
      delay=$((backoff << (idle - 1 > 20 ? 20 : idle - 1)))
      ((delay <= max_backoff)) || delay=$max_backoff
    fi
    log_attempt "$attempt" "$status" "$before" "$after" "$([[ -z $reason ]] && echo true || echo false)"
    if [[ -n $reason ]]; then
      say "$reason"
      return "$status"
    fi
    say "status $status (${statuses[*]}); checkpoint ${before:-none} -> ${after:-none};" \
      "starting again in $delay s ($idle of $max_restarts_without_progress without progress)"
    before=$after
    ((delay == 0)) || pause "$delay"
    if ((${stop_signals:-0})); then
      say "told to stop before the restart"
      return "$STATUS_TOLD_TO_STOP"
    fi
  done
}
