"""A lower bound on the step of any plan.

    lower_bound(options, upper=...) -> seconds          no plan under these options and memory limits is faster

For a step z a plan may use only options whose every part fits into z alone.  If even the cheapest choice of them takes
more time, summed over all ranks, than W ranks have in z, or the cheapest that fits the memory does (a Lagrange
multiplier prices the memory; any multiplier gives a valid bound), no plan reaches z.  The smallest z that passes is the
bound: more options pass for a larger z and there is more time, so bisection finds it.

Parts cannot be cut, so W bins may not hold what their volume would: dual feasible functions f (Fekete and Schepers,
"New classes of fast lower bounds for bin packing problems", 2001) map every part x = time / z to f(x) such that the
f(x) of parts that fit one rank sum to at most 1; their sum over all parts may not exceed W either.

Shapes: K kinds, T tables, P positions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from sharding.cost import Prices

STEPS = 40  # of a bisection
MULTIPLIER_STEPS = 24
HOST_STEPS = 10  # of the multiplier of the host's memory, each with a search for the device's
TINY = 1e-9  # seconds: shorter than any step
SLACK = 1e-9  # relative; sums in another order differ by less
CLOSE = 2e-3  # a set of sharding types whose bound cannot be lower by more than this is not looked at in detail


@dataclass(frozen=True, eq=False)
class Options:
    """Every kind of every table, summed and at its largest part.

    wanted (K, T): what the rules and the table's shape allow; allowed (K, T): of that, what fits a rank.
    main, main_max, input, input_max, device, device_max, host (K, T): seconds and bytes.
    device_limit: bytes of each rank for tables; host_limit: of each host.
    """

    prices: Prices
    wanted: np.ndarray
    allowed: np.ndarray
    device_limit: float
    host_limit: float
    main: np.ndarray
    main_max: np.ndarray
    input: np.ndarray
    input_max: np.ndarray
    device: np.ndarray
    device_max: np.ndarray
    host: np.ndarray

    @classmethod
    def of(cls, prices: Prices, allowed: np.ndarray, *, device_limit: float, host_limit: float) -> "Options":
        """device_limit: bytes of each rank, with what every plan needs; a part that exceeds it alone is not allowed."""
        world = prices.topology.world_size
        shape = (len(prices.kinds), len(prices.tables))
        sums = {name: np.zeros(shape) for name in ("main", "input", "device", "host")}
        most = {name: np.zeros(shape) for name in ("main", "input", "device")}
        for k, kind in enumerate(prices.kinds):
            copies = kind.copies(world)
            parts = {
                "main": prices.main_seconds(k),
                "input": prices.input_seconds(k),
                "device": kind.device.sum(0),
                "host": kind.host.sum(0),
            }
            for name, part in parts.items():
                sums[name][k] = part @ copies
                if name in most:
                    most[name][k] = part.max(1)
        limit = device_limit - prices.base_bytes
        valid = np.array([kind.valid for kind in prices.kinds])
        return cls(
            prices=prices,
            wanted=allowed & valid,
            allowed=allowed & valid & (most["device"] <= limit),
            device_limit=limit,
            host_limit=host_limit,
            main_max=most["main"],
            input_max=most["input"],
            device_max=most["device"],
            **sums,
        )

    @property
    def device_total(self) -> float:
        return self.device_limit * self.prices.topology.world_size

    @property
    def host_total(self) -> float:
        return self.host_limit * self.prices.topology.hosts

    def shardings(self) -> list[str]:
        """Types that some table may have."""
        kinds = self.prices.kinds
        return list(dict.fromkeys(kinds[k].kind.sharding for k in range(len(kinds)) if self.allowed[k].any()))

    def only(self, shardings: Sequence[str]) -> np.ndarray:
        """(K, T) allowed options of these types."""
        rows = np.array([kind.kind.sharding in shardings for kind in self.prices.kinds])
        return self.allowed & rows[:, None]


def group_seconds(prices: Prices, shardings: Sequence[str]) -> tuple[float, float]:
    """Seconds, on the main and on the hidden path, for having these types."""
    pairs = [prices.group[s] for s in shardings]
    return sum(p[0] for p in pairs), sum(p[1] for p in pairs)


def lower_bound(options: Options, *, upper: float) -> float:
    """Seconds that no plan can be below.

    upper: the step of a known plan.  Every table must have an allowed option.
    """
    types = options.shardings()
    best = np.inf
    free = _smallest(options, options.allowed, (0.0, 0.0), 0.0, upper)  # all types, none of them paid for
    subsets = [s for n in range(1, len(types) + 1) for s in combinations(types, n)]
    # Where the ids' path binds, only what the types add to that path is added to the step.
    least = {s: min(group) if options.prices.hidden else group[0] for s in subsets for group in
             [group_seconds(options.prices, s)]}  # fmt: skip
    for subset in sorted(subsets, key=lambda s: (least[s], group_seconds(options.prices, s))):
        group, quick = group_seconds(options.prices, subset), free + least[subset]
        if quick >= best * (1 - CLOSE):
            best = min(best, quick)
            break  # the others cost more still
        allowed = options.only(subset)
        if allowed.any(0).all():
            best = min(best, _smallest(options, allowed, group, quick, min(best, upper)))
    if upper > best * 1.005:
        best = max(
            best, _smallest(options, options.allowed, _cheapest(options.prices, types), best, upper, packed=True)
        )
    return min(best, upper) * (1 - SLACK)


def cheapest_subsets(options: Options, step: float) -> list[tuple[str, ...]]:
    """The sets of sharding types with which a plan of `step` seconds is not shown to be impossible by its volume, those
    that take the fewest ranks first."""
    types, prices = options.shardings(), options.prices
    found = []
    for subset in (s for n in range(1, len(types) + 1) for s in combinations(types, n)):
        group = group_seconds(prices, subset)
        allowed = options.only(subset)
        if allowed.any(0).all() and passes(options, allowed, step, group):
            room = step - prices.base_seconds - group[0]
            volume = np.where(allowed & (options.main_max <= room * (1 + SLACK)), options.main, np.inf).min(0).sum()
            found.append((volume / room if room > 0 else 0.0, len(subset), subset))
    return [subset for _, _, subset in sorted(found)]


def _cheapest(prices: Prices, types: Sequence[str]) -> tuple[float, float]:
    """What having at least one type costs at least."""
    pairs = [prices.group[s] for s in types]
    return min(p[0] for p in pairs), min(p[1] for p in pairs)


def _smallest(
    options: Options,
    allowed: np.ndarray,
    group: tuple[float, float],
    low: float,
    high: float,
    *,
    packed: bool = False,
) -> float:
    """The largest step up to `high` of which it is shown that no plan is below it."""
    base = options.prices.base_seconds
    low = max(low, base + group[0], group[1])
    if not high > low or passes(options, allowed, low, group, packed=packed):
        return min(low, high)
    if not np.isfinite(high):  # nothing to bisect with: double until a step passes, which the longest ones do
        high = 2 * max(low, TINY)
        while np.isfinite(high) and not passes(options, allowed, high, group, packed=packed):
            low, high = high, 2 * high
        if not np.isfinite(high):
            return high
    elif not passes(options, allowed, high, group, packed=packed):
        return high
    for _ in range(STEPS if not packed else 16):
        middle = 0.5 * (low + high)
        if passes(options, allowed, middle, group, packed=packed):
            high = middle
        else:
            low = middle
        if high - low <= 1e-7 * high:
            break
    return low


def passes(
    options: Options, allowed: np.ndarray, step: float, group: tuple[float, float], *, packed: bool = False
) -> bool:
    """False where it is shown that no plan takes `step` seconds or less."""
    prices, world = options.prices, options.prices.topology.world_size
    main = (step - prices.base_seconds - group[0]) * (1 + SLACK)
    hidden = (step - group[1]) * (1 + SLACK)
    fits = allowed & (options.main_max <= main) & (options.input_max <= hidden)
    if not fits.any(0).all():
        return False
    if main <= 0:
        return not options.main[fits].any()
    shared = [options.main / main]
    if prices.hidden:
        shared += [options.input / hidden, 0.5 * (options.main / main + options.input / hidden)]
    if any(_cheapest_total(options, w, fits) > world * (1 + SLACK) for w in shared):
        return False
    if packed:
        main *= 1 + 1e-6  # parts that just fit then fit whatever the last bits of their sums are
        for f in _dual_feasible():
            weight = np.zeros_like(options.main)
            for k, kind in enumerate(prices.kinds):
                if fits[k].any():
                    weight[k] = f(prices.main_seconds(k) / main) @ kind.copies(world)
            if _cheapest_total(options, weight, fits) > world * (1 + 1e-6):
                return False
    return True


def _cheapest_total(options: Options, weight: np.ndarray, fits: np.ndarray) -> float:
    """The least sum of `weight` over one fitting option per table that fits the memory, or a bound below it."""
    least, device, host = priced_choice(options, weight, fits)
    total = float(_chosen(weight, least).sum())
    for multiplier, used, limit in ((device, options.device, options.device_total),
                                    (host, options.host, options.host_total)):  # fmt: skip
        if multiplier:
            total += multiplier * float(_chosen(used, least).sum() - limit)
    return total


def _chosen(values: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    return values[kinds, np.arange(len(kinds))]


def priced_choice(
    options: Options, weight: np.ndarray, fits: np.ndarray, *, fill: float = 1.0, inside: bool = False
) -> tuple[np.ndarray, float, float]:
    """((T,) kinds, d, h): those of least weight + d * device bytes + h * host bytes, with the multipliers that bound
    the weight best.

    fill: share of the memory to use.  inside: choose on the side of the multipliers that fits the memory.
    """

    def by_device(priced: np.ndarray) -> tuple[np.ndarray, float]:
        return _multiplied(priced, options.device, fits, options.device_total * fill, inside=inside)

    both, room = options.device + options.host, (options.device_total + options.host_total) * fill
    least = np.where(fits, both, np.inf).argmin(0)
    if (short := _chosen(both, least).sum() - room) > 0:  # nothing fits, and multipliers that say so
        enough = 1e6 * float(np.where(fits, weight, 0).max(0).sum() + 1) / short
        return np.where(fits, weight + enough * both, np.inf).argmin(0), enough, enough
    least, device = by_device(weight)
    limit = options.host_total * fill
    if _chosen(options.host, least).sum() <= limit:
        return least, device, 0.0
    host = _multiplier(
        weight, options.host, fits, limit, lambda priced: by_device(priced)[0], inside=inside, steps=HOST_STEPS
    )
    return *by_device(np.where(fits, weight, 0.0) + host * options.host), host


def _multiplied(
    weight: np.ndarray, used: np.ndarray, fits: np.ndarray, limit: float, *, inside: bool
) -> tuple[np.ndarray, float]:
    """((T,) kinds of least weight + multiplier * used, multiplier), as priced_choice for one memory."""

    def cheapest(priced: np.ndarray) -> np.ndarray:
        return np.where(fits, priced, np.inf).argmin(0)

    least = cheapest(weight)
    if _chosen(used, least).sum() <= limit:
        return least, 0.0
    multiplier = _multiplier(weight, used, fits, limit, cheapest, inside=inside)
    return cheapest(weight + multiplier * used), multiplier


def _multiplier(
    weight: np.ndarray,
    used: np.ndarray,
    fits: np.ndarray,
    limit: float,
    cheapest: Callable[[np.ndarray], np.ndarray],
    *,
    inside: bool,
    steps: int = MULTIPLIER_STEPS,
) -> float:
    """By bisection: the multiplier of `used` for which the weight is bounded best, or the least found that fits.

    cheapest: (K, T) weights -> (T,) kinds.
    """
    low, high = 0.0, max(float(np.where(fits, weight, 0).max()), 1e-30) / max(limit, 1.0)
    short = np.where(fits, used, np.inf).min(0).sum() - limit
    if short > 0:  # nothing fits, and a multiplier that says so
        return 1e6 * (float(np.where(fits, weight, 0).max(0).sum()) + high) / short
    for _ in range(2 * steps):
        if _chosen(used, cheapest(weight + high * used)).sum() <= limit:
            break
        high *= 4
    else:
        return high
    best, best_value = 0.0, -np.inf
    for _ in range(steps):
        middle = 0.5 * (low + high)
        tried = cheapest(weight + middle * used)
        over = _chosen(used, tried).sum() - limit
        value = _chosen(weight, tried).sum() + middle * over
        if value > best_value:
            best, best_value = middle, value
        low, high = (middle, high) if over > 0 else (low, middle)
    return high if inside else best


def _dual_feasible() -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """Functions f on [0, 1] with sum f(x_i) <= 1 wherever sum x_i <= 1."""
    for k in (1, 2, 3, 4, 5):
        yield lambda x, k=k: _rounded(x, k)
    for edge in (0.5, 0.4, 1 / 3, 0.25, 0.2):
        yield lambda x, e=edge: np.where(x > 1 - e, 1.0, np.where(x < e, 0.0, x))


def _rounded(x: np.ndarray, k: int) -> np.ndarray:
    """floor((k + 1) x) / k, and x itself where (k + 1) x is whole: with k = 1, parts above a half count as one."""
    scaled = (k + 1) * x
    near = np.abs(scaled - np.rint(scaled)) < 1e-9
    return np.where(near, x, np.floor(scaled) / k)
