"""A multi-GPU image-classification trainer whose numbers can be trusted."""

__version__ = "0.1.0"
