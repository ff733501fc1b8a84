"""torchrun whose ranks start without imports: they are forked from a process that has imported torch and Megatron-Core.

    python tools/launch.py --standalone --nproc-per-node 2 --max-restarts 3 pretrain_mesh.py [flags]

It takes the flags of torchrun and does what torchrun does. Ranks that are started again, after one was lost, save the
time of their imports, and the first ones share it.
"""

from __future__ import annotations

import logging
import multiprocessing
import runpy
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from mesh_megatron.config import cli
from mesh_megatron.training.fault_tolerance.run_status import REFUSED_EXIT_CODE

_PRELOADED = "mesh_megatron.training.preloaded"
_START_METHOD = "forkserver"
_SECONDS_TO_END = 30


def main(args: Sequence[str] | None = None) -> int:
    """Start and watch this node's ranks as ``args`` (default the command line) say; return the exit code."""
    given = list(sys.argv[1:] if args is None else args)
    if given[:1] in (["-h"], ["--help"]):
        print(f"usage: {cli.program()} [flags of torchrun] script [flags of the script]\n\n{__doc__}")
        return 0
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import record

    settings = run.parse_args(given)
    try:
        settings.training_script = find_script(settings)
    except ValueError as error:
        cli.print_error(str(error))
        return REFUSED_EXIT_CODE
    # With --run-path torchrun calls a function in processes that it starts by a start method of multiprocessing.
    settings.run_path, settings.start_method = True, _START_METHOD
    run.run_script_path = run_script  # type: ignore[assignment]
    multiprocessing.set_forkserver_preload([_PRELOADED])
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(without_own_traceback)
    record(run.run)(settings)
    return 0


def find_script(settings: Namespace) -> str:
    """Return the path of the script or installed program that ranks run; raise ``ValueError`` naming the flag."""
    if settings.module or settings.no_python:
        flag = "--module" if settings.module else "--no-python"
        raise ValueError(f"{flag}: ranks are forked and run a Python script; give its path, or use torchrun")
    if settings.start_method not in ("spawn", _START_METHOD):  # spawn is torchrun's default
        raise ValueError(f"--start-method {settings.start_method}: ranks are forked from one process; drop the flag")
    # A flag as of torch 2.13, which ranks that are started as functions do not follow.
    if (timeout := getattr(settings, "shutdown_timeout", None)) is not None:
        raise ValueError(
            f"--shutdown-timeout {timeout}: ranks that do not end after SIGTERM are killed after "
            f"{_SECONDS_TO_END} s; drop the flag, or use torchrun"
        )
    script: str = settings.training_script
    if Path(script).is_file():
        return script
    if (program := shutil.which(script)) is None:
        raise ValueError(f"{script} does not exist: name a Python script, such as pretrain_mesh.py")
    return program


def run_script(script: str, *args: str) -> None:
    """Run ``script`` as the main program of this process, a rank."""
    multiprocessing.set_start_method(None, force=True)  # data workers start as in any other program
    sys.argv = [script, *args]
    runpy.run_path(script, run_name="__main__")


def without_own_traceback(record: logging.LogRecord) -> bool:
    """Leave of an exception in a log record only its text: the traceback of the failed rank, or its exit code.

    To print the launcher's own traceback too, torch would import its compiler, just when ranks should be started again.
    """
    if record.exc_info:
        record.msg, record.args, record.exc_info = f"{record.getMessage()}: {record.exc_info[1]}", (), None
    return True
