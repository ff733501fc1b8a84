"""Flags of Megatron-LM that are no settings here: those with another name, those without effect, those refused.

The flags that are settings here have the same name and meaning as there. ``megatron_flags.py`` reads these tables, and
docs/megatron.md shows them.
"""

from __future__ import annotations

RENAMED: dict[str, tuple[str, ...]] = {
    "--recompute-activations": ("--recompute-granularity", "selective"),
    "--moe-layer-recompute": ("--recompute-granularity", "selective", "--recompute-modules", "moe"),
    "--no-overlap-p2p-communication": ("--no-overlap-p2p",),
    "--persistent-save-interval": ("--save-interval",),
    "--skip-train": ("--eval-only",),
    "--verify-integrity": ("--verify-checkpoint", "hash"),
}
"""Flag -> the words that replace it; a value that follows it stays."""

ANY = "..."
FASTER_THERE = "a matter of "
"""Beginning of the reasons in ``ACCEPTED`` of flags that only save time or memory there; a run names them."""
_ALL_TO_ALL = "a matter of speed: tokens travel to experts by NCCL's all-to-all"
_NO_OVERLAP = "a matter of speed: this overlap is not used"
_TENSOR_PARALLEL_OVERLAPS = ("bulk-dgrad", "bulk-wgrad", "overlap-ag", "overlap-rs", "split-ag", "split-rs")
_DEFAULT_GROUPS = "a matter of speed: process groups are Megatron-Core's default ones; NCCL's environment variables act"
ACCEPTED: dict[str, tuple[str, str]] = {
    # model
    "--use-mcore-models": ("", "layers are always Megatron-Core's"),
    "--position-embedding-type": ("rope", "positions are always rotary"),
    "--rope-type": ("rope", "positions are always rotary"),
    "--use-rotary-position-embeddings": ("", "positions are always rotary"),
    "--no-position-embedding": ("", "there is no table of positions: they are always rotary"),
    "--apply-layernorm-1p": (
        "",
        "training is the same: a norm's weight w is stored instead of w - 1, and norms have no weight decay",
    ),
    "--attention-softmax-in-fp32": ("", "softmax is always in float32"),
    "--softmax-type": ("vanilla", "softmax has no extra term"),
    "--glu-linear-offset": ("0", "the gate has no offset"),
    "--use-flash-attn": ("", "attention never stores its scores; --attention-backend chooses the kernel"),
    "--cross-entropy-loss-fusion": ("", "--loss-kernel is fused where it can run"),
    "--cross-entropy-fusion-impl": ("native te", "--loss-kernel is fused where it can run"),
    "--no-masked-softmax-fusion": ("", "this fusion is not used: scores are not stored"),
    "--no-bias-gelu-fusion": ("", "this fusion is not used: GELU is exact"),
    "--no-bias-swiglu-fusion": ("", "this fusion is not used"),
    "--no-bias-dropout-fusion": ("", "this fusion is not used: masks of dropout are hashes"),
    "--no-persist-layer-norm": ("", "this kernel is not used"),
    "--no-gradient-accumulation-fusion": ("", "weight gradients add up in float32 with and without the fusion"),
    "--disable-jit-fuser": ("", "a matter of speed: results agree within rounding"),
    "--use-cpu-initialization": ("", "weights are always drawn on the CPU, equal under any layout of ranks"),
    "--init-model-with-meta-device": ("", "each rank only makes its own part of the model"),
    "--no-clone-scatter-output-in-embedding": ("", "a matter of memory"),
    # experts
    "--moe-grouped-gemm": ("", "Transformer Engine's layers always group; local ones compute experts one by one"),
    "--moe-token-dispatcher-type": ("alltoall allgather flex", "tokens always travel by all-to-all: equal results"),
    "--moe-router-dtype": ("fp32", "the router always computes in float32"),
    "--moe-layer-freq": ("1", "every layer of the core has experts, none of prelude and coda"),
    "--moe-shared-expert-overlap": ("", "a matter of speed: results are the same"),
    "--moe-permute-fusion": ("", "a matter of speed: results are the same"),
    "--moe-router-fusion": ("", "a matter of speed: results agree within rounding"),
    "--moe-enable-deepep": ("", _ALL_TO_ALL),
    "--moe-flex-dispatcher-backend": (ANY, _ALL_TO_ALL),
    "--moe-flex-dispatcher-num-sms": (ANY, _ALL_TO_ALL),
    "--moe-deepep-num-sms": (ANY, _ALL_TO_ALL),
    "--moe-hybridep-num-sms": (ANY, _ALL_TO_ALL),
    "--overlap-moe-expert-parallel-comm": ("", _ALL_TO_ALL),
    "--moe-per-layer-logging": ("", "metrics.jsonl has the mean over layers and loops"),
    # precision
    "--accumulate-allreduce-grads-in-fp32": ("", "gradients always add up and are reduced in float32"),
    "--hysteresis": ("2", "the loss scale falls at the second overflow in a row"),
    "--fp8-param-gather": ("", "weights are gathered in bfloat16: more traffic, the same products"),
    "--keep-fp8-transpose-cache": ("", "weights are gathered in bfloat16"),
    "--fp8-interval": ("1", "scales are always updated in every step"),
    "--main-grads-dtype": ("fp32", "gradients are always float32"),
    "--main-params-dtype": ("fp32", "main weights are always float32"),
    "--exp-avg-dtype": ("fp32", "moments are always float32"),
    "--exp-avg-sq-dtype": ("fp32", "moments are always float32"),
    # training
    "--muon-tp-mode": ("duplicated distributed", "ranks gather matrices and orthogonalise them completely"),
    "--muon-scalar-optimizer": ("adam", "it is always AdamW"),
    "--muon-use-syrk": ("", "a matter of speed: results agree within rounding"),
    "--calculate-per-token-loss": ("", "a step's loss is always divided by its number of tokens"),
    "--no-check-for-nan-in-loss-and-grad": ("", "steps with NaN are skipped; --max-bad-steps 0 never stops for them"),
    "--override-opt-param-scheduler": ("", "learning rates always follow the flags, not the checkpoint"),
    "--empty-unused-memory-level": ("0 1 2", "torch's allocator keeps its memory"),
    "--exit-signal-handler": ("", "SIGTERM, SIGINT and SIGUSR1 always stop a run with a checkpoint"),
    "--exit-signal-handler-for-training": ("", "SIGTERM, SIGINT and SIGUSR1 always stop a run with a checkpoint"),
    "--exit-signal-handler-for-dataloader": ("", "data workers ignore signals and end with their rank"),
    "--exit-signal": ("2 10 15", "SIGTERM, SIGINT and SIGUSR1 always stop a run with a checkpoint"),
    "--no-manual-gc-eval": ("", "evaluations do not collect garbage"),
    "--te-rng-tracker": ("", "no step reads a random state"),
    "--enable-experimental": ("", "no experimental feature of Megatron-Core is used"),
    # parallelism
    "--local-rank": (ANY, "torchrun's environment says it"),
    "--disable-gloo-process-groups": ("", "a run on GPUs makes no gloo groups"),
    "--pipeline-model-parallel-comm-backend": (ANY, "it is that of --distributed-backend"),
    "--cp-comm-type": ("p2p all_gather", "--attention-backend decides it; results are the same"),
    "--no-align-grad-reduce": ("", "a matter of speed"),
    "--no-align-param-gather": ("", "a matter of speed"),
    "--ddp-average-in-collective": ("", "gradients are summed, and divided once by the step's tokens: the same mean"),
    "--no-gradient-reduce-div-fusion": ("", "gradients are summed, and divided once by the step's tokens"),
    "--ddp-num-buckets": (ANY, "a matter of speed; --ddp-bucket-size sets it"),
    "--ddp-pad-buckets-for-high-nccl-busbw": ("", "a matter of speed"),
    **dict.fromkeys(("--tp-comm-overlap", "--tp-comm-overlap-rs-dgrad"), ("", _NO_OVERLAP)),
    **dict.fromkeys(("--tp-comm-overlap-cfg", "--tp-comm-bootstrap-backend"), (ANY, _NO_OVERLAP)),
    **{f"--no-tp-comm-{part}": ("", _NO_OVERLAP) for part in _TENSOR_PARALLEL_OVERLAPS},
    **dict.fromkeys(("--delay-wgrad-compute", "--defer-embedding-wgrad-compute"), ("", _NO_OVERLAP)),
    "--wgrad-deferral-limit": (ANY, _NO_OVERLAP),
    "--overlap-p2p-communication-warmup-flush": ("", _NO_OVERLAP),
    "--use-ring-exchange-p2p": ("", "a matter of speed: the ring sends and receives with NCCL"),
    "--use-sharp": ("", _DEFAULT_GROUPS),
    "--sharp-enabled-group": (ANY, _DEFAULT_GROUPS),
    "--high-priority-stream-groups": (ANY, _DEFAULT_GROUPS),
    "--nccl-communicator-config-path": (ANY, _DEFAULT_GROUPS),
    "--megatron-fsdp-version": ("1", "see --use-megatron-fsdp"),
    # data
    "--dataloader-type": ("single", "each sample is read once, in the order of the index"),
    "--no-mmap-bin-files": ("", "a matter of speed"),
    "--dataloader-fast-cache-load": ("", "a matter of speed"),
    "--dataloader-defer-npy-index-mmap": ("", "a matter of speed"),
    "--no-create-attention-mask-in-dataloader": ("", "masks are only made for --reset-attention-mask"),
    "--vocab-extra-ids": ("0", "tokenizers get no extra ids"),
    "--null-tokenizer-pad-id": ("-1", "there is no padding"),
    "--use-gigatoken": ("", "it is used by default, where it is proved to give the same ids"),
    "--disable-msc": ("", "storage is always a file system"),
    # checkpoints
    "--ckpt-format": ("torch_dist", "it is always torch_dist"),
    "--dist-ckpt-format": ("torch_dist", "it is always torch_dist"),
    "--use-dist-ckpt": ("", "checkpoints are always torch_dist"),
    "--auto-detect-ckpt-format": ("", "checkpoints are always torch_dist"),
    "--dist-ckpt-strictness": (ANY, "weights that are missing or left over are always an error"),
    "--dist-ckpt-workers": (ANY, "a matter of speed"),
    "--ckpt-fully-parallel-save": ("", "every data-parallel rank always writes its share"),
    "--no-ckpt-fully-parallel-save": ("", "every data-parallel rank writes its share; checkpoints are the same"),
    "--ckpt-fully-parallel-load": ("", "a matter of speed"),
    "--ckpt-fully-parallel-load-exchange-algo": (ANY, "a matter of speed"),
    "--ckpt-assume-constant-structure": ("", "a matter of speed"),
    "--async-strategy": (ANY, "one process writes for each rank"),
    "--use-persistent-ckpt-worker": ("", "one process writes for each rank and checkpoint"),
    "--no-use-tokenizer-model-from-checkpoint-args": ("", "settings never come from a checkpoint"),
    "--no-save-tokenizer-assets": ("", "checkpoints hold no tokenizer; exports do"),
    # logging
    "--log-throughput": ("", "always logged"),
    "--log-progress": ("", "metrics.jsonl and heartbeat.json always have it"),
    "--no-barrier-with-level-1-timing": ("", "no barriers are used for timing"),
    "--log-memory-to-tensorboard": ("", "peak memory is always logged on GPUs"),
    "--log-device-memory-used": ("", "peak memory is always logged on GPUs"),
    "--no-log-loss-scale-to-tensorboard": ("", "one number more"),
    "--log-world-size-to-tensorboard": ("", "the settings at the head of the log have it"),
    "--tensorboard-log-interval": (ANY, "a point comes every --log-interval steps; metrics.jsonl has every step"),
    "--tensorboard-queue-size": (ANY, "points are written at once"),
    "--log-straggler": ("", "--outlier-factor reports slow ranks by default"),
    "--use-pytorch-profiler": ("", "--profile always uses torch's profiler"),
    "--nvtx-ranges": ("", "cycles and head always have names in a profile"),
    "--no-one-logger": ("", "nothing is sent anywhere unless you name it"),
}
"""Flag -> its values (none, the ones accepted, or ANY) and why it changes nothing."""

