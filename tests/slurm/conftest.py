"""One cluster for all tests of this folder; each test leaves its nodes without a process of its own."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from slurm_cluster import Cluster, missing
from slurm_jobs import ITERATIONS, Job, Jobs


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's own folders are closed to munge
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    folder = tmp_path_factory.mktemp("jobs")
    tokens = np.random.default_rng(1).integers(0, 256, size=(20, 1000))
    builder = IndexedDatasetBuilder(f"{folder}/tokens.bin", dtype=np.uint16)
    for document in tokens:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{folder}/tokens.idx")
    return Jobs(cluster, folder, folder / "tokens")


@pytest.fixture(scope="session")
def uninterrupted(jobs: Jobs) -> Job:
    """A job on two nodes that nothing happened to, and that has finished."""
    job = jobs.submit("multi_node.sbatch", "uninterrupted", ["--nodes=2"], RANKS_PER_NODE="1")
    job.finish()
    assert job.metrics()[-1]["iteration"] == ITERATIONS
    return job


@pytest.fixture(autouse=True)
def nothing_left(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.tidy()
