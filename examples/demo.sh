#!/usr/bin/env bash
# Train, export and sample a MeSH model from text. After an interruption, run it again: it continues.
# usage: examples/demo.sh [TEXT]    TEXT: a file or folder of text; default the Python standard library's .py files
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${DEMO_DIR:-demo}
mkdir -p "$OUT"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export CUDA_VISIBLE_DEVICES=  # two processes on the CPU, even if there is a GPU

step() { printf '\n== %s\n' "$*"; }

TEXT=${1:-$(python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')}

step "1/7 corpus from $TEXT"
[ -e "$OUT/corpus.jsonl" ] || python examples/make_corpus.py "$TEXT" --output "$OUT/corpus.jsonl"

step "2/7 tokenizer"
[ -e "$OUT/tokenizer.model" ] || python tools/train_tokenizer.py --input "$OUT/corpus.jsonl" --model-type bpe \
  --vocab-size 4096 --byte-fallback --input-sentence-size 200000 --output "$OUT/tokenizer"

step "3/7 tokens"
[ -e "$OUT/corpus_text_document.idx" ] || python tools/preprocess_data.py --input "$OUT/corpus.jsonl" \
  --output-prefix "$OUT/corpus" --tokenizer-type SentencePieceTokenizer --tokenizer-model "$OUT/tokenizer.model" \
  --append-eod --workers 2

step "4/7 training"
torchrun --nproc-per-node 2 pretrain_mesh.py --config examples/cpu_demo.yaml --data-path "$OUT/corpus_text_document" \
  --split 96,3,1 --tokenizer-type SentencePieceTokenizer --tokenizer-model "$OUT/tokenizer.model" --save "$OUT/run"

step "5/7 export and sample"
python tools/export_hf.py --load "$OUT/run" --output "$OUT/hf" --force
python examples/sample.py "$OUT/hf" --prompt "def main("

step "6/7 figure"
python tools/plot_metrics.py "$OUT/run/metrics.jsonl" --output "$OUT/loss.png"

step "7/7 probes"
python tools/probe.py --load "$OUT/hf" --names mesh --data-path "$OUT/corpus_text_document" --samples 16 \
  --output "$OUT/probes" --force

cat <<EOF

Done. Results:
  $OUT/run          checkpoints, metrics.jsonl, TensorBoard (tensorboard --logdir $OUT/run/tensorboard)
  $OUT/hf           the model for transformers: AutoModelForCausalLM.from_pretrained("$OUT/hf", trust_remote_code=True)
  $OUT/loss.png     training and validation loss
  $OUT/probes       figures of its hidden states and routers (docs/probes.md)
Try next:
  make demo TEXT=path/to/your/text DEMO_DIR=mine
  python tools/generate.py --help
  torchrun --nproc-per-node 2 pretrain_mesh.py --config examples/cpu_demo.yaml --help
EOF
