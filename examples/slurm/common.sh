# What all job scripts here do; to be sourced from the project's folder by one of them, which then calls `run_job "$@"`:
# read the recipe, look at the machines (preflight), train, and on SIGUSR1 save and go back into the queue.
# docs/slurm.md has a table of the variables.
# shellcheck shell=bash

JOB_SCRIPT=$0                          # its #SBATCH lines are the defaults of a dry run
DRY_RUN=${DRY_RUN:-0}

say() {
    printf '%(%F %T)T %s\n' -1 "$*"
}

die() {
    echo "${JOB_SCRIPT##*/}: $*" >&2
    exit 2
}

sbatch_option() {                      # its value in the #SBATCH lines of the job script
    sed -nE "s/^#SBATCH --$1=([^ ]+).*/\1/p" "$JOB_SCRIPT"
}

describe_job() {                       # what Slurm says of the job, or what it would say
    NODES=${SLURM_JOB_NUM_NODES:-${NODES:-$(sbatch_option nodes)}}
    RANKS_PER_NODE=${RANKS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-$(sbatch_option ntasks-per-node)}}
    JOB_ID=${SLURM_JOB_ID:-0}
    if [[ -n ${SLURM_JOB_NODELIST:-} ]]; then
        mapfile -t NODE_NAMES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    elif [[ $DRY_RUN == 1 ]]; then
        NODE_NAMES=()
        for ((n = 0; n < NODES; n++)); do NODE_NAMES+=("node$n"); done
    else
        die "not in a Slurm job: start it with sbatch, or with DRY_RUN=1 to see what it would do"
    fi
}

set_environment() {                    # of every rank; a dry run prints these
    export MASTER_ADDR=${MASTER_ADDR:-${NODE_NAMES[0]}}                        # where rank 0 listens
    export MASTER_PORT=${MASTER_PORT:-$((10000 + JOB_ID % 20000))}             # two jobs on a node do not meet
    export LOCAL_WORLD_SIZE=$RANKS_PER_NODE
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}       # Megatron wants it with TP > 1
    export PYTHONUNBUFFERED=1                                                  # lines are in the log when they are said
    export PYTHONFAULTHANDLER=1                                                # a crash shows where each thread was
    # A rank that hangs or dies must end the job, with a reason, and not keep it waiting.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}                                      # NCCL says why it failed
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}    # a failed collective ends the rank
    export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=${TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC:-600}    # and so does a stuck watchdog
    export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}         # the last collectives of every rank are
    export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}  # written down when one times out,
    export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=$LOG_DIR/nccl_trace_rank_           # here
    JOB_ENVIRONMENT="MASTER_ADDR MASTER_PORT LOCAL_WORLD_SIZE OMP_NUM_THREADS CUDA_DEVICE_MAX_CONNECTIONS"
    JOB_ENVIRONMENT+=" PYTHONUNBUFFERED PYTHONFAULTHANDLER NCCL_DEBUG TORCH_NCCL_ASYNC_ERROR_HANDLING"
    JOB_ENVIRONMENT+=" TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC TORCH_NCCL_DUMP_ON_TIMEOUT TORCH_NCCL_TRACE_BUFFER_SIZE"
    JOB_ENVIRONMENT+=" TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
    JOB_ENVIRONMENT+=" ${RECIPE_ENVIRONMENT:-}"                                # names that a recipe exports itself
    export JOB_ENVIRONMENT DRY_RUN STOP_PAUSE=${STOP_PAUSE:-10}
}

