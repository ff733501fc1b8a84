"""Inspect .bin/.idx pairs and verify that they are intact. See docs/data.md."""

import sys

from mesh_megatron.commands.inspect_data import main

if __name__ == "__main__":
    sys.exit(main())
