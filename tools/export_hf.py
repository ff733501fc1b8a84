"""Export a training checkpoint as a Hugging Face model. See docs/huggingface.md."""

import sys

from mesh_megatron.commands.export_hf import main

if __name__ == "__main__":
    sys.exit(main())
