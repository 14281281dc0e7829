"""Flash attention in `equinox.nn.MultiheadAttention`.

    attention = MultiheadAttention(8, 512, causal=True, key=key)  # where equinox.nn.MultiheadAttention was
    model = use_flash_attention(model, causal=True)               # or in a model that exists, weights and all

Importing this imports Equinox.
"""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .base import names, versions
from .base.errors import install
from .call import api
from .call.api import flash_attention
from .call.combined import booleans, both, floating, is_structured
from .call.options import AnyMask

versions.check("jax_flash_attn2.equinox", "equinox")
try:
    import equinox as eqx
except ImportError as error:
    raise ImportError(f"jax_flash_attn2.equinox needs Equinox ({error}): {install('equinox')}") from error

_OPTIONS = (
    "causal", "causal_alignment", "window_size", "mask", "score_mod", "logits_soft_cap", "softmax_scale",
    "implementation", "block_ptr", "config", "higher_order",
)  # fmt: skip
"""Arguments of `flash_attention` that a module keeps: no arrays among them. All others are given when it is called."""
_AT_THE_CALL = tuple(name for name in api.ARRAYS if name not in ("q", "k", "v", "dropout_seed", *_OPTIONS))
_THEIRS = tuple(inspect.signature(eqx.nn.MultiheadAttention.__init__).parameters)[1:]


class MultiheadAttention(eqx.nn.MultiheadAttention):
    """`equinox.nn.MultiheadAttention`: the same fields, arguments and numbers, without the `[T, S]` weights.

    Two differences: a query that sees no key gets 0 (before the output projection) instead of the mean of all values,
    and dropout drops other keys, at the same rate, independently for each head.

    Examples:
      >>> attention = MultiheadAttention(2, 32, causal=True, key=jax.random.key(0))
      >>> x = jnp.ones((16, 32))
      >>> attention(x, x, x, sinks=jnp.zeros(2)).shape
      (16, 32)
    """

    options: tuple[tuple[str, Any], ...] = eqx.field(static=True)
    """Arguments of `flash_attention`, by name."""

    def __init__(self, *args: Any, **kwargs: Any):
        """Takes what `equinox.nn.MultiheadAttention` takes, and options for `flash_attention`.

        Args:
          *args: num_heads, query_size and so on.
          **kwargs: likewise; and causal, causal_alignment, window_size, mask (a predicate, without arrays), score_mod,
            logits_soft_cap, softmax_scale, implementation, block_ptr, config, higher_order, all static: hashable, and
            no arrays.

        Raises:
          TypeError: there is no such argument, or an option is not hashable.
        """
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        _check_names(kwargs, (*_THEIRS, *_OPTIONS))
        super().__init__(*args, **kwargs)
        self.options = _static(options)

    def __call__(
        self,
        query: Array,
        key_: Array,
        value: Array,
        mask: "AnyMask | None" = None,
        *,
        key: Array | None = None,
        inference: bool | None = None,
        deterministic: bool | None = None,
        process_heads: Callable[[Array, Array, Array], tuple[Array, Array, Array]] | None = None,
        **arguments: Any,
    ) -> Array:
        """Attends. There is no batch axis: `jax.vmap` maps over one.

        Args:
          query: `[T, query_size]`.
          key_: `[S, key_size]`.
          value: `[S, value_size]`.
          mask: `[T, S]` or `[num_heads, T, S]`; True (or not 0): attend. Or what else `flash_attention` takes: a
            predicate, a `BlockMask` or a `Mask` of `[1, 1 or num_heads, T, S]`. Beside a mask of the module's own, what
            both let through is seen.
          key: a PRNG key for dropout, typed or not.
          inference: True: no dropout; None: what the module's own dropout says.
          deterministic: the old name of inference.
          process_heads: changes the heads of queries, keys and values before attention, and leaves their shapes.
          **arguments: of `flash_attention`, for this call: bias, q_segment_ids, sinks and so on, for arrays without a
            batch axis; and options, which then take the place of the module's.

        Returns:
          `[T, output_size]`.

        Raises:
          RuntimeError: dropout without a key.
          ValueError, TypeError: shapes or dtypes do not fit, or as in `flash_attention`.
        """
        if deterministic is not None:
            inference = deterministic
            warnings.warn("MultiheadAttention()(deterministic=...) is now inference=...", stacklevel=2)
        if key_.shape[0] != value.shape[0]:
            raise ValueError(
                f"key and value must both be sequences of equal length, got {key_.shape[0]} and {value.shape[0]}"
            )
        for name in ("dropout_rate", "dropout_seed", "return_lse", "return_max_logits"):
            if name in arguments:
                raise TypeError(f"{name} is not for this call: the module has a dropout, and returns the output alone")

        heads = tuple(
            jax.vmap(projection)(x).reshape(x.shape[0], self.num_heads, size)
            for projection, x, size in (
                (self.query_proj, query, self.qk_size),
                (self.key_proj, key_, self.qk_size),
                (self.value_proj, value, self.vo_size),
            )
        )
        if process_heads is not None:
            shapes = [x.shape for x in heads]
            heads = process_heads(*heads)
            if [x.shape for x in heads] != shapes:
                raise ValueError(
                    f"process_heads must not change the shapes of the heads, {shapes}, got {[x.shape for x in heads]}"
                )
        dtype = jnp.result_type(*heads)
        options = {**dict(self.options), **arguments}
        given = self._seen(mask, query.shape[0], key_.shape[0])
        mask, bias = both(options.pop("mask", None), given, floating(options.pop("bias", None)))
        q, k, v = (x.astype(dtype) for x in heads)
        o = flash_attention(q, k, v, bias, mask=mask, **self._dropout(key, inference), **options)
        return jax.vmap(self.output_proj)(o.reshape(query.shape[0], self.num_heads * self.vo_size))

    def _seen(self, mask: Any, seqlen_q: int, seqlen_k: int) -> Any:
        if mask is None or is_structured(mask):
            return mask
        if not isinstance(mask, Array | np.ndarray):
            raise TypeError(
                f"mask must be an array, a predicate, a BlockMask or a Mask, got {type(mask).__name__}; make it "
                f"jnp.asarray(mask)"
            )
        if mask.shape not in ((seqlen_q, seqlen_k), (self.num_heads, seqlen_q, seqlen_k)):
            raise ValueError(
                f"mask must have shape (query_seq_length, kv_seq_length)=({seqlen_q}, {seqlen_k}), or num_heads="
                f"{self.num_heads} of them. Got {mask.shape}."
            )
        return booleans(mask)

    def _dropout(self, key: Array | None, inference: bool | None) -> dict[str, Any]:
        rate = self.dropout.p
        if (self.dropout.inference if inference is None else inference) or (isinstance(rate, int | float) and not rate):
            return {}
        if key is None:
            raise RuntimeError("Dropout requires a key when running in non-deterministic mode.")
        return {"dropout_rate": rate, "dropout_seed": key}


