"""Draw training and validation loss of one run, or of several side by side."""

import sys

from mesh_megatron.commands.plot_metrics import main

if __name__ == "__main__":
    sys.exit(main())
