#!/usr/bin/env bash
# Start torchrun, which starts this node's ranks. srun runs this script once on every node.
#
# A warning (SIGUSR1 or SIGTERM) is forwarded to the ranks. torchrun itself ignores both signals; otherwise it would end
# the ranks and fail. Ranks ignore them too until their handlers are installed, so the warning is sent repeatedly, also to
# ranks that torchrun restarts.
set -euo pipefail
trap "" USR1 TERM  # torchrun inherits this; a warning that arrives too early is sent again
ulimit -n "$(ulimit -Hn)"  # all ranks of the job keep connections to one process

ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-$SLURM_CPUS_ON_NODE}}
[[ $SLURM_NODEID == 0 ]] && is_host=true || is_host=false
# Compiled kernels go to the node's own disk: in a shared home directory, nodes delete each other's files.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-$UID-$SLURM_JOB_ID}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/torchinductor-$UID-$SLURM_JOB_ID}
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}] '

torchrun=(
  "$PYTHON" -m torch.distributed.run --nnodes "$SLURM_NNODES" --nproc-per-node "$ranks"
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:$HEAD_PORT" --rdzv-id "$SLURM_JOB_ID" --rdzv-conf "is_host=$is_host"
  --max-restarts "${MAX_RESTARTS:-3}"  # a failed rank does not cost the job its nodes
  --signals-to-handle SIGINT,SIGHUP,SIGQUIT
  # One output file per rank; the output of each node's first rank also goes into the job's own output.
  --log-dir "$LOGS/$SLURMD_NODENAME" --redirects 3 --tee 3 --local-ranks-filter 0
)

"${torchrun[@]}" pretrain_mesh.py "$@" &
launcher=$!
warn_ranks() { while kill -0 "$launcher" 2>/dev/null; do pkill -USR1 --parent "$launcher" || true; sleep 1; done; }
trap 'trap "" USR1 TERM; echo "$SLURMD_NODENAME asks its ranks to save and stop."; warn_ranks &' USR1 TERM

# The trap may interrupt the first wait.
wait "$launcher" || wait "$launcher"
