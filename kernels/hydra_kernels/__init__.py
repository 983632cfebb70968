"""Operators of heads, their fusion and distillation's loss, a folder each: api, reference, kernels.

They know nothing of Megatron, nor of plans and layers.
"""

import logging
import os

# Read by packages as they are imported. fla keeps what it looks up of packed rows for four tensors,
# and a step has one for each number of LA heads that a layer has. TileLang says of each kernel that
# it compiles it.
os.environ.setdefault("FLA_TENSOR_CACHE_SIZE", "64")
os.environ.setdefault("TILELANG_PRINT_ON_COMPILATION", "0")
# Of a kernel that several threads ask for at once TileLang warns that it has it already. A filter,
# as it sets its logger's level anew.
logging.getLogger("tilelang.cache.kernel_cache").addFilter(
    lambda record: "in memory cache" not in record.getMessage()
)
