"""What an audit says of an encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unpoison.audit.decree import Inversion
from unpoison.records import Verdict

__all__ = ["AuditResult"]


@dataclass(frozen=True, eq=False)
class AuditResult:
    """The answer of one audit, and what it rests on.

    Attributes:
        verdict: `poisoned`, `no_evidence` or `inconclusive`; without a reference always the last.
        found: the trigger of the best start: the smallest mask that collapses the features as wanted, or where that is
            a part of a stronger trigger, the whole of it; else, of the relaxed search, or of the largest collapse.
        examples: (E, 3, S, S) uint8, clean images that were not searched with.
        stamped: (E, 3, S, S) uint8, the same with the trigger.
        reference_shares: mask shares of the clean encoders it was compared with, ascending; may be empty.
        summary: the content of verdict.json.
    """

    verdict: Verdict
    found: Inversion
    examples: Tensor
    stamped: Tensor
    reference_shares: tuple[float, ...]
    summary: dict[str, Any]

    @property
    def mask_share(self) -> float:
        """Mean of the smallest mask that collapses the features as wanted; 1 when none does. The paper's PL1."""
        return float(self.summary["mask_share"])
