"""Join several .bin/.idx pairs into one. See docs/data.md."""

import sys

from mesh_megatron.commands.merge_datasets import main

if __name__ == "__main__":
    sys.exit(main())
