"""MeSH and other recursive transformers, pretrained at scale on Megatron-Core."""

__version__ = "0.1.0"
