#!/bin/sh
# Starts a training again until it has ended:
#
#     sh deploy/retry.sh mpiexec -n 2 gpu-bp train CONFIG --run RUN --resume
#
# It is started again where it was killed (exit status 9 by MPICH, 137 by Open MPI, srun and a single process) or failed.
# It is not where it succeeded, where there is something to mend (2; 126 and 127: no such command) and where it was asked
# to end (129, 130, 141, 143; MPICH gives 15 for a rank that SIGTERM has killed).
#
# Ctrl-C, SIGTERM or SIGHUP to this script asks the training to pause, by one SIGTERM; what was trained is saved, and
# the script ends with 130, 143 or 129. The command has a session of its own (setsid), so that a terminal's Ctrl-C does
# not reach it too: the second of two signals ends a training at once.
#
# In the environment: RETRY_TRIES, so many at most; RETRY_PAUSE, the seconds before the second, twice as many before
# each further one, RETRY_PAUSE_MAX at most.
set -u

[ $# -gt 0 ] || { echo "usage: sh retry.sh COMMAND [WORD]..." >&2; exit 2; }
tries=${RETRY_TRIES:-10} pause=${RETRY_PAUSE:-10} longest=${RETRY_PAUSE_MAX:-600}
asked='' # to end: the exit status
child=''

ask() {
    asked=$1
    [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}
trap 'ask 129' HUP
trap 'ask 130' INT
trap 'ask 143' TERM

# Runs a command in the background, since a shell handles a signal only while it waits; $status is how it ended.
run() {
    [ -z "$asked" ] || exit "$asked"
    setsid "$@" &
    child=$!
    [ -z "$asked" ] || kill -TERM "$child" 2>/dev/null # asked just now
    wait "$child"
    status=$?
    # a signal ends `wait`, and not the command
    while [ -n "$asked" ] && kill -0 "$child" 2>/dev/null; do wait "$child"; done
    child=''
    [ -z "$asked" ] || exit "$asked"
}

try=1
while :; do
    run "$@"
    case $status in
        0 | 2 | 126 | 127 | 15 | 129 | 130 | 141 | 143) exit "$status" ;;
    esac
    if [ "$try" -ge "$tries" ]; then
        echo "retry.sh: exit status $status at the last of $tries tries" >&2
        exit "$status"
    fi
    try=$((try + 1))
    [ "$pause" -le "$longest" ] || pause=$longest
    echo "retry.sh: exit status $status; try $try of $tries in $pause s" >&2
    run sleep "$pause"
    pause=$((pause * 2))
done
