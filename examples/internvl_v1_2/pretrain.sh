#!/usr/bin/env bash
# Trains InternVL-Chat-V1-2: the full recipe on GPUs or Slurm, a tiny one end to end without a GPU.
set -euo pipefail

usage() {
    cat <<'HELP'
bash examples/internvl_v1_2/pretrain.sh [--set section.field=value ...]

Trains InternVL-Chat-V1-2. What runs depends on the machine:

  no GPU      the demo: draws a small playground, makes tiny weights in the published three-part
              layout, converts them, evaluates, trains at TP 2 x PP 2 in 4 processes, evaluates
              again, exports to HuggingFace and writes a report. About 10 minutes on 2 cores.
  GPUs        the published fine-tune on the GPUs of this machine.
  Slurm       the published fine-tune on GPUS / GPUS_PER_NODE nodes: inside an allocation of several
              nodes (sbatch, salloc), or from a login node when PARTITION is set (srun is called).

A virtual environment with pinned versions is made first (tools/environment.sh). A run that was cut
short continues from its last checkpoint; a finished one is not repeated. Relative paths start at
the repository's root, which is the working directory of the run.

settings (environment variables)
  GPUS                   processes in all, one a GPU (default: CPU TP x PP; one machine all its
                         GPUs; Slurm the whole job, or 64 from a login node)
  GPUS_PER_NODE          Slurm: GPUS of each node (default: 8, or GPUS where it is smaller); on one
                         machine the default of GPUS
  PER_DEVICE_BATCH_SIZE  packs in one microbatch (default: 1)
  BATCH_SIZE             samples in a global batch (default: 512; demo 64)
  TP, PP                 tensor and pipeline parallel sizes (default: 4 and 2; demo 2 and 2);
                         GPUS must be a multiple of TP x PP, what is left is data parallel
  OUTPUT_DIR             checkpoints, logs, metrics.jsonl, TensorBoard files, report
                         (default: work_dirs/internvl_chat_v1_2, demo ..._tiny)
  STOP_SECONDS           SIGTERM, SIGUSR1 or Ctrl-C lets the training finish its iteration and save, and
                         this script ends with status 0; what takes longer than so many seconds is
                         killed (default: 280). A second signal ends everything at once
  MAX_RESTARTS           one machine: how often torchrun starts the ranks again when one has died; they
                         continue from the last checkpoint (default: 0)
  FRESH=1                delete an earlier run in OUTPUT_DIR and train again; refused while that
                         run lives, and a job that Slurm has requeued deletes nothing
  DEMO=1                 run the demo even though there are GPUs, and on them
                         (CUDA_VISIBLE_DEVICES="" runs it on the CPU)
  DEMO_DIR               where the demo's data and weights are kept (default: work_dirs/demo_cache)
  MMLM_VENV              virtual environment, see tools/environment.sh --help

settings for GPUs and Slurm
  VISION_MODEL           folder of InternViT-6B-448px-V1-2
  LLM                    folder of Nous-Hermes-2-Yi-34B
  PROJECTOR              projector file (default: VISION_MODEL/mlp_projector/hermes_2_yi_34b.pth)
  LOAD                   converted checkpoint; made once from the three above when it is not there
                         (default: work_dirs/internvl_chat_v1_2_converted)
  META                   meta json of the data (default: the published nine sets in
                         examples/internvl_v1_2/data/internvl_1_2_finetune.json)
  RECIPE                 function in recipe.py: finetune (default) or second_finetune
  PARTITION, SRUN_ARGS   Slurm: partition, and more words for srun
  CPUS_PER_TASK          Slurm: cores of each node's task (default: 10 x GPUS_PER_NODE)
  MASTER_PORT            Slurm: port of the rendezvous on the first node (default: 34229)
  REQUEUE=1              Slurm: a job that SIGUSR1 or train.exit_duration_minutes has stopped is
                         requeued (slurm/pretrain.sbatch sets it)

options
  --set a.b=c            replace one field of the recipe, see mmlm/config/schema.py; may be repeated
  -h, --help             this text

examples
  bash examples/internvl_v1_2/pretrain.sh
  TP=1 PP=2 BATCH_SIZE=32 OUTPUT_DIR=work_dirs/small bash examples/internvl_v1_2/pretrain.sh \
      --set train.train_iters=100
  VISION_MODEL=pretrained/InternViT-6B-448px-V1-2 LLM=pretrained/Nous-Hermes-2-Yi-34B \
      GPUS=8 bash examples/internvl_v1_2/pretrain.sh
  PARTITION=llm GPUS=64 GPUS_PER_NODE=8 VISION_MODEL=... LLM=... \
      bash examples/internvl_v1_2/pretrain.sh
  sbatch examples/internvl_v1_2/slurm/pretrain.sbatch
HELP
}

