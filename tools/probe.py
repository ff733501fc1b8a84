"""Probe hidden states and routers of models, with numbers and figures. See docs/probes.md."""

import sys

from mesh_megatron.commands.probe import main

if __name__ == "__main__":
    sys.exit(main())
