"""Pretrain MeSH and other recursive transformers: torchrun --nproc-per-node N pretrain_mesh.py [flags]."""

import sys

from mesh_megatron.commands.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