say() { printf '[pretrain] %s\n' "$*" >&2; }
fail() {
    say "ERROR: $*"
    exit 1
}

# require_count NAME: the variable of that name must be a whole number of at least 1.
require_count() {
    [[ "${!1}" =~ ^[1-9][0-9]{0,5}$ ]] || fail "$1='${!1}' must be a whole number of at least 1"
}

require_file() { [[ -f "$2" ]] || fail "$1: the file '$2' does not exist${3:+; $3}"; }
require_folder() { [[ -d "$2" ]] || fail "$1: the folder '$2' does not exist${3:+; $3}"; }

# Number of GPUs that a process started here would see.
count_gpus() {
    local visible="${CUDA_VISIBLE_DEVICES-all}"
    local found
    found=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
    case "$visible" in
    "" | -1) echo 0 ;;
    all) echo "${found:-0}" ;;
    *) if [[ "${found:-0}" == 0 ]]; then echo 0; else tr ',' '\n' <<<"$visible" | grep -c .; fi ;;
    esac
}

read_arguments() {
    overrides=()
    phase=start
    while (($#)); do
        case "$1" in
        -h | --help)
            usage
            exit 0
            ;;
        --set)
            [[ "${2:-}" == *=* ]] || fail "--set '${2:-}' must read section.field=value"
            overrides+=(--set "$2")
            # the folder is this script's to know
            if [[ "$2" == output_dir=* ]]; then OUTPUT_DIR="${2#output_dir=}"; fi
            shift
            ;;
        # This script calls itself under srun.
        --phase=convert | --phase=node) phase="${1#--phase=}" ;;
        *) fail "unknown word '$1' (--help says what there is)" ;;
        esac
        shift
    done
}

choose_mode() {
    # a word in arithmetic would be evaluated, so that nothing but a number may get there
    if [[ -n "${SLURM_JOB_NUM_NODES:-}" ]]; then require_count SLURM_JOB_NUM_NODES; fi
    gpus_here=$(count_gpus)
    if [[ "${DEMO:-0}" == 1 ]]; then
        mode=demo
    elif [[ -n "${PARTITION:-}" ]]; then
        mode=slurm
    elif [[ -n "${SLURM_JOB_ID:-}" && "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]]; then
        mode=slurm
    elif ((gpus_here > 0)); then
        mode=machine
    else
        mode=demo
    fi
}

read_settings() {
    local default_gpus name
    if [[ -n "${GPUS_PER_NODE:-}" ]]; then require_count GPUS_PER_NODE; fi
    RECIPE="${RECIPE:-finetune}"
    TP="${TP:-4}" PP="${PP:-2}" BATCH_SIZE="${BATCH_SIZE:-}"
    PER_DEVICE_BATCH_SIZE="${PER_DEVICE_BATCH_SIZE:-1}"
    case "$mode" in
    demo)
        RECIPE=tiny
        TP="${user_tp:-2}" PP="${user_pp:-2}" BATCH_SIZE="${BATCH_SIZE:-64}"
        default_gpus=demo
        OUTPUT_DIR="${OUTPUT_DIR:-work_dirs/internvl_chat_v1_2_tiny}"
        ;;
    machine) default_gpus=$gpus_here ;;
    slurm) # the whole job, or what was published where there is no job yet
        default_gpus=64
        if [[ -n "${SLURM_JOB_ID:-}" ]]; then
            default_gpus=$((SLURM_JOB_NUM_NODES * ${GPUS_PER_NODE:-8}))
        fi
        ;;
    esac
    if [[ "$RECIPE" == second_finetune ]]; then
        BATCH_SIZE="${BATCH_SIZE:-128}"
        OUTPUT_DIR="${OUTPUT_DIR:-work_dirs/internvl_chat_v1_2_second_finetune}"
    fi
    BATCH_SIZE="${BATCH_SIZE:-512}"
    OUTPUT_DIR="${OUTPUT_DIR:-work_dirs/internvl_chat_v1_2}"
    require_count TP
    require_count PP
    [[ "$default_gpus" != demo ]] || default_gpus=$((TP * PP))
    if [[ "$mode" != slurm && -n "${GPUS_PER_NODE:-}" ]]; then default_gpus=$GPUS_PER_NODE; fi
    GPUS="${GPUS:-$default_gpus}"
    require_count GPUS
    if [[ "$mode" == slurm ]] && ((GPUS > 8)); then
        GPUS_PER_NODE="${GPUS_PER_NODE:-8}"
    else
        GPUS_PER_NODE="${GPUS_PER_NODE:-$GPUS}"
    fi
    for name in GPUS_PER_NODE PER_DEVICE_BATCH_SIZE BATCH_SIZE; do require_count "$name"; done
    if [[ "$mode" != slurm ]] && ((GPUS_PER_NODE < GPUS)); then
        say "this is one machine: all GPUS=$GPUS processes run here, not $GPUS_PER_NODE"
    fi
    if [[ "$mode" != slurm ]] || ((GPUS < GPUS_PER_NODE)); then GPUS_PER_NODE=$GPUS; fi
}

