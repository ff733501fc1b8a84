"""Transformer Engine's own Python on a CPU: its C++ extension is replaced by functions of torch (``install.py``)."""
