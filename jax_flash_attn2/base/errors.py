"""Messages shared by rooms that do not know the arguments; imports no other room."""

from typing import Any

import jax

UNTRACEABLE = (
    jax.errors.TracerIntegerConversionError,
    jax.errors.TracerArrayConversionError,
    jax.errors.ConcretizationTypeError,
)
"""What JAX raises where somebody's function asks for the value of a scalar that is being traced."""


def install(extra: str) -> str:
    """What to type for an extra: the one place that knows how this package is installed.

    It is in no index yet, and what has the name of its import there is somebody else's.
    """
    return f'pip install ".[{extra}]" in a checkout of jax_flash_attn2'


def missing_triton_error(cause: ImportError | str) -> ImportError:
    """The GPU extras are not installed, or others than they would be."""
    return ImportError(
        f"the Triton kernels need jax-triton and triton ({cause}): {install('cuda13')} (or [cuda12]), "
        'or pass implementation="xla"'
    )


def higher_order_error() -> TypeError:
    """A derivative was asked for that the kernels do not have."""
    return TypeError(
        "flash_attention has one derivative, in reverse mode; for forward mode (jvp, jacfwd), hessians and gradients "
        "of gradients pass higher_order=True"
    )


def untraceable_error(what: str, scalars: str, error: Exception) -> TypeError:
    """One of `UNTRACEABLE`, in words of masks and scores. what: the function; scalars: what it is given."""
    if isinstance(error, UNTRACEABLE[:2]):
        return TypeError(
            f"{what} must compute with {scalars} that are traced, got a list or a NumPy array that is indexed by one, "
            "or NumPy's functions; make jnp.asarray of it, and use jnp's functions"
        )
    return TypeError(
        f"{what} must compute with {scalars} that are traced, got one whose value is asked for (if, and, or, not, "
        "while, in, min, max, int, range); use jnp.where, &, | and ~"
    )


def no_gradient_of_weights_error() -> TypeError:
    """The weights of a block mask depend on what is differentiated."""
    return TypeError(
        "mask is a BlockMask whose weights have no gradient, got weights that one is asked for; pass a Mask (whose "
        "weights have one), or make it of jax.lax.stop_gradient(weights)"
    )


def traced_mask_error() -> ValueError:
    """The tiles of a mask cannot be counted."""
    return ValueError(
        "this block mask depends on traced values, so that jit cannot know how many tiles it has: pass max_tiles and "
        "max_parts to BlockMask, or make it outside of jit and pass it in as an argument"
    )


def not_on_this_platform_error() -> ValueError:
    """The kernels were insisted on where there is no GPU."""
    return ValueError(
        'implementation="triton" runs on GPUs, and this is being lowered for another platform. Leave it None for the '
        "XLA path, or set TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter (slow)"
    )


def warp_specialize_error(target: Any) -> ValueError:
    """The chip's tensor cores do not work by themselves."""
    return ValueError(
        f"config.warp_specialize=True is for chips with tensor memory, sm_100 and sm_103, got {target.name}; "
        "leave it None"
    )


def overlaps_error(listed: bool) -> ValueError:
    """config.overlaps=True was asked for where the kernel cannot overlap: with pointers, or under a block mask."""
    why = "this call has a block mask; leave overlaps None" if listed else "these are pointers; add block_ptr=True"
    return ValueError(f"config.overlaps=True needs tensor descriptors and no block mask, and {why}")


def check_pages(config: Any, page_size: int) -> None:
    """Raises if this config cannot read keys in pages."""
    if config.block_ptr and config.block_n > page_size:
        raise ValueError(
            f"block_ptr=True reads tiles that lie in one page, got block_n={config.block_n} and pages of {page_size}; "
            "make block_n smaller, or use block_ptr=False"
        )
    if config.overlaps:
        raise ValueError("config.overlaps=True is not for keys in pages; leave it None")


def narrow_pages_error(dtype: Any, target: Any) -> ValueError:
    """The chip has no such numbers."""
    return ValueError(
        f"pages of {dtype.name} need a GPU of compute capability 8.9 or later, got {target.name}; hold them in "
        'float8_e5m2 or int8, or use implementation="xla"'
    )


def shared_memory_error(kernel: str, config: Any, used: int, target: Any) -> ValueError:
    """A tile is too large for the chip."""
    return ValueError(
        f"{kernel} with block_m={config.block_m}, block_n={config.block_n}, num_stages={config.num_stages} "
        f"needs {used} bytes of shared memory, but {target.name} has {target.shared_memory} per block; "
        f"use smaller block sizes or fewer stages, or leave them None (tuned)"
    )