check_settings() {
    ((GPUS % (TP * PP) == 0)) ||
        fail "GPUS=$GPUS is not a multiple of TP x PP = $TP x $PP = $((TP * PP)); change one"
    ((GPUS % GPUS_PER_NODE == 0)) ||
        fail "GPUS=$GPUS is not a multiple of GPUS_PER_NODE=$GPUS_PER_NODE; all nodes are equal"
    case "$RECIPE" in
    finetune | second_finetune | tiny) ;;
    *) fail "RECIPE='$RECIPE' must be finetune or second_finetune" ;;
    esac
    if [[ "$mode" == machine ]] || { [[ "$mode" == demo ]] && ((gpus_here > 0)); }; then
        ((GPUS <= gpus_here)) || fail "GPUS=$GPUS, but this machine shows $gpus_here GPUs"
    fi
    if [[ -n "${STOP_SECONDS:-}" ]]; then require_count STOP_SECONDS; fi
    if [[ "${MAX_RESTARTS:-0}" != 0 ]]; then require_count MAX_RESTARTS; fi
    [[ "${REQUEUE:-0}" == [01] ]] || fail "REQUEUE='$REQUEUE' must be 0 or 1"
    [[ "${FRESH:-0}" == [01] ]] || fail "FRESH='$FRESH' must be 0 or 1"
    [[ "${DEMO:-0}" == [01] ]] || fail "DEMO='$DEMO' must be 0 or 1"
}

# What every call of mmlm gets; --set of the command line comes last and wins.
make_run_words() {
    run_words=(
        --recipe "examples/internvl_v1_2/recipe.py:$RECIPE"
        --set "output_dir=$OUTPUT_DIR"
        --set "parallel.tensor_model_parallel_size=$TP"
        --set "parallel.pipeline_model_parallel_size=$PP"
        --set "train.global_batch_size=$BATCH_SIZE"
        --set "train.micro_batch_size=$PER_DEVICE_BATCH_SIZE"
        --set "backend.device=$1"
        "${@:2}"
        ${overrides[@]+"${overrides[@]}"}
    )
}

