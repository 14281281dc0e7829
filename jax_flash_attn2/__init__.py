"""Flash attention for JAX: Triton kernels on GPUs, a blockwise XLA path everywhere else.

Beside what is imported here: `jax_flash_attn2.flax` and `jax_flash_attn2.equinox`, adapters for these libraries, which
are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .base import versions as _versions

_versions.check("jax_flash_attn2", "jax")

from . import masks
from .base.config import Config
from .base.version import VERSION as __version__
from .call.api import flash_attention, get_cached_flash_attention
from .call.explain import Explanation, supported
from .call.kept import CHECKPOINT_NAMES
from .context.attention import context_parallel_attention
from .context.explaining import ContextExplanation, explain
from .context.merging import merge
from .context.orders import from_order, sequence_order, to_order
from .drop_in import dot_product_attention
from .gpu.target import EXPORT_DISABLED_CHECKS, gpu_target
from .serving.paged import paged_attention
from .serving.pages import write_pages
from .serving.varlen import varlen_attention

if TYPE_CHECKING:
    from . import equinox as equinox
    from . import flax as flax

__all__ = [
    "CHECKPOINT_NAMES",
    "EXPORT_DISABLED_CHECKS",
    "Config",
    "ContextExplanation",
    "Explanation",
    "__version__",
    "context_parallel_attention",
    "dot_product_attention",
    "explain",
    "flash_attention",
    "from_order",
    "get_cached_flash_attention",
    "gpu_target",
    "masks",
    "merge",
    "paged_attention",
    "sequence_order",
    "supported",
    "to_order",
    "varlen_attention",
    "write_pages",
]

_ADAPTERS = ("equinox", "flax")


def __getattr__(name: str) -> Any:
    if name in _ADAPTERS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ADAPTERS})
