"""Start the ranks of a run like torchrun, but forked from a process with all imports. See docs/operations.md."""

import sys

from mesh_megatron.commands.launch import main

if __name__ == "__main__":
    sys.exit(main())
