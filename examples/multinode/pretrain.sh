#!/usr/bin/env bash
# Pretraining on several machines: start this same line on every one of them, in any order, from the repository's folder
# (code, data, cache and --save must be where all of them see it):
#
#   NODES=2 HEAD=node0:29500 examples/multinode/pretrain.sh --config my_run.yaml --save /shared/my_run
#
# NODES           how many machines take part
# HEAD            name and free port of one of them, where they meet
# RANKS_PER_NODE  processes on this machine; default one a GPU, or one a core where there is no GPU
# JOB             a name of this run; needed only if several share a HEAD
# LOCAL_ADDRESS   this machine's own address, if the one its name stands for is not reachable from the others
#
# A ring (--pipeline-model-parallel-size) may span machines: it sends one [sequence, batch, hidden] tensor a hop. Keep
# tensor parallelism within a machine. Started again with the same --save, the run continues from its newest checkpoint,
# also with another number of machines.
set -euo pipefail
ulimit -n "$(ulimit -Hn)"  # all ranks of the run keep connections to one process

# Compiled kernels on this machine's own disk: many that write to one home directory take each other's files away.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-$UID}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/torchinductor-$UID}

: "${NODES:?set NODES, the number of machines}" "${HEAD:?set HEAD, host:port of one of the machines}"

exec python -m torch.distributed.run \
  --nnodes "$NODES" --nproc-per-node "${RANKS_PER_NODE:-auto}" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${JOB:-pretrain}" \
  ${LOCAL_ADDRESS:+--local-addr "$LOCAL_ADDRESS"} \
  pretrain_mesh.py "$@"
