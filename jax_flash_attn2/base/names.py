"""Arguments under the names that other libraries have for them: an error says which is ours."""

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any

_NEEDLESS = {
    **dict.fromkeys(("enable_gqa", "num_kv_heads"), "fewer heads of k and v than of q need no option"),
    **dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), "no largest length is asked for; leave it out"),
    "deterministic": "results and gradients always repeat bit for bit, and nothing is dropped without a dropout rate",
}
"""What other libraries ask for, and why nobody has to here."""

_THEIRS = {
    "q": ("query",),
    "k": ("key", "k_cache"),
    "v": ("value", "v_cache"),
    "causal": ("is_causal", "use_causal_mask"),
    "softmax_scale": ("scale", "sm_scale", "scaling"),
    "mask": ("attn_mask", "attention_mask", "mask_mod", "block_mask"),
    "bias": ("attn_bias", "ab"),
    "mask[:, None, None, :], or kv_lengths": ("padding_mask", "key_padding_mask", "src_key_padding_mask"),
    "dropout_rate": ("dropout_p", "dropout"),
    "dropout_seed": ("dropout_rng", "dropout_key"),
    "logits_soft_cap": ("softcap", "soft_cap", "logit_cap", "attn_logits_soft_cap"),
    "window_size": ("window", "local_window_size", "sliding_window"),
    "q_segment_ids and kv_segment_ids": ("segment_ids", "query_segment_ids"),
    "q_positions and kv_positions": ("position_ids", "positions", "input_positions"),
    "q_lengths": ("query_seq_lengths", "query_lengths"),
    "kv_lengths": ("key_value_seq_lengths", "cache_seqlens", "seq_lens", "kv_seq_lens"),
    "sinks": ("s_aux", "sink", "attention_sinks", "learnable_sink"),
    "alibi_slopes": ("alibi", "slopes"),
    "return_lse": ("return_residual", "return_softmax_lse", "save_residuals"),
    "return_lse=True, and exp(logit - lse), as probabilities are never held": ("return_attn_probs",),
    "config=Config(block_m=..., block_n=...)": (
        "blocksize_q",
        "blocksize_k",
        "block_q",
        "block_k",
        "block_sizes",
        "kernel_options",
    ),
    "config=Config(precision=...)": ("precision",),
    "varlen_attention(q, k, v, cu_q_lens, cu_k_lens)": ("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens"),
    "paged_attention(..., page_table, lengths)": ("block_table", "block_tables", "page_indices", "page_table"),
    "implementation": ("backend",),
}
"""Of each argument of ours: what `jax.nn`, FlexAttention, flash-attn, splash attention and Transformers call it."""

_OURS = {theirs: ours for ours, names in _THEIRS.items() for theirs in names}


def check(function: str, given: Iterable[str], taken: Collection[str]) -> None:
    """Raises a TypeError for the first name that is not taken.

    Args:
      function: the caller's, for the message.
      given: names of arguments.
      taken: the names that it has.
    """
    for name in given:
        if name not in taken:
            raise TypeError(f"{function} has no argument {name!r}{_instead(name, taken)}")


def _instead(name: str, taken: Collection[str]) -> str:
    """What to write in its place."""
    if name in _NEEDLESS:
        return f": {_NEEDLESS[name]}"
    ours = _OURS.get(name, "")
    there = [x for x in (ours, *_THEIRS.get(name, ())) if x in taken or (x and not x.isidentifier())]
    if there:  # a door that stands in for another library has that one's names
        return f"; here it is {there[0]}"
    close = difflib.get_close_matches(name, taken, n=1)
    return f"; did you mean {close[0]}?" if close else f"; it has {', '.join(taken)}"


def of_function(function: Any) -> str:
    """A caller's function in a message: its name, and where it is written, if it is one of Python's."""
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    inner = getattr(inner, "__wrapped__", inner)  # of a jitted one
    code = getattr(inner, "__code__", None)
    if code is None:
        return repr(function)
    return f"{inner.__name__} ({code.co_filename}:{code.co_firstlineno})"


def by_our_names(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose arguments' names and number are checked with words that say what to do.

    To type checkers it takes anything: a function's overloads say what it takes, in options (`TypedDict`) to which they
    do not compare its arguments.
    """
    parameters = inspect.signature(function).parameters.values()
    named = {p.name: None for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    places = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    others = [name for name in named if name not in places]
    name, most, example = function.__name__, len(places), "mask" if "mask" in others else others[0]

    @functools.wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        if len(args) > most:
            raise TypeError(
                f"{name} takes {most} positional arguments ({', '.join(places)}), got {len(args)}; "
                f"give others by name, such as {example}="
            )
        if not options.keys() <= named.keys():
            check(name, options, named)
        return function(*args, **options)

    return checked
