#!/bin/sh
# Whether the run that these arguments of the trainer name was stopped on request, so that the same command goes on; prints
# the signal: sh launch/was_stopped.sh --config configs/teacher_global.yaml [--run-dir DIR …]
# Launchers end with 1 whatever their ranks end with, so it reads the run's status.json.
set -eu
config='' run_dir='' previous=''
for argument in "$@"; do
    case "$previous" in
        --config) config=$argument ;;
        --run-dir) run_dir=$argument ;;
    esac
    case "$argument" in
        --config=*) config=${argument#*=} ;;
        --run-dir=*) run_dir=${argument#*=} ;;
    esac
    previous=$argument
done
name=${config##*/}
status=${run_dir:-runs/${name%.*}}/status.json
grep -q '"phase": "stopped"' "$status" 2>/dev/null || exit 1
sed -n 's/.*"signal": "\(.*\)".*/\1/p' "$status"