# on_this_machine COMMAND WORDS...: one process a GPU (or core). torch.distributed.run ends a failure
# with a page of its own, so the line that says what is wrong is repeated as the last one.
on_this_machine() {
    local messages status=0 cause command
    messages=$(mktemp)
    command=(python -m torch.distributed.run "${torchrun_words[@]}" --standalone
        --nproc-per-node "$GPUS" -m mmlm "$@")
    if [[ "$1" == train ]]; then
        rm -f -- "$OUTPUT_DIR/stopped.json"
        logged "$messages" "$OUTPUT_DIR/training_log.txt" -- "${command[@]}" || status=$?
        end_of_training "$OUTPUT_DIR" "$status" || true
    else
        logged "$messages" -- without_stdout "${command[@]}" || status=$?
    fi
    cause=$(first_error "$messages")
    rm -f -- "$messages"
    if ((status)); then
        say "mmlm $1 failed${cause:+:
$cause}"
    fi
    return "$status"
}

start_afresh() {
    [[ "${FRESH:-0}" == 1 ]] || return 0
    if [[ "${SLURM_RESTART_COUNT:-0}" != 0 ]]; then
        say "FRESH=1: nothing is deleted, because Slurm has started this job again; it continues"
        return
    fi
    refuse_if_in_use "$OUTPUT_DIR"
    say "FRESH=1: deleting the earlier run in $OUTPUT_DIR"
    local name
    for name in checkpoints tensorboard hf finished demo_world.json metrics.jsonl config.json \
        report.md loss.png training_log.txt stopped.json; do
        rm -rf -- "${OUTPUT_DIR:?}/$name"
    done
    rm -f -- "$OUTPUT_DIR"/evaluation_*.json
}

# ---------------------------------------------------------------------------------------------
# The demo

# Deletes nothing: a run on other data cannot be continued, and the user decides.
check_demo_world() {
    mkdir -p -- "$OUTPUT_DIR"
    if [[ ! -f "$OUTPUT_DIR/demo_world.json" ]]; then
        [[ ! -e "$OUTPUT_DIR/checkpoints/latest" ]] ||
            fail "$OUTPUT_DIR holds another run; set OUTPUT_DIR to a new folder, or FRESH=1"
        cp "$DEMO_DIR/world.json" "$OUTPUT_DIR/demo_world.json"
    fi
    cmp -s "$DEMO_DIR/world.json" "$OUTPUT_DIR/demo_world.json" ||
        fail "the demo data changed since the run in $OUTPUT_DIR; set FRESH=1 or another OUTPUT_DIR"
}

convert_demo() {
    if [[ -f "$DEMO_DIR/converted/latest" ]]; then
        say "converted weights: cached in $DEMO_DIR/converted"
        return
    fi
    say "converting the HuggingFace parts"
    await python tools/checkpoint_convert/hf_to_megatron.py \
        --vision "$DEMO_DIR/pretrained/InternViT-tiny-56px" \
        --llm "$DEMO_DIR/pretrained/Nous-Hermes-2-Yi-tiny" \
        --projector "$DEMO_DIR/pretrained/InternViT-tiny-56px/mlp_projector/hermes_2_yi_34b.pth" \
        --output "$DEMO_DIR/converted" --overwrite
}

# evaluate_demo CHECKPOINT FILE
evaluate_demo() {
    if [[ -f "$2" ]]; then
        say "held-out evaluation of $1: cached in $2"
        return
    fi
    say "evaluating $1 on the held-out split"
    on_this_machine evaluate "${run_words[@]}" --load "$1" --data "$DEMO_DIR/held_out.json" \
        --output "$2.part"
    mv -- "$2.part" "$2"
}

train_demo() {
    local wanted
    wanted="$(printf '%s\n' "$GPUS" "${run_words[@]}" && cat examples/internvl_v1_2/recipe.py)"
    if [[ -f "$OUTPUT_DIR/finished" && "$(<"$OUTPUT_DIR/finished")" == "$wanted" ]]; then
        say "training: finished before, reused from $OUTPUT_DIR (FRESH=1 trains again)"
        return
    fi
    say "training in $GPUS processes; log: $OUTPUT_DIR/training_log.txt"
    on_this_machine train "${run_words[@]}"
    printf '%s\n' "$wanted" >"$OUTPUT_DIR/finished"
}