_MODEL = "the model is a GPT with rotary positions and causal attention"
_EXPERTS = "experts are plain feed-forward layers in the core, chosen by their router alone"
REFUSED: tuple[tuple[str, str, str], ...] = (
    # what this is not
    ("--multi-latent-attention --q-lora-rank --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim --v-head-dim"
     " --rotary-scaling-factor --mscale --mscale-all-dim --cache-mla-latents --mla-down-proj-fusion",
     "there is no multi-latent attention", "grouped-query attention: --num-query-groups"),
    ("--mamba-* --disable-mamba-* --hybrid-layer-pattern --hybrid-override-pattern --is-hybrid-model --gdp-*"
     " --linear-* --experimental-attention-variant --dsa-* --no-dsa-* --disable-dsa-*",
     "there are no Mamba, linear or sparse attention layers", "transformer layers"),
    ("--mtp-*", "there is no multi-token prediction", "nothing: drop the flag"),
    ("--num-classes --img-* --num-channels --patch-dim --classes-fraction --data-per-class-fraction --no-data-sharding"
     " --head-lr-mult --vision-* --swin-* --mask-type --mask-factor --iter-per-epoch --dino-* --mrope-section",
     "there are no vision models", "Megatron-LM"),
    ("--bert-* --output-bert-embeddings --ict-* --biencoder-* --titles-data-path --query-in-block-prob"
     " --use-one-sent-docs --evidence-data-path --retriever-* --block-data-path --embedding-path --indexer-*"
     " --mask-prob --short-seq-prob --sample-rate --encoder-num-layers --decoder-num-layers"
     " --encoder-seq-length --decoder-seq-length --relative-attention-*",
     "there is one kind of model, a decoder", "--layout and --seq-length"),
    ("--inference-* --no-inference-* --max-tokens-to-oom --use-legacy-static-engine --decode-only-cuda-graphs"
     " --enable-chunked-prefill --num-speculative-tokens --use-same-sampling-seed-across-dp-ranks --flash-decode"
     " --mlp-chunks-for-prefill --nccl-all-reduce-for-prefill --symmetric-ar-type"
     " --moe-pad-experts-for-cuda-graph-inference",
     "there is no inference server", "tools/export_hf.py and any server of Hugging Face models, or tools/generate.py"),
    ("--perform-rl-step --rl-* --no-rl-* --grpo-* --langrl-env-config --refit-method",
     "there is no reinforcement learning", "tools/export_hf.py and a library for it"),
    ("--sft --sft-*", "there is no fine-tuning on conversations", "--finetune on plain text, or transformers"),
    ("--logits-save-* --logits-load-*", "there is no distillation", "nothing: drop the flag"),
    ("--export-force-local-attention --enable-gpt-oss",
     "this belongs to NVIDIA's ModelOpt", "tools/import_hf.py and tools/export_hf.py"),
    ("--heterogeneous-* --spec --decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers"
     " --pipeline-model-parallel-layout --num-layers-per-virtual-pipeline-stage"
     " --num-virtual-stages-per-pipeline-rank --account-for-embedding-in-pipeline-split"
     " --account-for-loss-in-pipeline-split --microbatch-group-size-per-virtual-pipeline-stage --mtp-standalone",
     "every rank of the ring holds an equal share of prelude, core and coda, one chunk per loop",
     "--layout and --pipeline-model-parallel-size"),
    # model
    ("--window-size --window-attn-skip-freq --no-rope-freq --attention-output-gate --qk-l2-norm --qk-clip --qk-clip-*"
     " --apply-query-key-layer-scaling --rotary-interleaved --yarn-* --no-yarn-*", _MODEL,
     "--rotary-base and --rotary-percent"),
    ("--openai-gelu --squared-relu --quick-geglu --activation-func-clamp-value --use-te-activation-func"
     " --use-fused-weighted-squared-relu", "feed-forward layers have exact GELU or SwiGLU", "--swiglu"),
    ("--fp32-residual-connection --apply-residual-connection-post-layernorm --fused-residual-rmsnorm"
     " --onnx-safe --enable-mhc-connections --mhc-* --use-mup --mup-* --moe-latent-size",
     _MODEL + "; its layers are GPT-NeoX's or the usual sequential ones",
     "--parallel-residual, --disable-bias-linear and --recurrence"),
    ("--no-initialization --data-parallel-random-init --init-method-xavier-uniform",
     "initial weights are normal, and equal under any layout of ranks", "--init-method-std and --seed"),
    # experts
    ("--moe-shared-expert-gate --moe-shared-expert-glu-* --moe-use-upcycling --moe-upcycling-granularity"
     " --use-grouped-gemm-for-* --moe-router-padding-*"
     " --moe-router-quantile-* --moe-router-force-*"
     " --moe-input-jitter-eps --moe-expert-* --moe-pad-expert-input-to-capacity"
     " --moe-token-drop-policy --moe-apply-probs-on-input --moe-enable-routing-replay --moe-mlp-glu-interleave-size"
     " --moe-shared-expert-glu-interleave-size"
     " --moe-use-grouped-tensor --moe-single-grouped-*", _EXPERTS + ", and no token is dropped",
     "--num-experts, --moe-router-topk and --moe-aux-loss-coeff"),
    ("--moe-hybridep-* --moe-permute-fusion-into-hybridep"
     " --moe-ncclep-* --moe-dispatch-fwd-dtype --moe-combine-bwd-dtype --high-priority-a2a-comm-stream"
     " --overlap-dispatch-backward-with-experts-wgrad --ep-overlap-*",
     "tokens travel to experts by all-to-all", "--moe-token-dispatcher-type alltoall"),
    ("--moe-routing-trace-* --save-tokens-per-expert-interval --log-max-attention-logit --save-params-interval"
     " --save-activations-interval --save-wgrads-interval --save-dgrads-interval --config-logger-dir"
     " --dump-param-to-param-group-map", "these records do not exist here",
     "--probe-interval, or tools/probe.py on a checkpoint"),
    # memory and speed
    ("--distribute-saved-activations --checkpoint-activations --mhc-recompute-layer-num",
     "the inputs of recomputed layers are kept on the rank", "--recompute-granularity and --sequence-parallel"),
    ("--cpu-offloading-* --fine-grained-* --offload-modules --min-offloaded-tensor-size --delay-offload-*"
     " --delta-offload-* --activation-offload-fraction --moe-paged-stash --moe-paged-stash-* --optimizer-cpu-offload"
     " --optimizer-offload-fraction --use-torch-optimizer-for-cpu-offload --overlap-cpu-optimizer-d2h-h2d"
     " --no-pin-cpu-grads --no-pin-cpu-params", "nothing is moved to the CPU's memory",
     "--recompute-granularity and --use-distributed-optimizer"),
    ("--enable-cuda-graph --external-cuda-graph --cuda-graph-* --optimizer-cuda-graph --use-transformer-engine-op-fuser"
     " --flash-attention-version --use-kitchen-attention --kitchen-attention-backend --mlp-chunks-for-training",
     "CUDA graphs and these kernels have not been run with a shared core",
     "--transformer-impl and --attention-backend"),
    ("--batch-invariant-mode --batch-invariant-backend", "kernels are torch's", "--deterministic-mode"),
    # precision
    ("--fp4-* --te-precision-config-file --fp8-quantizer-factory --fp8-output-proj --no-fp8-wgrad --disable-fp8-wgrad"
     " --reuse-grad-buf-for-mxfp8-param-ag --first-last-layers-bf16 --num-layers-at-start-in-bf16"
     " --num-layers-at-end-in-bf16", "FP8 is for all layers or for the core's", "--fp8-format and --fp8-core-only"),
    ("--ddp-reduce-scatter-with-fp32-accumulation --ddp-param-name-patterns-*",
     "gradients add up and are reduced in float32, so that losses do not depend on the layout of ranks",
     "nothing: drop the flag"),
    ("--fp16-lm-cross-entropy --output-logit-dtype",
     "loss, gradients and optimizer are in float32", "nothing: drop the flag"),
    ("--use-precision-aware-optimizer --main-params-dtype --main-grads-dtype --exp-avg-dtype --exp-avg-sq-dtype",
     "only Transformer Engine's FusedAdam keeps optimizer state in less than float32, on a GPU, and checkpoints here"
     " have float32 state",
     "--use-distributed-optimizer or --use-torch-fsdp2 to divide it, --grad-reduce-in-bf16 to halve gradients"),
    # parallelism
    ("--tensor-parallel-num-weight-shards --expert-tensor-parallel-num-weight-shards --gtp-*"
     " --hierarchical-context-parallel-sizes --max-seqlen-per-dp-cp-rank --hybrid-context-parallel"
     " --model-parallel-size", "these ways to split a model do not exist here",
     "--tensor-model-parallel-size, --context-parallel-size and --expert-model-parallel-size"),
    ("--use-megatron-fsdp --data-parallel-sharding-strategy"
     " --outer-dp-sharding-strategy --fsdp-* --no-strict-fsdp-*"
     " --disable-strict-fsdp-* --megatron-fsdp-* --torch-fsdp2-* --use-nccl-ub --disable-symmetric-registration"
     " --create-all-gather-group --enable-full-sharding-in-hsdp"
     " --suggested-communication-unit-size --overlap-param-gather-with-optimizer-step"
     " --no-use-layer-wise-param-layout", "fully sharded data parallelism is torch's",
     "--use-torch-fsdp2 and --num-distributed-optimizer-instances"),
    ("--reset-position-ids", "rotary positions are relative", "--reset-attention-mask alone, which has this effect"),
    ("--use-tp-pp-dp-mapping --lazy-mpu-init --fake-process-group", "process groups are Megatron-Core's default ones",
     "NCCL's environment variables"),
    ("--distributed-timeout-seconds-after-init", "there is one timeout", "--distributed-timeout-minutes"),
    ("--flight-recorder-* --no-flight-recorder-* --disable-flight-recorder-*",
     "the watchdog names the rank that the others wait for", "TORCH_NCCL_* environment variables of torch"),
    # training
    ("--decrease-batch-size-if-needed --batch-size", "every batch must divide over the ranks",
     "--global-batch-size, --rampup-batch-size or --step-batch-size-schedule"),
    ("--warmup", "the warmup has a unit", "--lr-warmup-fraction"),
    ("--use-checkpoint-opt-param-scheduler",
     "learning rates follow the flags, and changes are printed", "the flags of the first start"),
    ("--muon-tp-mode", "orthogonalising every rank's block would make losses depend on the layout of ranks",
     "--muon-tp-mode duplicated"),
    ("--muon-scalar-optimizer --lion-* --soap-* --adaptive-muon-*",
     "optimizers are AdamW, SGD and Muon", "--optimizer adam, sgd or muon"),
    ("--apply-wd-to-qk-layernorm --no-weight-decay-cond-type --freeze-all-layers",
     "all weights are trained, and norms and biases have no weight decay", "--weight-decay"),
    ("--check-for-large-grads --check-for-spiky-loss", "spikes are found by their ratio to recent losses",
     "--loss-spike-factor and --skip-loss-spikes"),
    ("--result-rejected-tracker-filename --gpu-sniff-test-interval --train-sync-interval",
     "faults are found by other checks", "--rerun-mode and --check-weight-hash-across-dp-replicas-interval"),
    ("--fault-injector-*", "faults are injected into losses only", "--error-injection-rate"),
    ("--inprocess-*", "a restart inside surviving processes did not survive the loss of rank 0 when it was tried",
     "tools/launch.py --max-restarts, whose ranks need no imports when they are started again"),
    ("--enable-ft-package --calc-ft-timeouts --ft-num-warmup-iters --adlr-autoresume"
     " --adlr-autoresume-interval", "torchrun restarts failed ranks, and SIGTERM stops a run with a checkpoint",
     "torchrun --max-restarts, and docs/operations.md"),
    ("--full-validation --start-eval-at-iter --eval-global-batch-size --eval-micro-batch-size --test-mode"
     " --validation-set-names", "an evaluation reads --eval-iters global batches from the beginning",
     "--eval-iters, --eval-interval, and NAME=PREFIX in --valid-data-path"),
    # data
    ("--fim-*", "there is no fill-in-the-middle", "nothing: drop the flag"),
    ("--phase-transition-iterations --per-dataset-sequences-path --dataloader-inter-document-masking"
     " --mid-level-dataset-surplus --allow-ambiguous-pad-tokens --object-storage-cache-path --enable-msc",
     "data are .bin/.idx files in one order", "--reset-attention-mask, --data-cache-path and a mounted file system"),
    ("--tokenizer-metadata --tokenizer-special-tokens --tokenizer-sentencepiece-legacy --tokenizer-hf-no-use-fast"
     " --no-tokenizer-sentencepiece-ignore-extra-whitespaces"
     " --disable-tokenizer-sentencepiece-ignore-extra-whitespaces --null-tokenizer-eod-id --chat-template",
     "a tokenizer is used as its file describes it", "--tokenizer-type and --tokenizer-model"),
    ("--trust-remote-code", "no code from a model's files is run", "a tokenizer.json"),
    ("--no-pad-vocab-size --disable-pad-vocab-size", "padding has its own flag", "--make-vocab-size-divisible-by 1"),
    # checkpoints
    ("--use-checkpoint-args --use-mp-args-from-checkpoint-args", "settings come from flags, YAML and presets only",
     "the flags in the checkpoint's run_config.json"),
    ("--pretrained-checkpoint --load-main-params-from-ckpt", "weights come from --load", "--load with --finetune"),
    ("--override-ckpt-iteration", "the iteration belongs to the state", "--ckpt-step"),
    ("--non-persistent-* --replication --replication-jump --replication-factor --ckpt-convert-*",
     "there is one kind of checkpoint", "--save-interval, --async-save and --keep-last"),
    ("--async-ckpt-* --ckpt-fully-parallel-load-per-rank-objects --ckpt-fully-parallel-save-process-group"
     " --ckpt-fully-parallel-load-process-group --ckpt-pg-tensors-cache-* --ckpt-drop-redundant-extra-state"
     " --no-ckpt-load-validate-sharding-integrity --dist-ckpt-save-pre-mcore-014 --dist-ckpt-optim-fully-reshardable"
     " --distrib-optim-fully-reshardable-mem-efficient --disable-ckpt-load-validate-sharding-integrity",
     "checkpoints load under any layout of ranks, and are always validated", "--async-save"),
    # logging
    ("--log-energy --log-memory-interval --record-memory-history"
     " --memory-snapshot-path --pytorch-profiler-collect-* --record-shapes --straggler-* --disable-straggler-*"
     " --run-workload-inspector-server",
     "these measurements do not exist here",
     "--profile, --probe-interval or --outlier-factor"),
    ("--one-logger-* --app-tag-* --otel-*", "no telemetry is sent", "--tensorboard-dir or --wandb-project"),
    ("--yaml-cfg", "YAML has the groups of --help", "--config"),
)  # fmt: skip
"""Flags (* stands for any ending), why they are refused, and what to use instead; the first row that matches counts."""

