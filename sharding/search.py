"""A good plan, fast: choices of kinds by price, parts to ranks by longest-first, then improved one table at a time.

    search(options) -> Found or None       None where no choice of kinds was found that fits the memory

The kinds of all tables are the state of the search, and `place` decodes them into a plan; everything is deterministic.

Shapes: K kinds, T tables, W ranks, P positions.
"""

from collections.abc import Iterator

import numpy as np

from sharding.bound import Options, cheapest_subsets, group_seconds, priced_choice
from sharding.configurations import relax
from sharding.cost import Choice
from sharding.placing import Found, Placer

FINER = (1.0, 0.6, 0.4, 0.25, 0.12)  # of the step aimed at: the largest part that a choice may have
COARSER = (1.3, 1.7, 2.5, 5.0, 20.0, np.inf)  # the same, where parts so small do not fit the memory
CLOSE_ENOUGH = 0.01  # of the bound; farther from it ranks are filled one after the other
ROUNDS = 7  # of halving the distance between what was reached and what was not
NEARER = 0.4  # the next step tried, from what was not reached to what was
SUBSETS = 4  # sets of sharding types that are tried for a step, those that need the fewest ranks first
SPARES = (0.005, 0.015, 0.03)  # shares of a rank's time that the program leaves free: parts do not fill it wholly
PROGRAMS = 12_000  # tables in all programs over configurations that a search solves: 12 of 1,000 tables, 10 s or so
ROUNDINGS, ROUNDED = 32, 800  # ways to round a program's shares that are tried, and tables in all of them
FILLS = (1.0, 0.95, 0.85)  # shares of the memory that a choice may use, where it is short
DECODED = 40_000  # parts placed while improving, over all trials: about a second and a half
MOVES = 300  # of parts off the slowest rank, when a plan is polished
LIGHTEST = 24  # ranks that a part may go to then
EVERYTHING = 400  # table and kind pairs; up to here every change of one table is tried


def search(options: Options, *, aim: float) -> Found | None:
    """The best plan found.  aim: a step that no plan is below, in seconds."""
    placer = Placer(options)
    found = [placer.place(chosen, by_memory=by_memory) for chosen, by_memory in _starts(options, aim)]
    best = min((f for f in found if f is not None), key=lambda f: f.step, default=None)
    if best is None:
        return None
    best = _improve(options, placer, best)
    return _filled(options, placer, aim, polish(placer, best))


def fits_somehow(options: Options) -> bool:
    """Whether any of the plans that a search begins with fits the memory."""
    placer = Placer(options)
    return any(placer.place(chosen, by_memory=True) is not None for chosen, _ in _starts(options, np.inf))


