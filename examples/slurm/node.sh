#!/usr/bin/env bash
# One node's share of a job: torchrun, which starts the node's ranks. srun starts this once on every node.
#
# A warning (SIGUSR1 or SIGTERM) goes to the ranks. torchrun itself ignores both: it would end the ranks and then fail.
# So do ranks, until they are far enough to listen, which is why they are told again and again, also those that torchrun
# starts anew.
set -euo pipefail
trap "" USR1 TERM  # torchrun inherits that, from its first moment on; what comes too early comes again
ulimit -n "$(ulimit -Hn)"  # all ranks of the job keep connections to one process

ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-$SLURM_CPUS_ON_NODE}}
[[ $SLURM_NODEID == 0 ]] && is_host=true || is_host=false
# Compiled kernels on the node's own disk: many nodes that write to one home directory take each other's files away.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-$UID-$SLURM_JOB_ID}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/torchinductor-$UID-$SLURM_JOB_ID}
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}] '

torchrun=(
  "$PYTHON" -m torch.distributed.run --nnodes "$SLURM_NNODES" --nproc-per-node "$ranks"
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:$HEAD_PORT" --rdzv-id "$SLURM_JOB_ID" --rdzv-conf "is_host=$is_host"
  --max-restarts "${MAX_RESTARTS:-3}"  # a rank that fails costs no place in the queue
  --signals-to-handle SIGINT,SIGHUP,SIGQUIT
  # Everything into a file a rank; of each node's first rank also into the job's own output.
  --log-dir "$LOGS/$SLURMD_NODENAME" --redirects 3 --tee 3 --local-ranks-filter 0
)

"${torchrun[@]}" pretrain_mesh.py "$@" &
launcher=$!
tell_ranks() { while kill -0 "$launcher" 2>/dev/null; do pkill -USR1 --parent "$launcher" || true; sleep 1; done; }
trap 'trap "" USR1 TERM; echo "$SLURMD_NODENAME tells its ranks to save and stop."; tell_ranks &' USR1 TERM

# The trap may end the first wait.
wait "$launcher" || wait "$launcher"
