"""Evaluate a checkpoint or an exported model: perplexity and LM Evaluation Harness. See docs/huggingface.md."""

import sys

from mesh_megatron.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
