"""Start the ranks of a run like torchrun, but forked from a process with all imports. See docs/operations.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package beside this folder, installed or not

from mesh_megatron.commands.launch import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
