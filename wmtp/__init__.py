"""WMTP: token-weighted multi-token prediction fine-tuning. Recipes live in `recipes/` and call this library."""

import logging

# torchao 0.15 lists the compiled kernels it did not find each time it is imported; no recipe uses them.
logging.getLogger("torchao").setLevel(logging.ERROR)

__version__ = "0.1.0"
