#!/usr/bin/env bash
# Check the job's nodes before training. job.sh runs this on the first node; srun runs check_node.py on every node, then
# this script checks that all nodes see the same files. Every error names the node and the fix.
set -euo pipefail
fail() { echo "${SLURMD_NODENAME:-}: error: $*" >&2; exit 1; }

if [[ ${1:-} == on_this_node ]]; then
  command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON does not exist: run make env, or set PYTHON"
  command -v pkill >/dev/null || fail "pkill, which forwards warnings to the ranks, is not installed: install procps"
  exec "$PYTHON" examples/slurm/check_node.py "$2"
fi

answers=$SAVE/.nodes_of_$SLURM_JOB_ID
mkdir -p "$answers" || fail "SAVE=$SAVE cannot be written: name a folder on a disk that all nodes share"
trap 'rm -rf "$answers"' EXIT
srun --kill-on-bad-exit=0 "$0" on_this_node "$answers" || fail "a node cannot train: see above"
for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
  [[ -f $answers/$node ]] ||
    fail "SAVE=$SAVE is a different folder on $node: name one on a disk that all nodes share"
  cmp -s "$answers/$node" "$answers/$SLURMD_NODENAME" ||
    fail "$node has different code or packages from this node:
$(diff "$answers/$node" "$answers/$SLURMD_NODENAME")
submit from a folder on a disk that all nodes share, with PYTHON on such a disk too"
done
