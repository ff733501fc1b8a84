"""Train a tokenizer on text: SentencePiece (unigram or BPE) or byte-level BPE. See docs/data.md."""

import sys

from mesh_megatron.commands.train_tokenizer import main

if __name__ == "__main__":
    sys.exit(main())