_NO_MLA = ("there is no multi-latent attention", "--recompute-modules core_attn")
_NEEDS_NEW_CORE = "only Megatron-Core 0.19 with the package emerging-optimizers has it"
REFUSED_VALUES: dict[str, dict[str, tuple[str, str]]] = {
    "--recompute-modules": {
        "moe_act": (
            "only Transformer Engine's grouped experts can compute their activation again by itself",
            "--recompute-modules moe",
        ),
        "mla_up_proj": _NO_MLA,
        "gdn_norm_out": ("there are no linear attention layers", "--recompute-modules layernorm"),
    },
    "--optimizer": {
        "lion": (_NEEDS_NEW_CORE, "--optimizer adam or muon"),
        "soap": (_NEEDS_NEW_CORE, "--optimizer adam or muon"),
        "adaptive_muon": (_NEEDS_NEW_CORE, "--optimizer muon"),
        "dist_muon": ("it is muon with its state divided", "--optimizer muon --use-distributed-optimizer"),
    },
    "--moe-router-load-balancing-type": {
        "global_aux_loss": (
            "it follows the order of a rank's micro-batches: losses would depend on the layout of ranks",
            "aux_loss or --moe-router-enable-expert-bias",
        ),
        "sinkhorn": (
            "every rank would balance its own tokens: losses would depend on the layout of ranks",
            "aux_loss or --moe-router-enable-expert-bias",
        ),
        "quantile_balancing": ("Megatron-Core 0.16 does not have it", "aux_loss or --moe-router-enable-expert-bias"),
    },
    "--moe-router-score-function": {"sqrtsoftplus": ("Megatron-Core 0.16 does not have it", "softmax or sigmoid")},
    "--lr-decay-style": {"inverse-square-root": ("every decay here has an end", "cosine, linear, constant or WSD")},
}
"""Setting -> its values in Megatron-LM that are none here, why, and what to use instead."""
