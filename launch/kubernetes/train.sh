#!/bin/sh
# What the pod of job.yaml runs: torchrun over the pod's GPUs. Ends with 75 where the run was stopped on request, for
# podFailurePolicy to read: torchrun's own code is 1 then.
set -eu
here=$(dirname -- "$0")
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
# Less than the pod's grace period, so that the launcher outlives its ranks.
export PET_SHUTDOWN_TIMEOUT=100

# The shell is the pod's first process, which alone gets the signal.
torchrun --standalone --nproc-per-node "${NUM_RANKS:-gpu}" -m "${MODULE:-aplantida_dist.train}" "$@" &
launcher=$!
trap 'kill -TERM "$launcher"' TERM
code=0
wait "$launcher" || code=$?
# A signal ends the first wait; the launcher is still at work.
while kill -0 "$launcher" 2>/dev/null; do
    code=0
    wait "$launcher" || code=$?
done
if [ "$code" -ne 0 ] && sh "$here/../was_stopped.sh" "$@" >/dev/null; then
    exit 75
fi
exit "$code"
