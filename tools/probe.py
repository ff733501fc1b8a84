"""Probe hidden states and routers of models, with numbers and figures. See docs/probes.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package beside this folder, installed or not

from mesh_megatron.commands.probe import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
