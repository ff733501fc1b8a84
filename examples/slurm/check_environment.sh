#!/usr/bin/env bash
# Are the job's nodes fit for it? job.sh runs this on the first node, before training; it has srun ask every node
# (check_node.py), then sees to it that all of them mean the same files. Every error names the node and the mend.
set -euo pipefail
fail() { echo "${SLURMD_NODENAME:-}: error: $*" >&2; exit 1; }

if [[ ${1:-} == on_this_node ]]; then
  command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not there: run make env, or set PYTHON"
  command -v pkill >/dev/null || fail "pkill, which passes warnings on to the ranks, is not there: install procps"
  exec "$PYTHON" examples/slurm/check_node.py "$2"
fi

answers=$SAVE/.nodes_of_$SLURM_JOB_ID
mkdir -p "$answers" || fail "SAVE=$SAVE cannot be written: name a folder on a disk that every node has"
trap 'rm -rf "$answers"' EXIT
srun --kill-on-bad-exit=0 "$0" on_this_node "$answers" || fail "not fit for training: see above"
for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
  [[ -f $answers/$node ]] ||
    fail "SAVE=$SAVE of $node is another folder than here: name one on a disk that every node has"
  cmp -s "$answers/$node" "$answers/$SLURMD_NODENAME" ||
    fail "$node has other code or packages than this node:
$(diff "$answers/$node" "$answers/$SLURMD_NODENAME")
submit from a folder on a disk that every node has, with PYTHON on one too"
done