def _filled(options: Options, placer: Placer, aim: float, best: Found) -> Found:
    """Kinds by the program over configurations, ranks filled one after the other, for steps between the bound and the
    best so far."""
    low = aim
    programs = iter(range(max(1, PROGRAMS // len(options.prices.tables))))
    for _ in range(ROUNDS):
        if best.step <= low * (1 + CLOSE_ENOUGH):
            break
        step = low + NEARER * (best.step - low)
        found = _reach(options, placer, step, programs)
        if found is None:
            low = step
        else:
            best = polish(placer, found)
    return best


def _reach(options: Options, placer: Placer, step: float, programs: Iterator[int]) -> Found | None:
    """A plan that takes at most `step` seconds, or None where none was found.  programs: has one for each to solve."""
    roundings = max(1, min(ROUNDINGS, ROUNDED // len(options.prices.tables)))
    for shardings in cheapest_subsets(options, step)[:SUBSETS]:
        for spare in SPARES:
            if next(programs, None) is None:
                return None
            rounded = relax(options, shardings, step, spare=spare, roundings=roundings).kinds
            if not rounded:
                break  # and none that leaves more free
            for kinds in rounded:
                found = placer.fill(kinds, step)
                if found is not None:
                    return found
    return None


def _starts(options: Options, aim: float):
    """Choices of kinds to begin with: the cheapest with parts no larger than a share of the step, over the sets of
    sharding types that pay for their collectives."""
    seen: set[bytes] = set()
    types = options.shardings()
    sets = [tuple(types)]
    sets += [tuple(t for t in types if t != left_out) for left_out in types if len(types) > 1]
    sets += [pair for pair in (("table_wise",), ("table_wise", "data_parallel"), ("table_wise", "column_wise")) if
             set(pair) <= set(types)]  # fmt: skip
    sets += [(t,) for t in types]
    base = options.prices.base_seconds
    for subset in dict.fromkeys(sets):
        allowed = options.only(subset)
        if not allowed.any(0).all():
            continue
        group = group_seconds(options.prices, subset)
        room = max(aim - base - group[0], 1e-12)
        for share in (*reversed(COARSER), *FINER):
            small = allowed & (options.main_max <= share * room * (1 + 1e-9))
            # A table that has nothing so fine takes its finest.
            finest = np.where(allowed, options.main_max, np.inf)
            small |= allowed & ~small.any(0) & (finest <= finest.min(0))
            for fill in FILLS:
                chosen, *multipliers = priced_choice(options, options.main, small, fill=fill, inside=True)
                short = any(multipliers)
                if (share > 1 and not short) or not _fit(options, chosen):
                    break
                for by_memory in (False, True) if short else (False,):
                    mark = chosen.tobytes() + bytes([by_memory])
                    if mark not in seen:
                        seen.add(mark)
                        yield chosen, by_memory
                if not short:
                    break


def _fit(options: Options, chosen: np.ndarray) -> bool:
    """Whether the memory of all ranks and hosts together is enough."""
    tables = np.arange(len(chosen))
    return (
        options.device[chosen, tables].sum() <= options.device_total
        and options.host[chosen, tables].sum() <= options.host_total
    )


def _improve(options: Options, placer: Placer, best: Found) -> Found:
    """Change the kind of one table at a time, as long as that makes the step shorter and the budget lasts."""
    allowed = options.allowed
    budget = placer.parts_placed + DECODED
    tables = len(best.kinds)
    while placer.parts_placed < budget:
        candidates = range(tables) if int(allowed.sum()) <= EVERYTHING else _on_slowest(placer, best)
        better = None
        for t in candidates:
            for k in np.flatnonzero(allowed[:, t]):
                if k == best.kinds[t]:
                    continue
                tried = best.kinds.copy()
                tried[t] = k
                found = placer.place(tried)
                placer.parts_placed += 1
                if found is not None and found.step < best.step * (1 - 1e-9):
                    better = best = found
                if placer.parts_placed >= budget:
                    break
            if placer.parts_placed >= budget:
                break
        if better is None:
            break
    return best


def _on_slowest(placer: Placer, found: Found) -> list[int]:
    """The tables with a part on the slowest rank, the largest first."""
    seconds = np.zeros(placer.world)
    for t, choice in enumerate(found.choices):
        seconds[list(choice.ranks)] += placer.main[choice.kind][
            t, np.arange(len(choice.ranks)) % placer.main[choice.kind].shape[1]
        ]
    worst = int(seconds.argmax())
    mine = [t for t, choice in enumerate(found.choices) if worst in choice.ranks]
    return sorted(mine, key=lambda t: -placer.main[found.choices[t].kind][t].max())[:24]


def polish(placer: Placer, found: Found) -> Found:
    """Move parts off the slowest rank, or change them for parts of another, while that helps."""
    options, world = placer.options, placer.world
    choices = [list(c.ranks) for c in found.choices]
    kinds = found.kinds
    main, hidden = np.zeros(world), np.zeros(world)
    device, host = np.zeros(world), np.zeros(world)
    movable: list[list[tuple[int, int]]] = [[] for _ in range(world)]  # rank -> (table, part)
    for t, ranks in enumerate(choices):
        k = kinds[t]
        at = np.arange(len(ranks)) % placer.main[k].shape[1]
        for total, part in ((main, placer.main), (hidden, placer.input), (device, placer.device), (host, placer.host)):
            np.add.at(total, ranks, part[k][t, at])
        if placer.places[k] in ("one", "distinct"):
            for i, rank in enumerate(ranks):
                movable[rank].append((t, i))
    used = list(dict.fromkeys(options.prices.kinds[k].kind.sharding for k in kinds))
    group = group_seconds(options.prices, used)
    main += options.prices.base_seconds + group[0]
    hidden += group[1]

    if host.any() and placer.hosts > 1:
        return found  # a host's memory would have to be counted too
    part_T4 = np.array(
        [(placer.main[k][t, 0], placer.input[k][t, 0], placer.device[k][t, 0], 0.0) for t, k in enumerate(kinds)]
    )
    loads = np.stack([main, hidden, device, host], 1)  # (W, 4)
    for _ in range(MOVES):
        time = loads[:, :2].max(1)
        worst = int(time.argmax())
        order = np.argsort(time, kind="stable")[:LIGHTEST]
        # What may come in exchange: nothing, or a part of a table that has none on the slowest rank.
        others = [
            (int(rank), other)
            for rank in order
            if rank != worst
            for other in (None, *(m for m in movable[rank] if worst not in choices[m[0]]))
        ]
        if not movable[worst] or not others:
            break
        at_O = np.array([rank for rank, _ in others])
        give_A = part_T4[[t for t, _ in movable[worst]]]
        take_O = np.array([np.zeros(4) if other is None else part_T4[other[0]] for _, other in others])
        moved_AO = give_A[:, None] - take_O[None]
        left_AO, right_AO = loads[worst] - moved_AO, loads[at_O][None] + moved_AO
        after_AO = np.maximum(left_AO[..., :2].max(-1), right_AO[..., :2].max(-1))
        after_AO[np.maximum(left_AO[..., 2], right_AO[..., 2]) > options.device_limit] = np.inf
        for a, (t, _) in enumerate(movable[worst]):
            after_AO[a, np.isin(at_O, choices[t])] = np.inf
        a, o = np.unravel_index(int(after_AO.argmin()), after_AO.shape)
        if not after_AO[a, o] < time[worst] * (1 - 1e-9):
            break
        one, (rank, other) = movable[worst][a], others[o]
        for moved, source, target in ((one, worst, rank), (other, rank, worst)):
            if moved is None:
                continue
            t, i = moved
            loads[source] -= part_T4[t]
            loads[target] += part_T4[t]
            choices[t][i] = target
            movable[source].remove(moved)
            movable[target].append(moved)
    step = float(loads[:, :2].max())
    if step >= found.step:
        return found
    made = tuple(Choice(c.kind, tuple(ranks)) for c, ranks in zip(found.choices, choices, strict=True))
    return Found(kinds, made, step)
