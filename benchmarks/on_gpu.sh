#!/usr/bin/env bash
# What only a GPU can show: the tests that need one, then the measurements of docs/performance.md.
# usage: benchmarks/on_gpu.sh FOLDER SECONDS [STEP...]    FOLDER: for results and logs; STEP: names of the table below
# The most telling steps come first. Each is cut to the time that is left, or left out; each may fail alone. Results are
# written as they come. The exit code says whether every step that ran has passed.
set -uo pipefail
SECONDS=0 # make hands on its variable of this name
cd "$(dirname "$0")/.."
FOLDER=${1:?a folder for the results}
BUDGET=${2:?seconds}
shift 2
WANTED=" $* "
PYTHON=${PYTHON:-python3}
mkdir -p "$FOLDER"
FAILED=()

left() { echo $((BUDGET - SECONDS)); }
say() { printf '%s\n' "$*" | tee -a "$FOLDER/summary.txt"; }
wanted() { [[ $WANTED == "  " || $WANTED == *" $1 "* ]]; }

step() { # NAME LEAST MOST COMMAND...: LEAST seconds must be left, MOST are given
  local name=$1 least=$2 most=$3 began=$SECONDS code
  shift 3
  wanted "$name" || return 0
  if (($(left) < least)); then
    say "$name: left out, $(left) s left"
    return 0
  fi
  (($(left) < most)) && most=$(left)
  printf '\n== %s (at most %s s)\n' "$name" "$most"
  timeout -k 5 "$most" "$@" >"$FOLDER/$name.log" 2>&1
  code=$?
  tail -n 25 "$FOLDER/$name.log" | cut -c1-180
  [[ $code == 0 ]] || FAILED+=("$name")
  say "$name: exit code $code after $((SECONDS - began)) s"
}

benchmark() { # NAME LEAST MOST SCRIPT ARGUMENTS...
  step "$1" "$2" "$3" env ${ALLOCATOR:+PYTORCH_CUDA_ALLOC_CONF=$ALLOCATOR} \
    "$PYTHON" "benchmarks/$4.py" --json "$FOLDER/$1.json" "${@:5}"
}

traced() { # a profile of two steps of the trainer
  local run code
  run=$(mktemp -d)
  "$PYTHON" pretrain_mesh.py --preset pythia-410m --bf16 --mock-data --tokenizer-type NullTokenizer --vocab-size 50254 \
    --micro-batch-size 4 --global-batch-size 8 --train-iters 12 --log-interval 1 --eval-iters 0 --save "$run" \
    --no-save-optim --profile --profile-step-start 8 --profile-step-end 10 &&
    gzip --stdout "$run/profile/rank0.json" >"$FOLDER/trace.json.gz" &&
    cp "$run/metrics.jsonl" "$FOLDER/trace_metrics.jsonl"
  code=$?
  rm -rf "$run"
  return $code
}
export -f traced
export FOLDER PYTHON GPU_TESTS=1 OMP_NUM_THREADS=2 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# ---- the gate: what of Transformer Engine works here -----------------------------------------------------------------
timeout 120 "$PYTHON" benchmarks/gpu_gate.py >"$FOLDER/gate.log" 2>&1
GATE=$?
cat "$FOLDER/gate.log"
[[ $GATE == 9 ]] && exit 2
if [[ $GATE != 0 && $GATE != 2 ]]; then # the kernels that it compiles at run time are the first suspects
  export NVTE_DISABLE_NVRTC=1
  timeout 60 "$PYTHON" benchmarks/gpu_gate.py >"$FOLDER/gate_without_nvrtc.log" 2>&1
  GATE=$?
fi
ENGINE=yes
if [[ $GATE != 0 && $GATE != 2 ]]; then
  ENGINE=
  unset NVTE_DISABLE_NVRTC
  HIDDEN=$(mktemp -d) # where it is installed and does not work, it must not import
  trap 'rm -rf "$HIDDEN"' EXIT
  echo 'raise ModuleNotFoundError("does not work on this machine", name="transformer_engine")' >"$HIDDEN/transformer_engine.py"
  PYTHONPATH=$HIDDEN:$PYTHONPATH
fi
say "Transformer Engine: ${ENGINE:-no, the layers are those of torch}${NVTE_DISABLE_NVRTC:+ (without NVRTC)}; after $SECONDS s"
ALLOCATOR=expandable_segments:True
PYTORCH_CUDA_ALLOC_CONF=$ALLOCATOR "$PYTHON" -c 'import torch; torch.zeros(1 << 28, device="cuda").sum().item()' \
  >/dev/null 2>&1 || ALLOCATOR=

# ---- in the order of what they tell ----------------------------------------------------------------------------------
# Compiling takes most of the tests' time, and a core at a time.
WORKERS=$("$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n $(nproc | awk '{print ($1 > 12) ? 8 : 6}')")
CHOSEN="not models_loss and not hopper"
[[ -n $ENGINE ]] || CHOSEN+=" and not transformer_engine and not fp8 and not all_loops_add"
M410=(--preset pythia-410m --micro-batch-size 4) M14=(--preset pythia-1.4b --micro-batch-size 2)
K8=(--hidden-size 1024 --num-attention-heads 16 --seq-length 4096 --padded-vocab-size 52352 --micro-batch-size 4)

benchmark end-to-end-410m 35 100 end_to_end "${M410[@]}" --bf16 --matrix-size 8192
step trace 35 90 bash -c traced
# shellcheck disable=SC2086
step tests-of-kernels 40 170 "$PYTHON" -m pytest -q $WORKERS tests/unit/model/test_memory_triton.py \
  tests/unit/model/test_cross_entropy.py tests/unit/model/test_rotary.py tests/unit/model/test_fp8.py \
  -k "$CHOSEN"
# shellcheck disable=SC2086
step tests-of-training 60 240 "$PYTHON" -m pytest -q $WORKERS -m gpu tests/distributed/test_on_gpu.py -k "$CHOSEN"
benchmark recurrence-410m 45 130 recurrence "${M410[@]}" --bf16 --loops 2 --schemes base residual anchor mesh \
  --no-slot-sweep --rounds 15
[[ -n $ENGINE ]] && benchmark fp8-410m 50 130 fp8 "${M410[@]}" --steps 60
benchmark end-to-end-1.4b 45 110 end_to_end "${M14[@]}" --bf16 --matrix-size 8192
benchmark recurrence-1.4b 60 130 recurrence "${M14[@]}" --bf16 --loops 2 --schemes base mesh --no-slot-sweep --rounds 9
benchmark loss 25 60 loss --tokens 16384 --hidden-size 1024 --padded-vocab-size 52352 --chunks 2048 4096 8192 --bf16
[[ -n $ENGINE ]] && benchmark fp8-1.4b 60 150 fp8 "${M14[@]}" --steps 40 --recipes tensorwise
benchmark recurrence-k8 60 130 recurrence "${K8[@]}" --bf16

printf '\n== summary after %s s\n' "$SECONDS"
cat "$FOLDER/summary.txt"
printf 'failed: %s\n' "${FAILED[*]:-none}"
[[ ${#FAILED[@]} == 0 ]]
