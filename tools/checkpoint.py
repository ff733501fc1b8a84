"""Manage the checkpoints of a run: list, verify, prune, rollback, diff, seal. See docs/operations.md."""

import sys

from mesh_megatron.commands.checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
