"""All that is static about one call, as the primitives carry it."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from ..base.arguments import Implementation
from ..base.config import PASSES, Config
from ..base.spec import Rules, alters_logits
from ..gpu.target import Target


@dataclasses.dataclass(frozen=True)
class Call:
    """All that is static about one call: what is computed, how, by what and for which GPU."""

    rules: Rules
    configs: tuple[Config, ...]
    """What the caller asked for, for each of `config.PASSES`."""
    implementation: Implementation | None
    target: Target | None
    """The GPU that an enclosing `gpu_target` names; None: the one that is there."""

    def config(self, name: str) -> Config:
        """What the caller asked of the pass `name`."""
        return self.configs[PASSES.index(name)]

    def row_stats(self, names: Iterable[str]) -> int:
        """How many numbers of each row the backward pass reads, with operands of these names: lse, or m and l."""
        return 2 if alters_logits(self.rules, names) else 1

    def row_results(self, names: Iterable[str]) -> int:
        """How many numbers of each row the forward pass returns: lse, m and l if the backward pass reads them, and the
        largest logit if the rules want it."""
        return 1 + 2 * alters_logits(self.rules, names) + self.rules.max_logits

    def before_operands(self, names: Iterable[str]) -> int:
        """How many arrays come before these operands in the backward pass: q, k, v, o, do, what o lost if the rules
        want it, and `row_stats`."""
        return 5 + self.rules.lost + self.row_stats(names)

    def with_lost(self, kept: bool) -> "Call":
        """The call, where what o lost is kept, or is not."""
        return dataclasses.replace(self, rules=dataclasses.replace(self.rules, lost=kept))

    def wants_triton(self, dtype: Any) -> bool:
        """Whether a GPU runs the kernels; they have no fp64, which is left to XLA unless Triton is insisted on."""
        return self.implementation == "triton" or (self.implementation is None and dtype != jnp.float64)
