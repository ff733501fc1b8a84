#!/usr/bin/env bash
# All that only a GPU can show, one after the other: the tests, then the measurements that docs/performance.md wants.
# usage: benchmarks/on_gpu.sh FOLDER [STEP...]    FOLDER: where results and logs go; STEP: some of the names below
# Every step has its minutes and may fail without keeping the next one back; the exit code says whether all passed.
# Made for 80 GB. The limits of all steps come to 27 minutes; the most telling come first.
set -uo pipefail
cd "$(dirname "$0")/.."
FOLDER=${1:?a folder for the results}
shift
WANTED=" $* "
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "$0: torch finds no GPU" >&2; exit 2; }
mkdir -p "$FOLDER"
export GPU_TESTS=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
FAILED=()

step() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 began=$SECONDS code
  shift 2
  [[ $WANTED == "  " || $WANTED == *" $name "* ]] || return 0
  printf '\n== %s (at most %s s)\n' "$name" "$limit"
  timeout "$limit" "$@" 2>&1 | tee "$FOLDER/$name.log" | tail -n 40
  code=${PIPESTATUS[0]}
  [[ $code == 0 ]] || FAILED+=("$name")
  printf -- '-- %s: exit code %s after %s s\n' "$name" "$code" "$((SECONDS - began))"
}

full() { # BENCHMARK PRESET FLAGS...: at the size that the bars are about
  local name=$1 preset=$2
  shift 2
  [[ " $* " == *" --micro-batch-size "* ]] || set -- --micro-batch-size 4 "$@"
  "$PYTHON" "benchmarks/$name.py" --preset "$preset" --json "$FOLDER/${name}_$preset.json" "$@"
}

traced() { # a profile of two steps of the trainer, without the checkpoint that it ends with
  local run
  run=$(mktemp -d)
  "$PYTHON" pretrain_mesh.py --preset pythia-410m --bf16 --mock-data --tokenizer-type NullTokenizer --vocab-size 50254 \
    --micro-batch-size 4 --global-batch-size 8 --train-iters 12 --log-interval 1 --eval-iters 0 --save "$run" \
    --no-save-optim --profile --profile-step-start 8 --profile-step-end 10 &&
    gzip --stdout "$run/profile/rank0.json" >"$FOLDER/trace.json.gz" &&
    cp "$run/metrics.jsonl" "$FOLDER/trace_metrics.jsonl"
  local code=$?
  rm -rf "$run"
  return $code
}
export -f full traced
export FOLDER PYTHON

benchmark() { # NAME SECONDS ARGUMENTS OF full...
  step "$1" "$2" bash -c 'full "$@"' full "${@:3}"
}

export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

step surroundings 60 "$PYTHON" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name(), torch.version.cuda)'
# Compiling takes most of the first step's time, and a core at a time.
WORKERS=$("$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n 8")
# shellcheck disable=SC2086
step tests-of-kernels 180 "$PYTHON" -m pytest -q $WORKERS tests/unit/model/test_memory_kernel.py tests/unit/model/test_fp8.py \
  tests/unit/model/test_cross_entropy.py -k "not models_loss"
step tests-of-training 240 "$PYTHON" -m pytest -q -m gpu tests/distributed
benchmark recurrence-410m 90 recurrence pythia-410m --bf16 --loops 2 --schemes base residual anchor mesh --rounds 15
benchmark recurrence-1.4b 90 recurrence pythia-1.4b --bf16 --loops 2 --schemes base mesh --no-slot-sweep --rounds 15
benchmark end-to-end-410m 90 end_to_end pythia-410m --bf16 --matrix-size 8192
benchmark end-to-end-1.4b 120 end_to_end pythia-1.4b --bf16 --matrix-size 8192 --micro-batch-size 2
benchmark fp8-410m 180 fp8 pythia-410m --steps 200
benchmark fp8-1.4b 150 fp8 pythia-1.4b --steps 60 --recipes tensorwise --micro-batch-size 2
step recurrence-k8 120 "$PYTHON" benchmarks/recurrence.py --hidden-size 1024 --num-attention-heads 16 --seq-length 4096 \
  --padded-vocab-size 52352 --micro-batch-size 4 --bf16 --json "$FOLDER/recurrence_k8.json"
step loss 90 "$PYTHON" benchmarks/loss.py --tokens 16384 --hidden-size 1024 --padded-vocab-size 52352 \
  --chunks 2048 4096 8192 --bf16 --json "$FOLDER/loss.json"
step trace 180 bash -c 'traced'

printf '\n== failed: %s\n' "${FAILED[*]:-none}"
[[ ${#FAILED[@]} == 0 ]]
