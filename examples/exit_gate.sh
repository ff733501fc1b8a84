#!/usr/bin/env bash
# Train a model with an exit gate, then the gate alone, export it, and see how many loops tokens run at each threshold.
# usage: examples/exit_gate.sh [STEPS]    after `make demo`, whose corpus and tokenizer it takes; STEPS per stage, default 200
set -euo pipefail
cd "$(dirname "$0")/.."
STEPS=${1:-200}
OUT=${DEMO_DIR:-demo}
[ -e "$OUT/corpus_text_document.idx" ] || { echo "$OUT has no corpus: run make demo first" >&2; exit 2; }
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export CUDA_VISIBLE_DEVICES=  # two processes on the CPU, even if there is a GPU
MODEL=(--config examples/cpu_demo.yaml --layout 2+2R4+0 --exit-gate --data-path "$OUT/corpus_text_document"
  --split 96,3,1 --tokenizer-type SentencePieceTokenizer --tokenizer-model "$OUT/tokenizer.model" --train-iters "$STEPS")

step() { printf '\n== %s\n' "$*"; }

step "1/4 model and gate"
torchrun --nproc-per-node 2 pretrain_mesh.py "${MODEL[@]}" --exit-entropy-coeff 0.05 --save "$OUT/exits"

step "2/4 the gate alone"
torchrun --nproc-per-node 2 pretrain_mesh.py "${MODEL[@]}" --exit-gate-only --finetune --load "$OUT/exits" \
  --save "$OUT/exits-gate"

step "3/4 export and probe"
python tools/export_hf.py --load "$OUT/exits-gate" --output "$OUT/exits-hf" --force
python tools/probe.py --load "$OUT/exits-hf" --names gate --data-path "$OUT/corpus_text_document" --samples 16 \
  --exit-criterion gate --exit-thresholds 0.3 0.5 0.7 0.9 1.0 --output "$OUT/exits-probes" --force

step "4/4 text"
python tools/generate.py --load "$OUT/exits-hf" --prompt "def main(" --max-new-tokens 32 --seed 1 \
  --exit-criterion gate --exit-threshold 0.7
