"""Import a Hugging Face model as a checkpoint to train. See docs/huggingface.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package beside this folder, installed or not

from mesh_megatron.commands.import_hf import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
