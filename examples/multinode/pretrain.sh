#!/usr/bin/env bash
# Pretraining on several machines: run the same command on each of them, in any order, in the repository's folder. Code,
# data, cache and --save must be on a file system that all machines share.
#
#   NODES=2 HEAD=node0:29500 examples/multinode/pretrain.sh --config my_run.yaml --save /shared/my_run
#
# NODES           number of machines
# HEAD            host name and free port of one of the machines, for the rendezvous
# RANKS_PER_NODE  processes on this machine; default one per GPU, or one per core if there is no GPU
# JOB             name of this run; needed only if several runs use the same HEAD
# LOCAL_ADDRESS   this machine's address, if the other machines cannot reach the one that its host name resolves to
#
# A ring (--pipeline-model-parallel-size) may span machines: it sends one [sequence, batch, hidden] tensor per hop. Keep
# tensor parallelism within a machine. If started again with the same --save, the run continues from its newest
# checkpoint, even on a different number of machines.
set -euo pipefail
ulimit -n "$(ulimit -Hn)"  # all ranks of the run keep connections to one process

# Compiled kernels go to this machine's own disk: in a shared home directory, machines delete each other's files.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-$UID}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/torchinductor-$UID}

: "${NODES:?set NODES, the number of machines}" "${HEAD:?set HEAD, host:port of one of the machines}"

exec python -m torch.distributed.run \
  --nnodes "$NODES" --nproc-per-node "${RANKS_PER_NODE:-auto}" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${JOB:-pretrain}" \
  ${LOCAL_ADDRESS:+--local-addr "$LOCAL_ADDRESS"} \
  pretrain_mesh.py "$@"
