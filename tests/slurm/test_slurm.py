"""examples/slurm on a real SLURM of two nodes: jobs that finish, are warned, are cancelled, or lose a node."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import replace

import pytest
import yaml
from slurm_cluster import NODES, Cluster, until
from slurm_jobs import ENDED, ITERATIONS, ROOT, Job, Jobs

from mesh_megatron.analysis.checkpoint_difference import compare
from mesh_megatron.checkpoint.folder import folder_of, newest_intact, saved_iterations
from mesh_megatron.checkpoint.reader import CheckpointReader
from mesh_megatron.training.fault_tolerance.save_lock import hold_save_lock

pytestmark = pytest.mark.full

TWO_CPUS = ["--cpus-per-task=2"]  # two ranks, if nothing else is said
TWO_NODES = {"options": ["--nodes=2"], "RANKS_PER_NODE": "1"}
RANKS_OF_TWO_NODES = [f"node{node} 0 {stream}.log" for node in (1, 2) for stream in ("stderr", "stdout")]


def assert_same_run(job: Job, other: Job) -> None:
    """Every number that was logged, and all that the last checkpoints hold, are the same to the bit."""
    assert job.metrics() == other.metrics()
    ours, theirs = (CheckpointReader(folder_of(each.save, ITERATIONS)) for each in (job, other))
    assert compare(ours, theirs).empty


def test_two_nodes(uninterrupted: Job) -> None:
    assert uninterrupted.fields()["Restarts"] == "0"
    assert uninterrupted.logs(restart=0) == RANKS_OF_TWO_NODES
    assert f"finished | iteration {ITERATIONS}/{ITERATIONS}" in uninterrupted.said()


def test_warned_job_saves_is_queued_again_and_ends_the_same(jobs: Jobs, uninterrupted: Job) -> None:
    job = jobs.submit("multi_node.sbatch", "warned", **TWO_NODES)
    job.wait_for_iteration(3)
    jobs.cluster.run("scancel", "--signal=USR1", "--batch", job.number)  # as --signal=B:USR1@300 does near the end
    assert job.finish()["Restarts"] == "1"
    assert_same_run(job, uninterrupted)
    (stopped,) = set(saved_iterations(job.save)) - set(saved_iterations(uninterrupted.save))
    assert f"Back into the queue, to continue from iteration {stopped}." in job.said()
    assert f"continuing from {folder_of(job.save, stopped)}" in job.said()
    assert job.logs(restart=0) == job.logs(restart=1) == RANKS_OF_TWO_NODES


def test_job_warned_before_its_first_step_is_not_queued_again(jobs: Jobs) -> None:
    """As one with a time limit shorter than the notice it wants would be, for ever."""
    job = jobs.submit("single_node.sbatch", "hasty", RANKS_PER_NODE="1")
    until((job.save / "logs").exists, f"{job} to listen", jobs.cluster)
    jobs.cluster.run("scancel", "--signal=USR1", "--batch", job.number)
    assert job.wait_for(*ENDED)["JobState"] == "FAILED"
    assert "error: not queued again: stopped before a step was made" in job.said()
    assert job.metrics() == []


@pytest.mark.long
def test_cancelled_job_on_one_node_continues_when_submitted_again(jobs: Jobs, uninterrupted: Job) -> None:
    """Also: two ranks of one node compute what two nodes with a rank each do."""
    job = jobs.submit("single_node.sbatch", "cancelled", TWO_CPUS)
    job.wait_for_iteration(33)
    jobs.cluster.run("scancel", job.number)
    assert job.wait_for(*ENDED)["JobState"] == "CANCELLED"
    stopped = newest_intact(job.save, "hash")
    assert stopped.folder is not None and stopped.folder >= folder_of(job.save, 30) and not stopped.warnings
    assert len(job.metrics()) < len(uninterrupted.metrics())
    again = jobs.submit("single_node.sbatch", "cancelled", TWO_CPUS)
    assert again.finish()["Restarts"] == "0"
    assert f"continuing from {stopped.folder}" in again.said()
    assert_same_run(again, uninterrupted)


@pytest.mark.long
def test_killed_ranks_and_a_node_that_dies(jobs: Jobs, cluster: Cluster, uninterrupted: Job) -> None:
    """The run continues twice from its newest checkpoint: first the job queues itself again, then SLURM does."""
    job = jobs.submit("multi_node.sbatch", "bereft", **TWO_NODES)
    job.wait_for_iteration(33)
    cluster.kill_jobs("node2")
    job.wait_for_words("Back into the queue")
    newest = newest_intact(job.save, "hash").folder
    assert newest is not None
    job.wait_for_words(f"continuing from {newest}")
    job.wait_for_iteration(63)
    cluster.lose_node("node2")
    job.wait_for("PENDING")
    newest = newest_intact(job.save, "hash").folder
    assert newest is not None and newest >= folder_of(job.save, 60)
    cluster.start_node("node2")
    assert int(job.finish()["Restarts"]) >= 2
    assert f"continuing from {newest}" in job.said()
    assert job.logs(restart=2) == RANKS_OF_TWO_NODES
    assert_same_run(job, uninterrupted)


@pytest.mark.long
def test_rank_that_dies_is_started_again_within_the_job(jobs: Jobs, cluster: Cluster, uninterrupted: Job) -> None:
    job = jobs.submit("multi_node.sbatch", "restarted", **TWO_NODES)
    job.wait_for_iteration(33)
    (rank,) = cluster.ranks("node2")
    os.kill(rank, signal.SIGKILL)
    assert job.finish()["Restarts"] == "0"
    assert "continuing from " in job.said()
    assert_same_run(job, uninterrupted)


@pytest.mark.long
def test_restarted_ranks_hear_a_warning_too(jobs: Jobs, cluster: Cluster) -> None:
    """One that comes before they listen."""
    job = jobs.submit("single_node.sbatch", "startled", RANKS_PER_NODE="1")
    job.wait_for_iteration(33)
    (rank,) = cluster.ranks("node1")
    os.kill(rank, signal.SIGKILL)
    cluster.run("scancel", "--signal=USR1", "--batch", job.number)
    assert job.finish()["Restarts"] == "1"
    assert "stopped at iteration 30: SIGUSR1" in job.said()


@pytest.mark.long
def test_job_that_makes_no_progress_is_queued_again_only_so_often(jobs: Jobs, cluster: Cluster) -> None:
    job = jobs.submit("single_node.sbatch", "hopeless", RANKS_PER_NODE="1", MAX_RESTARTS="0", MAX_REQUEUES="1")
    for words in (
        "Back into the queue, to continue from iteration 0.",
        "error: not queued again: failed 2 times in a row",
    ):
        until(lambda: len(cluster.ranks("node1")) == 1, f"a rank of {job}", cluster)
        os.kill(cluster.ranks("node1")[0], signal.SIGKILL)
        job.wait_for_words(words)
    assert job.wait_for(*ENDED)["Restarts"] == "1"


def test_refused_job_is_not_queued_again(jobs: Jobs) -> None:
    """A mistaken flag; then a folder that another run has."""
    job = jobs.submit("single_node.sbatch", "refused", flags=["--global-batch-size", "3"], RANKS_PER_NODE="1")
    assert job.wait_for(*ENDED)["Restarts"] == "0"
    assert "error: not queued again: refused" in job.said()
    with hold_save_lock(job.save):
        again = jobs.submit("single_node.sbatch", "refused", RANKS_PER_NODE="1", MAX_RESTARTS="0")
        assert again.wait_for(*ENDED)["Restarts"] == "0"
        assert f"error: not queued again: SAVE={job.save} is in use by another run" in again.said()
    assert again.metrics() == []


@pytest.mark.long
def test_array_of_sizes(jobs: Jobs) -> None:
    """Each task of the array plans the recipe that is its own."""
    array = jobs.submit(
        "sizes_array.sbatch", "sizes", ["--array=0,4", "--nodes=1", f"--output={jobs.folder}/size_%a.out"],
        ["--dry-run", "--world-size", "8"], RUNS=str(jobs.folder), RANKS_PER_NODE="1",
    )  # fmt: skip
    for index, size in {0: "160m", 4: "1.4b"}.items():
        output = jobs.folder / f"size_{index}.out"
        task = replace(array, number=f"{array.number}_{index}", save=jobs.folder / f"{size}-mesh", output=output)
        node = task.finish()["NodeList"]
        layout = yaml.safe_load((ROOT / f"examples/pythia/{size}.yaml").read_text())["model"]["layout"]
        assert f"layout {layout}," in task.said()
        assert task.logs(restart=0) == [f"{node} 0 stderr.log", f"{node} 0 stdout.log"]


def test_unfit_nodes_are_refused(jobs: Jobs, cluster: Cluster) -> None:
    """A port that is taken, GPUs that torch does not see, and a --save that is another folder on the second node."""
    save = jobs.folder / "unfit"
    save.mkdir()
    cluster.run_on("node2", "mount", "-t", "tmpfs", "none", str(save))
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        options = ["--nodes=2", "--gpus-per-node=1"]
        job = jobs.submit("multi_node.sbatch", "unfit", options, RANKS_PER_NODE="1", HEAD_PORT=port)
        assert job.wait_for(*ENDED)["JobState"] == "FAILED"
    cluster.run_on("node2", "umount", str(save))
    said = job.said()
    assert f"node1: error: HEAD_PORT={port} cannot be used: Address already in use" in said
    assert all(f"{node}: error: torch sees 0 of 1 GPUs" in said for node in NODES)
    assert f"node2: error: SAVE={save} cannot be written: No such file or directory" in said
    assert f"node1: error: SAVE={save}" not in said
    assert list(save.iterdir()) == []


@pytest.mark.long
def test_nodes_with_other_code_are_refused(jobs: Jobs, cluster: Cluster) -> None:
    other = jobs.folder / "pretrain_mesh.py"
    other.write_text((ROOT / "pretrain_mesh.py").read_text() + "# edited\n")
    cluster.run_on("node2", "mount", "--bind", str(other), str(ROOT / "pretrain_mesh.py"))
    job = jobs.submit("multi_node.sbatch", "other", **TWO_NODES)
    assert job.wait_for(*ENDED)["JobState"] == "FAILED"
    cluster.run_on("node2", "umount", str(ROOT / "pretrain_mesh.py"))
    assert "node1: error: node2 has different code or packages from this node" in job.said()
    assert job.metrics() == []


def test_missing_python_is_named(jobs: Jobs) -> None:
    job = jobs.submit("single_node.sbatch", "no_python", PYTHON="/nowhere/python")
    assert job.wait_for(*ENDED)["JobState"] == "FAILED"
    assert "node1: error: PYTHON=/nowhere/python does not exist: run make env" in job.said()
