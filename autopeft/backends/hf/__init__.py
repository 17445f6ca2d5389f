"""Training with transformers and peft."""

import logging

# bitsandbytes logs a line for every int8 product, and on import one about a package that autopeft does not need.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
