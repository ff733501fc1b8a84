"""Draw training and validation loss of one run, or of several side by side."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package beside this folder, installed or not

from mesh_megatron.commands.plot_metrics import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
