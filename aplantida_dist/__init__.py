"""A multi-GPU image-classification trainer whose numbers can be trusted."""

import os

from aplantida_dist.signals import end_with_the_parent

__version__ = "0.2.0"

if "LOCAL_RANK" in os.environ:
    # A rank ends with its launcher from here on: torch takes seconds to load, and the kernel tells nobody of a death that is past.
    end_with_the_parent()
