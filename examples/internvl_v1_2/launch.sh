#!/usr/bin/env bash
# Starts processes so that signals reach them, and reads how a run ended; pretrain.sh sources it.
# It needs `say` and `fail`, and sets `stop_signal` to the first signal that this script was sent.

stop_signal=""
child=""
is_starting=""
# torchrun hands these on to the ranks, and waits so long before it kills them. Ctrl-C is not among
# them: the terminal sends it to everybody, and this script makes one SIGTERM of it.
torchrun_words=(--signals-to-handle SIGTERM,SIGHUP,SIGQUIT,SIGUSR1
    --shutdown-timeout "${STOP_SECONDS:-280}" --max-restarts "${MAX_RESTARTS:-0}")
# A new store for every restart: ranks that find the addresses of dead ones do not find each other.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# pass_on NAME: what a trap calls. With no process to tell, the script itself ends.
# shellcheck disable=SC2317  # called by traps
pass_on() {
    stop_signal="${stop_signal:-SIG$1}"
    if [[ -n "$child" ]]; then
        say "SIG$1: handed on to process $child"
        kill -s "$1" "$child" 2>/dev/null || true
    elif [[ -z "$is_starting" ]]; then
        end_by_signal
    fi # else its number is not known yet, and await tells it
}

end_by_signal() {
    say "$stop_signal: nothing is running that could be saved"
    exit $((128 + $(kill -l "${stop_signal#SIG}")))
}

listen_for_signals() {
    trap 'pass_on TERM' TERM INT
    trap 'pass_on USR1' USR1
}

# await COMMAND...: runs it in the background, because bash lets a trap wait for what is in the
# foreground; returns its status.
await() {
    local status
    if [[ -n "$stop_signal" ]]; then end_by_signal; fi # it came when the last one had just ended
    is_starting=1
    "$@" &
    child=$!
    is_starting=""
    if [[ -n "$stop_signal" ]]; then kill -s "${stop_signal#SIG}" "$child" 2>/dev/null || true; fi
    while :; do
        status=0
        wait "$child" || status=$?
        # above 128: it died of a signal, or the wait was interrupted by ours and it still runs
        if ((status > 128)) && kill -0 "$child" 2>/dev/null; then continue; fi
        break
    done
    child=""
    return "$status"
}

# logged FILE... -- COMMAND...: what the command writes to stdout and stderr goes to stderr and, at
# their ends, to the files. The writer does not hear signals, so that the last lines are not lost.
logged() {
    local files=() status=0 writer output count
    while [[ "$1" != -- ]]; do
        files+=("$1")
        shift
    done
    shift
    exec {output}> >(
        trap '' TERM USR1 HUP INT
        exec tee -a -- "${files[@]}" >&2
    )
    writer=$!
    await "$@" >&"$output" 2>&1 || status=$?
    exec {output}>&-
    for ((count = 0; count < 50; count++)); do
        kill -0 "$writer" 2>/dev/null || break
        sleep 0.1
    done
    return "$status"
}

# without_stdout COMMAND...: to be run by await, whose child it becomes.
without_stdout() { exec "$@" >/dev/null; }

# first_error FILE: the line of mmlm that says what is wrong, out of torchrun's pages around it.
first_error() {
    tr '\r' '\n' <"$1" | grep -A 12 -m 1 '^\(\[rank [0-9]*\] \)\?error: ' |
        sed '/^[^ ]*Traceback/,$d; /^[WE][0-9]\{4\} /,$d' || true
}

# of_marker FOLDER KEY: a value of stopped.json, which has a line for each; empty where it is not.
of_marker() {
    [[ -f "$1/stopped.json" ]] || return 0
    sed -n "s/^ *\"$2\": \"\{0,1\}\([A-Za-z0-9_]*\)\"\{0,1\},\{0,1\}\$/\1/p" "$1/stopped.json"
}

# refuse_if_in_use FOLDER: asks for the lock that rank 0 holds during a run (mmlm/train/run_guard.py),
# of whatever python there is: the host that calls srun has no environment.
refuse_if_in_use() {
    [[ -e "$1/run.lock" ]] || return 0
    local python holder status=0
    python=$(command -v python3 || command -v python) ||
        fail "FRESH=1: without python3 nobody can say whether $1 is in use; delete it by hand"
    holder=$("$python" -I -c 'import fcntl, sys
with open(sys.argv[1], "r+") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # both mean that it is held
        print(file.read().strip())
        sys.exit(3)
    except OSError as error:
        print(f"this file system has no locks ({error.strerror})", file=sys.stderr)
' "$1/run.lock") || status=$?
    case "$status" in
    0) ;;
    3) fail "$1 is in use by another run (${holder:-it has not yet said which}): FRESH=1 would" \
        "delete its checkpoints. Wait for it, stop it, or use another OUTPUT_DIR" ;;
    *) fail "FRESH=1: $1/run.lock cannot be opened, so nobody can say whether it is in use" ;;
    esac
}

# was_stopped FOLDER: whether the run in it was asked to stop and has saved itself; says so.
was_stopped() {
    local iteration total reason
    [[ -f "$1/stopped.json" ]] || return 1
    iteration=$(of_marker "$1" iteration)
    total=$(of_marker "$1" train_iters)
    reason=$(of_marker "$1" reason)
    [[ "$total" == null ]] && total="" # stopped before the data was known
    say "stopped after iteration $iteration${total:+ of $total} by $reason; the same command" \
        "continues"
}

# requeue_if_wanted FOLDER: with REQUEUE=1 Slurm starts the job again; not when it was cancelled.
requeue_if_wanted() {
    [[ "${REQUEUE:-0}" == 1 && -n "${SLURM_JOB_ID:-}" ]] || return 0
    local reason
    reason=$(of_marker "$1" reason)
    case "${reason:-$stop_signal}" in
    SIGUSR1 | exit_duration_minutes)
        say "REQUEUE=1: asking Slurm to start job $SLURM_JOB_ID again"
        scontrol requeue "$SLURM_JOB_ID"
        ;;
    esac
}

# newest_saved FOLDER: the checkpoint that a run would go on from; empty where there is none.
newest_saved() { if [[ -f "$1/checkpoints/latest" ]]; then cat -- "$1/checkpoints/latest"; fi; }

# requeue_after_progress FOLDER: a rank or a node that dies ends the whole run long before Slurm
# finds a node dead. With REQUEUE=1 the job is started again, but only if it has saved something
# since `saved_before`: an error that repeats is not repeated for ever.
requeue_after_progress() {
    [[ "${REQUEUE:-0}" == 1 && -n "${SLURM_JOB_ID:-}" ]] || return 0
    local saved
    saved=$(newest_saved "$1")
    if [[ -z "$saved" || "$saved" == "${saved_before:-}" ]]; then
        say "not requeued: nothing was saved since the start, so it would fail again"
        return
    fi
    say "REQUEUE=1: failed after $saved was saved; asking Slurm to start job $SLURM_JOB_ID again"
    scontrol requeue "$SLURM_JOB_ID"
}

# end_of_training FOLDER STATUS: after a launch; returns only where the run went to its end. The
# status of torchrun says nothing: it is 1 after any signal, so the run leaves a file.
end_of_training() {
    if was_stopped "$1"; then
        requeue_if_wanted "$1"
        exit 0
    fi
    if (($2)) && [[ -n "$stop_signal" ]]; then
        say "ended by $stop_signal without a new checkpoint; the same command continues from the" \
            "last one"
        requeue_if_wanted "$1"
        exit "$2"
    fi
    if (($2)); then requeue_after_progress "$1"; fi
    return "$2"
}
