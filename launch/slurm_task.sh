#!/usr/bin/env bash
# One task of a SLURM step: launch/slurm_task.sh FOLDER COMMAND...
# Writes the exit status of COMMAND to FOLDER/SLURM_PROCID, because srun reports one status for all
# tasks. A task that was told to stop and saved (75) ends with 0, so that --kill-on-bad-exit does not
# kill the others while they save.
set -uo pipefail
trap : TERM INT # SLURM signals the whole task; this shell has to outlive the command
folder=$1
shift
"$@"
status=$?
printf '%s\n' "$status" >"$folder/$SLURM_PROCID.new"
mv -- "$folder/$SLURM_PROCID.new" "$folder/$SLURM_PROCID"
((status != 75)) || exit 0
exit "$status"
