"""Runs of the trainer in this process."""

import pytest
from integration_runs import SMALL


@pytest.fixture
def train(corpus, capsys):
    """Run pretrain_mesh.py's main in this process: (flags) -> (exit code, standard output, standard error)."""
    import pretrain_mesh

    def run(*flags: object, data: str = corpus) -> tuple[int, str, str]:
        code = pretrain_mesh.main([*SMALL, *("--data-path", data), *map(str, flags)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
