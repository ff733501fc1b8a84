"""Tokenize text into Megatron's .bin/.idx, from files, globs, folders or standard input. See docs/data.md."""

import sys

from mesh_megatron.commands.preprocess_data import main

if __name__ == "__main__":
    sys.exit(main())