export_demo() {
    if [[ -d "$1" ]]; then
        say "HuggingFace folder: cached in $1"
        return
    fi
    say "exporting to HuggingFace"
    await python tools/checkpoint_convert/megatron_to_hf.py --load "$OUTPUT_DIR/checkpoints" --output "$1"
}

run_demo() {
    local device=cpu latest before after
    if ((gpus_here > 0)); then device=cuda; fi
    # One thread each: the processes already fill the cores.
    export OMP_NUM_THREADS=1
    DEMO_DIR="${DEMO_DIR:-work_dirs/demo_cache}"
    start_afresh
    await python -m examples.internvl_v1_2.demo.world --output "$DEMO_DIR" >&2
    check_demo_world
    convert_demo
    make_run_words "$device" \
        --set "data.meta=$DEMO_DIR/internvl_1_2_finetune.json" \
        --set "data.cache_dir=$DEMO_DIR/data_cache" \
        --set "eval_meta=$DEMO_DIR/held_out.json" \
        --set "checkpoint.load=$DEMO_DIR/converted"
    before="$OUTPUT_DIR/evaluation_before.json"
    evaluate_demo "$DEMO_DIR/converted" "$before"
    train_demo
    latest=$(<"$OUTPUT_DIR/checkpoints/latest")
    after="$OUTPUT_DIR/evaluation_$latest.json"
    evaluate_demo "$OUTPUT_DIR/checkpoints" "$after"
    export_demo "$OUTPUT_DIR/hf/$latest"
    await python -m examples.internvl_v1_2.demo.report --world "$DEMO_DIR" --run "$OUTPUT_DIR" \
        --before "$before" --after "$after" --checkpoint "$OUTPUT_DIR/checkpoints/$latest" \
        --hf "$OUTPUT_DIR/hf/$latest" --wall-seconds "$SECONDS"
}

# ---------------------------------------------------------------------------------------------
# The full recipe

check_full_inputs() {
    local needed="name the published weights, or a converted checkpoint as LOAD (--help says more)"
    LOAD="${LOAD:-work_dirs/internvl_chat_v1_2_converted}"
    META="${META:-examples/internvl_v1_2/data/internvl_1_2_finetune.json}"
    if [[ ! -f "$LOAD/latest" ]]; then
        [[ -n "${VISION_MODEL:-}" ]] || fail "VISION_MODEL is not set: $needed"
        [[ -n "${LLM:-}" ]] || fail "LLM is not set: $needed"
        PROJECTOR="${PROJECTOR:-$VISION_MODEL/mlp_projector/hermes_2_yi_34b.pth}"
        require_folder VISION_MODEL "$VISION_MODEL"
        require_folder LLM "$LLM"
        require_file PROJECTOR "$PROJECTOR"
        export VISION_MODEL LLM PROJECTOR
    fi
    require_file META "$META"
    if [[ "$META" == examples/internvl_v1_2/data/internvl_1_2_finetune.json ]]; then
        require_folder META playground \
            "lay the published playground/ (or a link to it) into the repository, or set META"
    fi
}

convert_full() {
    [[ ! -f "$LOAD/latest" ]] || return 0
    say "converting the HuggingFace parts into $LOAD (once)"
    await python tools/checkpoint_convert/hf_to_megatron.py --vision "$VISION_MODEL" --llm "$LLM" \
        --projector "$PROJECTOR" --output "$LOAD" --dtype bf16 --overwrite
}

make_full_words() {
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
    # Lets communication start in the order of the kernels, as megatron-core asks for with TP.
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
    make_run_words cuda --set "data.meta=$META" --set "checkpoint.load=$LOAD"
}

run_machine() {
    start_afresh
    mkdir -p -- "$OUTPUT_DIR"
    convert_full
    make_full_words
    on_this_machine train "${run_words[@]}"
    say "checkpoints: $OUTPUT_DIR/checkpoints; log: $OUTPUT_DIR/training_log.txt"
}

