"""A real SLURM of two nodes on this machine: its own key, ports and folder, over loopback, gone when it is stopped.

A node is a slurmd in namespaces of its own: it has its own host name and mounts, and every process that SLURM starts on
it can be told by its namespace, which is how a test kills a node and how stop() leaves none behind.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rank_pool import free_port

PROGRAMS = (
    *("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo"),
    *("unshare", "nsenter", "setpriv", "pkill"),
)
NODES = ("node1", "node2")
DEADLINE = 600  # seconds after which what is awaited is called lost

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
ReturnToService=2
JobRequeue=1
KillWait=30
SlurmdTimeout=300
PropagateResourceLimits=NONE
GresTypes=gpu
NodeName=node1 NodeHostname=node1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=4000 Gres=gpu:1
NodeName=node2 NodeHostname=node2 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=4000 Gres=gpu:1
PartitionName=tests Nodes=node1,node2 Default=YES MaxTime=UNLIMITED State=UP
"""
# A node's own host name, and host names that lead to loopback, without touching this machine's.
START_NODE = 'hostname "$1"; mount --bind "$2/hosts" /etc/hosts; exec slurmd -D -N "$1" -f "$2/slurm.conf"'


def missing() -> str | None:
    """Why there can be no cluster here, None if there can."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if absent:
        return f"no {', '.join(absent)} here: .ci/install_slurm installs them"
    if os.geteuid() != 0:
        return "only root can start SLURM's nodes"
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode:
        return "no namespaces for SLURM's nodes can be made here"
    return None


class Cluster:
    """munged, slurmctld and two slurmd; ``folder`` must be new and its path short (it holds a socket)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen] = {}
        self._namespaces: dict[str, str] = {}
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "PATH": _path(),
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def start(self) -> None:
        """Raises ``RuntimeError`` with the daemons' last words if the nodes are not there in time."""
        self.folder.chmod(0o755)  # munge asks it of its socket's folder
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        host = socket.gethostname().split(".")[0]
        configuration = CONFIGURATION.format(host=host, folder=self.folder, ports=[free_port() for _ in range(3)])
        (self.folder / "slurm.conf").write_text(configuration)
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")  # a GPU that SLURM sees and torch does not
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(NODES)}\n")
        munge = ["munged", "--foreground", "--num-threads=2"]
        for option, name in {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log"}.items():
            munge.append(f"--{option}={self.folder}/munge.{name}")
        self._daemon("munged", [*munge, f"--seed-file={self.folder}/munge.seed"])
        until(lambda: (self.folder / "munge.socket").exists(), "munged's socket", self)
        self._daemon("slurmctld", ["slurmctld", "-D", "-f", str(self.folder / "slurm.conf")])
        for node in NODES:
            self.start_node(node)

    def start_node(self, node: str) -> None:
        """Also after lose_node: the node has been started again."""
        command = ["unshare", "--uts", "--mount", "sh", "-c", START_NODE, "sh", node, str(self.folder)]
        self._daemon(node, command)
        until(lambda: self.node_state(node) == "IDLE", f"{node} to be idle", self)
        self._namespaces[node] = _namespace(self._daemons[node].pid)

    def lose_node(self, node: str) -> None:
        """A node dies: its processes are gone, and SLURM is told, as after SlurmdTimeout or by a health check."""
        self.kill_node(node)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=died")

    def kill_jobs(self, node: str) -> None:
        """Kill what jobs run on a node, as the kernel does when memory is short; SLURM's own processes live on."""
        _kill([pid for pid in self.processes(node) if not _name(pid).startswith("slurm")])

    def kill_node(self, node: str) -> None:
        """Kill every process of a node, SLURM's and the jobs', without a warning."""
        while pids := self.processes(node):
            _kill(pids)
        self._namespaces.pop(node)
        self._daemons.pop(node).wait()

    def tidy(self) -> None:
        """End what a test left behind, so that the next one finds two idle nodes."""
        self.run("scancel", "--user=root")
        for node in set(NODES) - set(self._namespaces):
            self.start_node(node)
        until(lambda: all(len(self.processes(node)) == 1 for node in NODES), "nodes with nothing but slurmd", self)

    def stop(self) -> None:
        """Cancel all jobs, end the daemons, and kill whatever is left on the nodes."""
        try:
            if "slurmctld" in self._daemons:
                self.run("scancel", "--user=root")
        finally:
            for node in list(self._namespaces):
                self.kill_node(node)
            for daemon in reversed(self._daemons.values()):
                daemon.terminate()
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()

    def assert_alive(self) -> None:
        for name, daemon in self._daemons.items():
            if daemon.poll() is not None:
                raise RuntimeError(f"{name} has ended with {daemon.returncode}\n{self.last_words()}")

    def processes(self, node: str) -> list[int]:
        """Everything that runs on a node, its slurmd too."""
        return [pid for pid in _pids() if _namespace(pid) == self._namespaces[node] and not _is_zombie(pid)]

    def ranks(self, node: str) -> list[int]:
        """The trainers on a node, without those that launch them."""
        commands = {pid: _command(pid) for pid in self.processes(node)}
        return [pid for pid, words in commands.items() if "pretrain_mesh.py" in words and "--nnodes" not in words]

    def run(self, *command: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
        """Return the output of a SLURM command; raise ``RuntimeError`` with its error if it fails."""
        variables = self.environment | dict(environment or {})
        done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=DEADLINE)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}{done.stdout}")
        return done.stdout

    def run_on(self, node: str, *command: str) -> None:
        """Run a command in a node's namespaces, such as a mount that only this node sees."""
        subprocess.run(["nsenter", f"--target={self._daemons[node].pid}", "--uts", "--mount", *command], check=True)

    def node_state(self, node: str) -> str:
        try:
            return self.run("sinfo", "--noheader", "--nodes", node, "--format", "%T").strip().upper()
        except RuntimeError:  # slurmctld is not up yet
            return "UNKNOWN"

    def last_words(self) -> str:
        """The ends of the daemons' logs."""
        logs = sorted(self.folder.glob("*.log")) + sorted(self.folder.glob("*.out"))
        return "".join(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}\n" for log in logs)

    def _daemon(self, name: str, command: list[str]) -> None:
        """Start what ends with the tests however they end, but not by their Ctrl-C."""
        with (self.folder / f"{name}.out").open("a") as output:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", *command],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip


def until(true: Callable[[], bool], what: str, cluster: Cluster) -> None:
    """Ask until it is so; ``RuntimeError`` with the daemons' last words if it never is."""
    end = time.monotonic() + DEADLINE
    while not true():
        cluster.assert_alive()
        if time.monotonic() > end:
            raise RuntimeError(f"waited {DEADLINE} s for {what}\n{cluster.last_words()}")
        time.sleep(0.2)


def _path() -> str:
    return f"{os.environ['PATH']}{os.pathsep}/usr/sbin"  # where the daemons are, and not on every user's path


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _namespace(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/uts")
    except OSError:
        return None


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _is_zombie(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
