"""Import a Hugging Face model as a checkpoint to train. See docs/huggingface.md."""

import sys

from mesh_megatron.commands.import_hf import main

if __name__ == "__main__":
    sys.exit(main())
