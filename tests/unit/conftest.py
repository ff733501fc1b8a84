"""A process group of one rank for the tests of a module that build real models."""

import pytest


@pytest.fixture(scope="module")
def one_rank():
    from mesh_megatron.platform import device

    device.prepare()
    import torch.distributed as dist

    from mesh_megatron.config.run import RunConfig
    from mesh_megatron.parallel.groups import start_model_parallel, stop_model_parallel

    device.start_process_group()
    start_model_parallel(RunConfig())
    yield
    stop_model_parallel()
    dist.destroy_process_group()