set_python() {                         # a container, or a virtual environment, or the python of PATH
    SRUN=(srun --nodes="$NODES" --ntasks-per-node="$RANKS_PER_NODE" --ntasks="$((NODES * RANKS_PER_NODE))"
        --export=ALL                   # what is set here reaches the ranks, also under `sbatch --export=LIST`
        --label                        # each line begins with its rank
        --kill-on-bad-exit=1           # one rank fails: all end
        --cpu-bind=none                # threads of a rank may use any core
        --mpi=none)
    if [[ -n ${CONTAINER_IMAGE:-} ]]; then         # pyxis and enroot: an image's name, or a .sqsh file
        local mounts=$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
        [[ $RUN_DIR != /* ]] || mounts+=,$RUN_DIR:$RUN_DIR
        SRUN+=(--container-image="$CONTAINER_IMAGE" --container-workdir="$PWD" --container-mounts="$mounts")
    else
        local venv=${VENV:-$PWD/.venv}
        [[ -d $venv ]] && export PATH="$venv/bin:$PATH"
    fi
    local flags
    read -ra flags <<<"${SRUN_FLAGS:-}"            # more of yours
    SRUN+=(${flags[@]+"${flags[@]}"})
}

iteration() {                          # of the last complete checkpoint; 0: none
    local text=""
    [[ -f $SAVE/latest_checkpointed_iteration.txt ]] && text=$(cat "$SAVE/latest_checkpointed_iteration.txt")
    [[ $text =~ ^[0-9]+$ ]] && echo "$text" || echo 0
}

# On SIGUSR1 (sbatch --signal=B:USR1@seconds, or `scancel --signal=USR1 --batch JOB`) the ranks save and stop, and the job
# goes back into the queue. On SIGTERM they save and stop, and whoever sent it decides whether the job comes back: Slurm
# itself, when it preempts a job by requeueing it; nobody, when a user cancels it.
ASKED_BY=""
SIGNALLED=""
STEP=""
ask_to_stop() {
    ASKED_BY=$1 SIGNALLED=1
    say "$1: asking the ranks to save and stop"
    [[ -z $STEP ]] || kill -USR1 "$STEP" 2>/dev/null || true
}

run_step() {                           # srun flags, --, the command of a rank; its exit code
    local flags=() code=0 again=0
    while [[ $1 != -- ]]; do flags+=("$1"); shift; done
    shift
    local step=("${SRUN[@]}" "${flags[@]}" bash examples/slurm/rank.sh "$@")
    if [[ $DRY_RUN == 1 ]]; then
        dry_run "$@"
        return
    fi
    [[ -z $ASKED_BY ]] || return 138   # asked before anything was started
    "${step[@]}" &
    STEP=$!
    wait "$STEP" && code=0 || code=$?
    while [[ -n $SIGNALLED ]]; do      # a signal ends `wait`, not srun
        SIGNALLED=""
        wait "$STEP" 2>/dev/null && again=0 || again=$?
        ((again == 127)) || code=$again            # 127: it had been waited for to its end
    done
    STEP=""
    return "$code"
}

dry_run() {                            # the command of rank 0, as rank.sh would run it, and what others have instead
    local n l i line first=() words=() others
    printf 'srun:'
    printf ' %q' "${step[@]:0:${#step[@]}-$#}"
    echo " COMMAND"
    for ((n = 0; n < NODES; n++)); do
        for ((l = 0; l < RANKS_PER_NODE; l++)); do
            line=$(SLURM_PROCID=$((n * RANKS_PER_NODE + l)) SLURM_LOCALID=$l SLURM_NODEID=$n \
                SLURM_NTASKS=$((NODES * RANKS_PER_NODE)) SLURMD_NODENAME=${NODE_NAMES[n]} \
                bash examples/slurm/rank.sh "$@")
            read -ra words <<<"$line"
            if ((${#first[@]} == 0)); then
                first=("${words[@]}")
                echo "$line"
                continue
            fi
            others=""
            for ((i = 3; i < ${#words[@]}; i++)); do
                [[ ${words[i]} == "${first[i]}" ]] || others+=" ${words[i]}"
            done
            echo "${NODE_NAMES[n]} rank $((n * RANKS_PER_NODE + l)): as rank 0, but$others"
        done
    done
}

preflight() {
    [[ ${PREFLIGHT:-1} == 1 ]] || return 0
    local code=0
    run_step -- python tools/preflight.py --ranks-per-node "$RANKS_PER_NODE" --save "$SAVE" "${PREFLIGHT_ARGS[@]}" \
        -- "${RANK_COMMAND[@]:1}" || code=$?
    if ((code)) && [[ -z $ASKED_BY ]]; then
        say "preflight failed (exit code $code): nothing was started"
        exit "$code"
    fi
}

train() {
    local begun=0 code=0 time
    begun=$(iteration)
    printf -v time '%(%F %T)T' -1
    [[ $DRY_RUN == 1 ]] ||
        say "start ${SLURM_RESTART_COUNT:-0} on ${NODE_NAMES[*]}, from iteration $begun; a log a node in $LOG_DIR"
    # --open-mode: a job that comes back goes on in its logs
    run_step --output="$LOG_DIR/node%n-%N.log" --open-mode=append \
        -- python -m megatron_longact.run "${RANK_COMMAND[@]}" || code=$?
    [[ $DRY_RUN == 1 ]] && return
    say "the ranks ended with exit code $code, the last complete checkpoint is of iteration $(iteration)"
    if goes_on "$code" && ! comes_again "$code"; then
        requeue
    elif ((code)); then
        # the first ones of this start; 143 is what srun does to the others
        sed -nE 's/^ *[0-9]+: (.* rank [0-9]+ on .* ended with exit code [0-9]+)$/\1/p' "$LOG_DIR"/node*.log |
            awk -v time="$time" '$0 >= time && !/ 143$/' | sort | head -n 8 >&2 || true
    fi
    exit "$code"
}

goes_on() {                            # whether an exit code asks for another start
    case $ASKED_BY,$1 in
        SIGTERM,*) return 1 ;;
        SIGUSR1,138 | SIGUSR1,143) ;;  # the signal found ranks that were still starting
        SIGUSR1,"$STOP_CODE") ;;
        *,75 | *,16) ;;                # --exit-duration-in-mins; Megatron asks for another machine after a wrong result
        *) return 1 ;;
    esac
}

comes_again() {                        # whether a wrong result, exit code 16, has ended this job at this checkpoint before
    local mark=$LOG_DIR/wrong-result now
    [[ $1 == 16 ]] || return 1
    now=$(iteration)
    if [[ -f $mark && $(cat "$mark") == "$now" ]]; then
        say "a wrong result (exit code 16) once more, at the checkpoint of iteration $now: it stays down"
        return 0
    fi
    echo "$now" >"$mark"
    return 1
}

requeue() {
    if ((${SLURM_RESTART_COUNT:-0} >= ${MAX_REQUEUES:-100})); then
        say "not requeued: it has been already ${SLURM_RESTART_COUNT} times (MAX_REQUEUES)"
        exit 1
    fi
    say "back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}

run_job() {                            # more flags for the program
    describe_job
    [[ -f examples/slurm/recipes/$RECIPE.sh ]] || die "no recipe $RECIPE: $(cd examples/slurm/recipes && echo ./*.sh)"
    # shellcheck source=/dev/null
    source "examples/slurm/recipes/$RECIPE.sh"
    RANK_COMMAND+=("$@")
    LOG_DIR=$(realpath -m "$RUN_DIR")/logs/$JOB_ID
    set_environment
    set_python
    trap 'ask_to_stop SIGUSR1' USR1
    trap 'ask_to_stop SIGTERM' TERM
    [[ $DRY_RUN == 1 ]] || mkdir -p "$LOG_DIR" "$SAVE"
    preflight
    train
}
