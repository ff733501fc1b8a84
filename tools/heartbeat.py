"""Report the status of a run from its heartbeat.json. See docs/operations.md."""

import sys

from mesh_megatron.commands.heartbeat import main

if __name__ == "__main__":
    sys.exit(main())
