"""Import a GPT checkpoint of Megatron-LM as a checkpoint to train. See docs/training.md."""

import sys

from mesh_megatron.commands.import_megatron import main

if __name__ == "__main__":
    sys.exit(main())
