"""Plan a run: memory, traffic and time per rank, and the fastest layout of ranks. See docs/scaling.md."""

import sys

from mesh_megatron.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())
