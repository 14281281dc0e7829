"""The GPU that kernels are made for: the one that is here, or one that `gpu_target` names."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import jax.extend.backend
from jax.export import DisabledSafetyCheck

# Bytes of shared memory that one block may use (CUDA C Programming Guide, "Technical Specifications per Compute
# Capability"); AMD's CDNA chips have 64 KiB of LDS.
_SHARED_MEMORY = {
    **{80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448},
    **{100: 232448, 103: 232448, 120: 101376, 121: 101376},
}

# Multiprocessors of the chips that are met most: A100, RTX 3090, Orin, L40S, H100, B200, RTX 5090, GB10; MI300X.
_MULTIPROCESSORS = {0: 304, 80: 108, 86: 82, 87: 16, 89: 142, 90: 132, 100: 148, 120: 170, 121: 48}

# The oldest PTX, times ten, with the instructions that Triton uses (PTX ISA, "Release Notes"): CUDA 12.5's, and from
# Hopper on 12.8's, for copies through tensor descriptors; from Blackwell on 12.9's, for the maximum of three numbers.
_PTX = {80: 85, 90: 86, 100: 88}

_capability = jax.make_user_context(None)  # part of jit's cache key, so a new target retraces


EXPORT_DISABLED_CHECKS = (DisabledSafetyCheck.custom_call("triton_kernel_call_ffi"),)
"""For `jax.export.export(..., disabled_checks=EXPORT_DISABLED_CHECKS)` of a module with our kernels in it: jax-triton's
custom call is not among those that JAX promises to keep."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to compile for."""

    capability: int
    """CUDA compute capability times ten (90 for Hopper); 0 for AMD."""

    @property
    def name(self) -> str:
        """As the vendor spells it: sm_90."""
        return f"sm_{self.capability}" if self.capability else "AMD GPU"

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that one block may use."""
        if not self.capability:
            return 65536
        return _SHARED_MEMORY[max(c for c in _SHARED_MEMORY if c <= self.capability)]

    @property
    def multiprocessors(self) -> int:
        """Multiprocessors of the best-known chip of this capability: a guess, for heuristics."""
        return _MULTIPROCESSORS[max(c for c in _MULTIPROCESSORS if c <= self.capability)]

    @property
    def ptx_version(self) -> int | None:
        """The version of PTX, times ten, to write for it. JAX assembles it with its own ptxas, which may be older than
        Triton's, whose newest would be Triton's choice. None for AMD."""
        return _PTX[max(c for c in _PTX if c <= self.capability)] if self.capability else None

    @property
    def has_tma(self) -> bool:
        """Whether the chip has a tensor memory accelerator, which reads through descriptors made on the host."""
        return self.capability >= 90

    @property
    def has_tensor_memory(self) -> bool:
        """Whether its tensor cores keep what they sum in a memory of their own."""
        return 100 <= self.capability < 120


@contextlib.contextmanager
def gpu_target(*, compute_capability: int) -> Iterator[None]:
    """Lowers for the named GPU inside the `with` block, whether or not one is present.

    For ahead-of-time use on a machine without a GPU (with a CUDA plugin of JAX installed):

        with gpu_target(compute_capability=90):
            jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",))

    Args:
      compute_capability: times ten, as NVIDIA names its architectures: 80 (A100), 86, 89, 90 (H100), 100 (B200) ...

    Raises:
      ValueError: below 80: the kernels need bf16 tensor cores and asynchronous copies.
    """
    if not isinstance(compute_capability, int) or isinstance(compute_capability, bool) or compute_capability < 80:
        raise ValueError(
            f"compute_capability must be an integer of at least 80 (Ampere), such as 80, 86, 89, 90 or 100, "
            f"got {compute_capability!r}"
        )
    with _capability(compute_capability):
        yield


def named() -> Target | None:
    """The target that an enclosing `gpu_target` names, if any."""
    return None if _capability.value is None else Target(_capability.value)


def is_default() -> bool:
    """Whether JAX runs things on a GPU unless it is told otherwise."""
    return jax.default_backend() == "gpu"


INTERPRETED = Target(80)
"""What Triton's interpreter takes kernels to be made for."""


def of_platform(platform: str) -> Target:
    """The GPU of this machine that "cuda" or "rocm" stands for.

    Raises:
      ValueError: as `present`; there is no AMD GPU.
    """
    return present() if platform == "cuda" else _present_amd()


def of_default_backend() -> Target:
    """The GPU that JAX's default backend is.

    Raises:
      ValueError: as `present`.
    """
    return Target(0) if "rocm" in jax.extend.backend.get_backend().platform_version else present()


def _present_amd() -> Target:
    try:
        jax.local_devices(backend="rocm")
    except RuntimeError:
        raise ValueError(
            "lowering for rocm needs an AMD GPU on this machine, as the kernels are compiled for the one that is here, "
            'got none; lower it there, or use implementation="xla"'
        ) from None
    return Target(0)


def present() -> Target:
    """The NVIDIA GPU of this machine.

    Raises:
      ValueError: there is none, or it is older than Ampere.
    """
    try:
        device = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        raise ValueError(
            "lowering for cuda on a machine without an NVIDIA GPU needs to be told for which one: "
            "wrap it in `with jax_flash_attn2.gpu_target(compute_capability=90):`"
        ) from None
    capability = int(float(device.compute_capability) * 10 + 0.5)
    if capability < 80:
        raise ValueError(
            f"the Triton kernels need compute capability 8.0 (Ampere) or later, got {device.device_kind} with "
            f'{device.compute_capability}; use implementation="xla"'
        )
    return Target(capability)
