# Functions shared by the job scripts, which set SAVE and PYTHON, source this file in the repository's folder, and call
# pretrain. It runs in the batch shell, on the job's first node.
#
# Environment variables:
# RANKS_PER_NODE  processes per node; default one per GPU that the job has there, or one per CPU if it has no GPU
# HEAD_PORT       port on the first node for the rendezvous; default a free one
# LOGS            folder for the ranks' output; default SAVE/logs
# MAX_RESTARTS    how often torchrun restarts failed ranks before the job releases its nodes; default 3
# MAX_REQUEUES    how often in a row a job that failed without a newer checkpoint is queued again; default 2
set -euo pipefail

# Check the nodes, train on them with the given flags, and put the job back into the queue if training is not finished.
pretrain() {
  export SAVE PYTHON HEAD HEAD_PORT LOGS
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
  HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  LOGS=${LOGS:-$SAVE/logs}/$SLURM_JOB_ID
  tries=$LOGS/failures_without_a_newer_checkpoint
  LOGS+=/restart_${SLURM_RESTART_COUNT:-0}
  # srun inherits most options from sbatch, but not this one.
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  step="" warned="" cancelled="" code=0
  trap 'trap "" USR1; echo "Warning received: the ranks are asked to save and stop."; warned=yes; forward_warning' USR1
  trap 'trap "" TERM; cancelled=yes' TERM

  examples/slurm/check_environment.sh
  mkdir -p "$LOGS"
  before=$(newest_checkpoint)
  HEAD_PORT=${HEAD_PORT:-$(free_port)}
  # Make srun ignore a warning that arrives before its handler is installed; it would end srun.
  (trap "" USR1 && exec srun --kill-on-bad-exit=1 examples/slurm/node.sh "$@" --save "$SAVE") &
  step=$!
  forward_warning
  # Each of the two traps may interrupt one wait.
  wait "$step" || wait "$step" || wait "$step" || code=$?
  conclude
}

# Forward a warning to the ranks, through srun and node.sh, until they have ended: starting ranks ignore it at first.
forward_warning() {
  [[ -n $warned && -n $step ]] || return 0
  while kill -USR1 "$step"; do sleep 1; done 2>/dev/null &
}

# Queue the job again if the run was stopped early, failed or was killed (or a node was) and left a new checkpoint (whose
# iteration is lower after a rollback), or if it failed without one and without a warning, the first few times. In all
# other cases another attempt would get no further.
conclude() {
  local status=0 newest
  newest=$(newest_checkpoint)
  "$PYTHON" tools/heartbeat.py "$SAVE" || status=$?
  if [[ -n $cancelled ]]; then
    echo "Cancelled. Unless SLURM itself queues the job again, submit it again to continue from iteration $newest."
    exit 143
  fi
  says() { [[ $status == "$1" && $SAVE/heartbeat.json -nt $LOGS ]]; }  # of this attempt, not an earlier one
  if (( code != 0 )) || says 75; then
    if belongs_to_another; then
      give_up "SAVE=$SAVE is in use by another run, see $SAVE/owner.json"
    elif says 3; then
      give_up "its numbers went wrong: see above"
    elif (( newest != before )); then
      rm -f "$tries"
      queue_again
    elif says 2 || says 0; then  # 0: the run had finished before
      give_up "refused: see above"
    elif (( code == 0 )) || [[ -n $warned ]]; then
      give_up "stopped before a step was made. Is --time longer than the notice of --signal?"
    elif (( $(count) < ${MAX_REQUEUES:-2} )); then
      echo $(( $(count) + 1 )) > "$tries"
      queue_again
    else
      give_up "failed $(( $(count) + 1 )) times in a row without a newer checkpoint"
    fi
  fi
  exit "$code"
}

queue_again() {
  echo "Back into the queue, to continue from iteration $newest."
  scontrol requeue "$SLURM_JOB_ID"
}

give_up() {
  echo "error: not queued again: $*" >&2
  exit $(( code ? code : 1 ))
}

count() { cat "$tries" 2>/dev/null || echo 0; }

# owner.json exists while a run writes to SAVE, which touches it every few seconds, and after a run was killed.
belongs_to_another() {
  [[ $SAVE/owner.json -nt $LOGS ]] && ! grep -q "\"job\": \"$SLURM_JOB_ID\"" "$SAVE/owner.json"
}

newest_checkpoint() {
  cat "$SAVE/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0
}

# Choose below the kernel's range for outgoing connections, one of which could take the port before torchrun does.
free_port() {
  "$PYTHON" - <<'END'
import contextlib, random, socket
for port in random.sample(range(10000, 32768), 1000):
    with socket.socket() as free, contextlib.suppress(OSError):
        free.bind(("", port))
        print(port)
        break
END
}
