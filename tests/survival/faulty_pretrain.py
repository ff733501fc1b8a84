"""pretrain_mesh.py with faults: rank 1 dies at the first start and hangs at the second; the third start succeeds."""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))


def main() -> int:
    from mesh_megatron.platform import device

    device.prepare()
    import pretrain_mesh
    from mesh_megatron.training import trainer

    original, life = trainer.train_step, int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    started = []

    def faulty(*args, **kwargs):
        started.append(None)
        if len(started) == 5 and os.environ["RANK"] == "1":
            if life == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if life == 1:
                time.sleep(3600)  # the rank that hangs
        return original(*args, **kwargs)

    trainer.train_step = faulty
    return pretrain_mesh.main()


if __name__ == "__main__":
    sys.exit(main())
