"""How strong the evidence is that one network keeps a floor: p-values, bounds, and how many examples it would take.

Every function sees counts or per-example arrays, never networks. Each p-value is valid at every n: where the floor is broken,
it is at most delta with probability at most delta over the draw of the examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.stats import beta, binom

from resect.errors import DataError

MOST_EXAMPLES = 10**9
MOST_SIMULATED = 10**6
LARGEST_BET = 0.75


def p_accuracy(correct: int, n: int, tau: float) -> float:
    """p-value of "accuracy is below `tau`" after `correct` of `n` independent examples: the exact binomial tail.

    >>> round(p_accuracy(98, 100, 0.92), 4)
    0.0113
    """
    if tau <= 0:
        return 0.0
    return float(binom.sf(correct - 1, n, tau)) if n else 1.0


def p_agreement(agree: int, n: int, eps: float) -> float:
    """p-value of "predictions differ from the dense network's on more than a share `eps`", without labels: exact binomial.

    A network whose predictions differ on at most `eps` of all inputs loses at most `eps` of accuracy, whatever the labels are.
    """
    return p_accuracy(agree, n, 1 - eps)


def p_drop(dense_correct: np.ndarray, candidate_correct: np.ndarray, eps: float, delta: float = 0.05, seed: int = 0) -> float:
    """p-value of "accuracy is more than `eps` below the dense network's", both judged on the same examples, (n,) bool each.

    With D = [dense right] - [candidate right], X = (1 - D) / 2 has mean at most m = (1 - eps) / 2 where the floor is broken.
    A gambler who bets lam_t on X_t > m, choosing lam_t from the examples before t, then cannot expect to win: the wealth
    prod(1 + lam_t (X_t - m)) is a supermartingale, and 1 / its maximum is a p-value (Ville). lam_t is the predictable plug-in
    of Waudby-Smith & Ramdas (2023), section 3.2, for a sample of known size, cut at .75 / m. `delta` only tunes the bets: the
    p-value is valid for every delta. Examples are taken in an order drawn from `seed`, so that sorted data do no harm.

    Raises DataError when the two arrays are not on the same examples.
    """
    dense = np.asarray(dense_correct, dtype=bool)
    candidate = np.asarray(candidate_correct, dtype=bool)
    if dense.ndim != 1 or dense.shape != candidate.shape:
        raise DataError(
            f"the dense network was judged on examples of shape {dense.shape} and the candidate on {candidate.shape}; "
            "evaluate both on the same batches"
        )
    order = np.random.default_rng(seed).permutation(len(dense))
    x = (1.0 - (dense[order].astype(np.float64) - candidate[order])) / 2
    return math.exp(-log_wealth(x, mean=(1 - eps) / 2, delta=delta).max(initial=0.0))


def log_wealth(x: np.ndarray, *, mean: float, delta: float) -> np.ndarray:
    """Log wealth, (n,), after each example: stake 1, on x, (n,) in [0, 1], being above `mean` on average (see `p_drop`)."""
    n = len(x)
    seen = np.arange(2, n + 2)
    centre = (0.5 + np.cumsum(x)) / seen
    variance = (0.25 + np.cumsum((x - centre) ** 2)) / seen
    before = np.concatenate([[0.25], variance])[:n]
    bets = np.minimum(np.sqrt(2 * math.log(1 / delta) / (max(n, 1) * before)), LARGEST_BET / mean)
    return np.cumsum(np.log1p(bets * (x - mean)))


def lower_bound(correct: int, n: int, delta: float = 0.05) -> float:
    """The one-sided Clopper-Pearson bound: the accuracy of this one network is at least this, with probability 1 - delta.

    >>> round(lower_bound(98, 100), 4)
    0.9384
    """
    return float(beta.ppf(delta, correct, n - correct + 1)) if correct else 0.0


def needed_for_accuracy(rate: float, tau: float, delta: float = 0.05) -> int | None:
    """How many examples `p_accuracy` needs when the share `rate` of them is right; None when no number would do.

    >>> needed_for_accuracy(0.97, 0.95)
    386
    """
    if rate <= tau:
        return None

    def passes(n: int) -> bool:
        return p_accuracy(math.floor(rate * n + 1e-9), n, tau) <= delta

    return _smallest(passes)


def needed_for_drop(loss: float, gain: float, eps: float, delta: float = 0.05) -> int | None:
    """About how many examples `p_drop` needs when the dense network alone is right on `loss` of them, the candidate on `gain`.

    On a margin g, bets sqrt(2 log(1/delta) / (n v)) win log(1/delta) from n = 2 v log(1/delta) / g^2 examples, and bets at
    their cap from log(1/delta) / log(1 + .75 g / m). From there n grows until the bets win on a sample whose losses and gains
    arrive evenly (in simulation, 6 of 10 random samples then pass). None when the observed drop is not below `eps`.

    >>> needed_for_drop(loss=0.006, gain=0.004, eps=0.01)
    1391
    """
    margin = eps - (loss - gain)
    if margin <= 0:
        return None
    variance = loss + gain - (loss - gain) ** 2
    evidence = math.log(1 / delta)
    needed = max(2 * variance * evidence / margin**2, evidence / math.log1p(LARGEST_BET * margin / (1 - eps)))
    while needed < MOST_SIMULATED and not _wins_evenly(math.ceil(needed), loss, gain, eps, delta):
        needed *= 1.02
    return math.ceil(needed) if needed <= MOST_EXAMPLES else None


def _wins_evenly(n: int, loss: float, gain: float, eps: float, delta: float) -> bool:
    times = np.arange(n + 1)
    lost, won = (np.diff(np.floor(rate * times + 0.5)) for rate in (loss, gain))
    return log_wealth((1 - lost + won) / 2, mean=(1 - eps) / 2, delta=delta).max() >= math.log(1 / delta)


def _smallest(passes: Callable[[int], bool]) -> int | None:
    """The smallest n that passes, found by doubling and halving (exact up to the saw-tooth of a discrete distribution)."""
    high = 1
    while not passes(high):
        high *= 2
        if high > MOST_EXAMPLES:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high
