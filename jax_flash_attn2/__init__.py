"""Flash attention for JAX: Triton kernels on GPUs, a blockwise XLA path everywhere else."""

from .api import flash_attention, get_cached_flash_attention
from .spec import Config
from .target import gpu_target

__all__ = ["Config", "flash_attention", "get_cached_flash_attention", "gpu_target"]
__version__ = "0.1.0"
