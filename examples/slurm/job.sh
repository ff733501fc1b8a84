# What the job scripts share: they set SAVE and PYTHON, source this in the repository's folder, and call pretrain.
# It runs in the batch shell, on the job's first node.
#
# Variables that it takes from the environment:
# RANKS_PER_NODE  processes on a node; default one a GPU that the job has there, or one a CPU where it has none
# HEAD_PORT       a port of the first node, where the nodes meet; default one that is free
# LOGS            folder of the ranks' output; default SAVE/logs
# MAX_RESTARTS    how often torchrun starts ranks again that fail, before the job gives its nodes back; default 3
# MAX_REQUEUES    how often in a row a job is queued again that failed and left no newer checkpoint; default 2
set -euo pipefail

# Check the nodes, train on them with the flags given, and put the job back into the queue if there is more to do.
pretrain() {
  export SAVE PYTHON HEAD HEAD_PORT LOGS
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
  HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  LOGS=${LOGS:-$SAVE/logs}/$SLURM_JOB_ID
  tries=$LOGS/failures_without_a_newer_checkpoint
  LOGS+=/restart_${SLURM_RESTART_COUNT:-0}
  # srun takes most options over from sbatch, not this one.
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  step="" warned="" cancelled="" code=0
  trap 'trap "" USR1; echo "Warned: the ranks are told to save and stop."; warned=yes; pass_on' USR1
  trap 'trap "" TERM; cancelled=yes' TERM

  examples/slurm/check_environment.sh
  mkdir -p "$LOGS"
  before=$(newest_checkpoint)
  HEAD_PORT=${HEAD_PORT:-$(free_port)}
  # srun ignores a warning that comes before it listens, instead of dying of it.
  (trap "" USR1 && exec srun --kill-on-bad-exit=1 examples/slurm/node.sh "$@" --save "$SAVE") &
  step=$!
  pass_on
  # Each of the two traps may end one wait.
  wait "$step" || wait "$step" || wait "$step" || code=$?
  conclude
}

# Tell the ranks of a warning, by way of srun and node.sh, until they are gone: those that still start do not hear it.
pass_on() {
  [[ -n $warned && -n $step ]] || return 0
  while kill -USR1 "$step"; do sleep 1; done 2>/dev/null &
}

# A run that was stopped early, failed or was killed, a node of it perhaps, is queued again if it left a checkpoint (whose
# iteration is a lower one after it went back), or failed unwarned without one for the first few times. The rest would
# come no further the next time.
conclude() {
  local status=0 newest
  newest=$(newest_checkpoint)
  "$PYTHON" tools/heartbeat.py "$SAVE" || status=$?
  if [[ -n $cancelled ]]; then
    echo "Told to end. Unless SLURM queues the job again itself, submit it again to continue from iteration $newest."
    exit 143
  fi
  says() { [[ $status == "$1" && $SAVE/heartbeat.json -nt $LOGS ]]; }  # of this run, not the one before
  if (( code != 0 )) || says 75; then
    if belongs_to_another; then
      give_up "SAVE=$SAVE is in use by another run, see $SAVE/owner.json"
    elif says 3; then
      give_up "its numbers went wrong: see above"
    elif (( newest != before )); then
      rm -f "$tries"
      queue_again
    elif says 2; then
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

# owner.json is there while a run writes to SAVE, touched every few seconds, and after one that was killed.
belongs_to_another() {
  [[ $SAVE/owner.json -nt $LOGS ]] && ! grep -q "\"job\": \"$SLURM_JOB_ID\"" "$SAVE/owner.json"
}

newest_checkpoint() {
  cat "$SAVE/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0
}

# Below the ports that the kernel gives to outgoing connections, any of which could take it before torchrun does.
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
