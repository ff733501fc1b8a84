"""Plan a run: memory, traffic and time per rank, and the fastest layout of ranks. See docs/scaling.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package beside this folder, installed or not

from mesh_megatron.commands.plan import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