def use_flash_attention[Model](model: Model, **options: Any) -> Model:
    """The model, with every `equinox.nn.MultiheadAttention` in it turned into this module's.

    Args:
      model: any PyTree. Weights are taken over as they are. Attention that somebody derived from Equinox's is left
        alone, as it may not be what it was.
      **options: as in `MultiheadAttention`. Attention that is this module's already is left as it is.

    Returns:
      A PyTree like the model.

    Raises:
      TypeError: there is no such option, or it is not hashable.
      ValueError: there is no attention to turn, or attention that is this module's already has other options.

    Examples:
      >>> import equinox as eqx
      >>> theirs = eqx.nn.MultiheadAttention(2, 32, key=jax.random.key(0))
      >>> ours, x = use_flash_attention(theirs), jax.random.normal(jax.random.key(1), (16, 32))
      >>> bool(jnp.allclose(ours(x, x, x), theirs(x, x, x), atol=1e-5))
      True
    """
    static = _static(options)
    found: list[eqx.nn.MultiheadAttention] = []

    def is_theirs(x: Any) -> bool:
        if isinstance(x, eqx.nn.MultiheadAttention):
            found.append(x)
        return _is_exactly_theirs(x)

    def turned(x: Any) -> Any:
        if not _is_exactly_theirs(x):
            return x
        new = object.__new__(MultiheadAttention)  # as Equinox makes a module from its leaves
        for field in dataclasses.fields(x):
            object.__setattr__(new, field.name, getattr(x, field.name))
        object.__setattr__(new, "options", static)
        return new

    result = jax.tree.map(turned, model, is_leaf=is_theirs)
    ours = [x for x in found if isinstance(x, MultiheadAttention)]
    for x in ours:
        _check_same(dict(x.options), dict(static))
    if not ours and not any(map(_is_exactly_theirs, found)):
        derived = ", ".join(sorted({type(x).__name__ for x in found}))
        what = f"only what is derived from it ({derived}), which may not be what it was" if found else "none"
        raise ValueError(
            f"model must have an equinox.nn.MultiheadAttention to turn, got {what}; call flash_attention in attention "
            f"of your own"
        )
    return result


def _is_exactly_theirs(x: Any) -> bool:
    return type(x) is eqx.nn.MultiheadAttention


def _check_same(own: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises unless attention that is ours already does what these options say."""
    defaults = api.defaults()
    for name, x in given.items():
        kept = own.get(name, defaults[name])
        if kept != x:
            raise ValueError(
                f"model has attention that is jax_flash_attn2's already, with {name}={kept!r}, got {name}={x!r}; make "
                f"it with that option, or give it at the call"
            )


def _check_names(given: Iterable[str], taken: tuple[str, ...]) -> None:
    for name in given:
        if name in _AT_THE_CALL:
            raise TypeError(
                f"MultiheadAttention has no argument {name!r}: arrays are given when it is called, "
                f"attention(query, key, value, {name}=...)"
            )
    names.check("MultiheadAttention", given, taken)


def _static(options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Options as part of a module's structure."""
    _check_names(options, _OPTIONS)
    if isinstance(options.get("window_size"), list):
        options["window_size"] = tuple(options["window_size"])
    for name, x in options.items():
        if name == "mask" and (
            not callable(x) or any(isinstance(leaf, Array | np.ndarray) for leaf in jax.tree.leaves(x))
        ):
            raise TypeError(
                f"mask as an option is static, so it must be a predicate without arrays, got {type(x).__name__}; give "
                f"others when the module is called"
            )
        try:
            hash(x)
        except TypeError:
            raise TypeError(f"{name} must be hashable, as it is static, got {type(x).__name__}") from None
    return tuple(sorted(options.items()))
