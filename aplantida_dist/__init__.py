"""A multi-GPU image-classification trainer whose numbers can be trusted."""

# Before anything slow: it notes who started this process, who may be gone by the time that torch is loaded.
from aplantida_dist import signals as signals

__version__ = "0.1.0"
