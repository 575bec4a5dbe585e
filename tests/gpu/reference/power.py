"""How many launches it takes to see a rare fault, and what a clean run excludes.

A fault that hits each launch with probability p, independently of the others, stays unseen in n
launches with probability (1 - p)^n. That independence is an assumption: a fault that needs a
certain neighbour or clock is not excluded by launches that never had it.
"""

from __future__ import annotations

import math

CONFIDENCE = 0.999


def excluded(launches: int, confidence: float = CONFIDENCE) -> float:
    """The rate above which a fault would have been seen in so many clean launches; 1 for none.

    The exact upper limit for 0 of n (Clopper and Pearson, 1934): 1 - (1 - confidence)^(1/n).

    Raises:
        ValueError: launches is negative, or confidence not between 0 and 1.
    """
    if launches < 0 or not 0 < confidence < 1:
        raise ValueError(f"launches = {launches}, confidence = {confidence}")
    return -math.expm1(math.log(1 - confidence) / launches) if launches else 1.0


def exclusion(launches: int, confidence: float = CONFIDENCE) -> str:
    """The same as a sentence."""
    return (
        f"{launches:,} clean launches exclude p > {excluded(launches, confidence):.1e} "
        f"at {100 * confidence:g} %"
    )