# on_nodes NODES PHASE: this script on so many nodes, one task each; to be run by await, whose child
# it becomes. srun hands signals on to its tasks.
on_nodes() {
    local words=(--nodes="$1" --ntasks="$1" --ntasks-per-node=1 --kill-on-bad-exit=1)
    words+=(--cpus-per-task="${CPUS_PER_TASK:-$((10 * GPUS_PER_NODE))}" --export=ALL)
    if [[ -n "${SLURM_JOB_ID:-}" ]]; then
        words+=(--overlap)
    else
        words+=(--job-name=internvl_v1_2 --gres="gpu:$GPUS_PER_NODE")
        words+=(--partition="$PARTITION")
    fi
    local more=()
    read -r -d '' -a more <<<"${SRUN_ARGS:-}" || true # split into words, nothing else
    exec srun "${words[@]}" ${more[@]+"${more[@]}"} bash "$script" "--phase=$2" \
        ${overrides[@]+"${overrides[@]}"}
}

run_slurm() {
    command -v srun >/dev/null || fail "PARTITION or a Slurm job is set, but there is no srun here"
    local nodes=$((GPUS / GPUS_PER_NODE))
    local granted="${SLURM_JOB_NUM_NODES:-$nodes}"
    ((granted >= nodes)) ||
        fail "GPUS=$GPUS / GPUS_PER_NODE=$GPUS_PER_NODE needs $nodes nodes, the job has $granted"
    ((nodes == 1)) || [[ "${MAX_RESTARTS:-0}" == 0 ]] ||
        fail "MAX_RESTARTS=$MAX_RESTARTS works on one machine, this is $nodes nodes; unset it:" \
            "with REQUEUE=1 Slurm starts the job again"
    start_afresh
    mkdir -p -- "$OUTPUT_DIR"
    saved_before=$(newest_saved "$OUTPUT_DIR")
    export GPUS GPUS_PER_NODE TP PP BATCH_SIZE PER_DEVICE_BATCH_SIZE OUTPUT_DIR RECIPE LOAD META
    export FRESH=0
    export STOP_SECONDS="${STOP_SECONDS:-280}"
    local status=0
    [[ -f "$LOAD/latest" ]] || await on_nodes 1 convert || end_of_training "$OUTPUT_DIR" $?
    rm -f -- "$OUTPUT_DIR/stopped.json"
    logged "$OUTPUT_DIR/training_log.txt" -- on_nodes "$nodes" node || status=$?
    end_of_training "$OUTPUT_DIR" "$status"
}

# One of these runs on each node; together they are one torch.distributed job.
run_node() {
    local hosts first
    hosts=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}")
    first="${hosts%%$'\n'*}"
    make_full_words
    exec python -m torch.distributed.run "${torchrun_words[@]}" --nnodes "${SLURM_STEP_NUM_NODES:-$SLURM_NNODES}" \
        --node-rank "$SLURM_NODEID" --nproc-per-node "$GPUS_PER_NODE" --master-addr "$first" \
        --master-port "${MASTER_PORT:-34229}" -m mmlm train "${run_words[@]}"
}

# ---------------------------------------------------------------------------------------------

main() {
    cd "$(dirname "${BASH_SOURCE[0]}")/../.."
    script=examples/internvl_v1_2/pretrain.sh
    # shellcheck source=examples/internvl_v1_2/launch.sh
    source examples/internvl_v1_2/launch.sh
    read_arguments "$@"
    user_tp="${TP:-}" user_pp="${PP:-}"
    if [[ "$phase" == start ]]; then choose_mode; else mode=slurm gpus_here=0; fi
    read_settings
    check_settings
    if [[ "$mode" != demo ]]; then check_full_inputs; fi
    say "$mode: TP $TP x PP $PP x DP $((GPUS / TP / PP)), $BATCH_SIZE samples a global batch"
    if [[ "$phase" == start ]]; then listen_for_signals; fi
    if [[ "$mode" == slurm && "$phase" == start ]]; then
        run_slurm # the nodes make the environment, the host that calls srun needs none
        return
    fi
    # shellcheck source=tools/environment.sh
    source tools/environment.sh
    case "$mode/$phase" in
    demo/*) run_demo ;;
    machine/*) run_machine ;;
    */convert) convert_full ;;
    */node) run_node ;;
    esac
}

# One line, so that editing this file does not disturb a run.
main "$@"; exit
