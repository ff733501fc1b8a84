"""Generate text with a checkpoint or an exported model. See docs/huggingface.md."""

import sys

from mesh_megatron.commands.generate import main

if __name__ == "__main__":
    sys.exit(main())
