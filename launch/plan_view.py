"""What `tablemesh plan` shows a person: numbers into bars, tables and sentences."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from sharding.cost import FIXED
from sharding.explain import BOUNDS, SHORT
from trainer.words import milliseconds, runs, size

MANY_RANKS = 16  # above it ranks are summed up: the slowest, the fullest, the idlest
MANY_TABLES = 40  # above it the tables that take the most time
NAMES = 6  # of tables or numbers in a sentence, before "and N more"
BAR = 20  # characters
NARROW = 96  # characters of a terminal; below it bars are shorter
COLOURS = {"input": "yellow", "lookup": "blue", "output": "cyan", "gradients": "magenta", "update": "green"}
# What a bar is made of, to be told apart without colours too: name -> (words, character, colour, what is in it).
MEMORY = {
    "fixed": ("whatever the plan", "░", "white", ("fixed",)),
    "weights": ("rows", "█", "blue", ("weights",)),
    "state": ("optimizer state", "▓", "magenta", ("state",)),
    "buffers": ("buffers, ids, cache", "▒", "yellow", ("gradient", "buffers", "ids", "cache")),
}
TIME = {
    "fixed": ("whatever the plan", "░", "white", ()),
    "lookup": ("looking up", "█", "blue", ("lookup",)),
    "update": ("updating", "▓", "green", ("update",)),
    "sending": ("sending ids and vectors", "▒", "yellow", ("input", "output", "gradients")),
}


def show(found: dict[str, Any], console: Console) -> None:
    """A plan, or why there is none."""
    if not found["feasible"]:
        _show_infeasible(found, console)
        return
    predicted = found["predicted"]
    reached = (
        "no plan is faster (by this cost model)"
        if found["proved"]
        else f"within {found['gap']:.1%} of the best possible (by this cost model)"
    )

    def say(text: str) -> None:
        console.print(text, highlight=False)

    say(
        f"[bold]{escape(found['name'])}[/bold] on [bold]{escape(found['cluster'])}[/bold]: "
        f"{found['world_size']:,} ranks, global batch {found['batch_size']:,}"
    )
    say(
        f"step [bold]{milliseconds(predicted['step_ms'])}[/bold], {predicted['samples_per_second']:,.0f} samples/s; "
        f"bound {milliseconds(found['bound']['step_ms'])}: {reached}"
    )
    say(f"bottleneck: {escape(found['bottleneck'])}")
    simulated = found["simulated"]
    if simulated["step_ms"] > 1.001 * predicted["step_ms"]:
        say(
            f"a run is slower: {milliseconds(simulated['step_ms'])}, {simulated['samples_per_second']:,.0f} samples/s, "
            f"whatever the plan; what bounds it is {BOUNDS[simulated['bound_by']]} (docs/scaling.md)"
        )
    for section in (_timeline, _ranks, _tables):
        section(found, console)
    say(f"\n{_volumes(found)}")
    if found["estimates"]:
        say(f"[dim]{escape(_estimates(found))}[/dim]")


def _estimates(found: dict[str, Any]) -> str:
    names = found["estimates"]
    if found["guessed"]:
        return (
            "the numbers of this cluster are estimates for a common CPU; `tablemesh bench calibrate` measures this "
            "machine's, which plans without --cluster then use"
        )
    return (
        f"{len(names)} numbers of this cluster are estimates that no run has confirmed: {named(names)} (all: "
        "--json; sources: sharding/topology.py; your own: --profiles FILE)"
    )


def named(names: list[str]) -> str:
    """The first few names of a list."""
    return ", ".join(names[:NAMES]) + (f" and {len(names) - NAMES} more" if len(names) > NAMES else "")


def _show_infeasible(found: dict[str, Any], console: Console) -> None:
    console.print(f"[bold red]no plan fits[/bold red] {escape(found['cluster'])}", highlight=False)
    console.print(escape(found["message"]), highlight=False)
    ways = found["ways_out"]
    if not ways:
        console.print("no way out was found among those that were tried", highlight=False)
        return
    console.print("\nways out, each tried by planning again:", highlight=False)
    for way in ways:
        line = Table(box=None, padding=0, show_header=False)
        line.add_row("  • ", f"{escape(way['how'])} → step {milliseconds(way['step_ms'])}")
        console.print(line, highlight=False)


def _bar(pieces: Iterable[tuple[float, str, str]], width: int) -> Text:
    """A bar of pieces (share, character, colour); shares add up to at most 1."""
    text, drawn, upto = Text(), 0, 0.0
    for share, character, colour in pieces:
        upto += share
        end = min(width, round(upto * width))
        text.append(character * (end - drawn), style=colour)
        drawn = max(drawn, end)
    text.append("·" * (width - drawn), style="bright_black")
    return text


def _key(what: str, kinds: dict[str, tuple[str, str, str, tuple[str, ...]]]) -> Text:
    """ "memory: ░ dense layers  █ table rows"."""
    text = Text(f"{what}: ")
    for words, character, colour, _ in kinds.values():
        text.append(character, style=colour)
        text.append(f" {words}  ")
    text.rstrip()
    return text


def _table(*columns: tuple[str, Any], gap: int = 1, **options: Any) -> Table:
    """columns: (heading, justify)."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), show_edge=False)
    for heading, justify in columns:
        table.add_column(heading, justify=justify, overflow="fold", **options)
    return table


def _title(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]", highlight=False)


def _timeline(found: dict[str, Any], console: Console) -> None:
    step = found["predicted"]["step_ms"]
    _title(console, f"the step of rank {found['slowest_rank']}, the slowest")
    table = _table(("part", "left"), ("", "left"), ("ms", "right"), ("share", "right"))
    for event in found["timeline"]:
        if event["ms"] < 1e-6:
            continue
        start, length = event["start_ms"] / step, event["ms"] / step
        bar = Text(" " * min(BAR - 1, round(start * BAR)))
        bar.append("█" * max(1, round(length * BAR)), style=COLOURS.get(event["name"], "white"))
        name = SHORT[event["name"]] + (" (beside the rest)" if event["beside"] else "")
        table.add_row(name, bar, f"{event['ms']:.3f}", f"{length:.0%}")
    console.print(table)


def _ranks(found: dict[str, Any], console: Console) -> None:
    ranks = found["ranks"]
    limit, step = found["limits"]["device_bytes"], found["predicted"]["step_ms"]
    cpu = all(r["hbm_bytes"] == 0 for r in ranks)
    own: Callable[[dict[str, Any]], int] = lambda r: r["host_bytes"] if cpu else r["hbm_bytes"]  # noqa: E731
    title, shown = "ranks", [[r] for r in ranks]
    if len(ranks) > MANY_RANKS:
        mean = sum(r["step_ms"] for r in ranks) / len(ranks)
        title = f"the slowest, the fullest and the idlest of {len(ranks):,} ranks; mean step {milliseconds(mean)}"
        shown = _outstanding(ranks, own)
    width = BAR if console.width >= NARROW else 14
    _title(console, title)
    table = _table(
        ("rank", "right"), (f"memory, of {size(limit)}", "left"), ("", "right"),
        *([] if cpu else [("on host", "right")]),
        (f"time, of {milliseconds(step)}", "left"), ("", "right"),
        no_wrap=True,
    )  # fmt: skip
    for alike in shown:
        r = alike[0]
        memory = [
            (sum(r["memory"][name] for name in inside) / limit, character, colour)
            for _, character, colour, inside in MEMORY.values()
        ]
        parts = {name: ms for name, ms in r["parts_ms"].items() if r["hidden_ms"] == 0 or name != "input"}
        rest = r["main_ms"] - sum(parts.values())
        time = [
            ((sum(parts.get(part, 0.0) for part in inside) if inside else rest) / step, character, colour)
            for _, character, colour, inside in TIME.values()
        ]
        table.add_row(
            ranks_of([r["rank"] for r in alike], most=8),
            _bar(memory, width),
            size(own(r)),
            *([] if cpu else [size(r["host_bytes"]) if r["host_bytes"] else "–"]),
            _bar(time, width),
            f"{r['step_ms']:.3f} ms",
        )
    console.print(table)
    console.print(_key("memory", MEMORY))
    console.print(_key("time", TIME))
    console.print(f"[dim]memory whatever the plan: {fixed_words(found)}[/dim]", highlight=False)


def fixed_words(found: Mapping[str, Any]) -> str:
    """ "libraries 634 MB, dense layers 12 MB": a rank's memory that no plan changes, the largest first."""
    held = sorted(found["fixed_bytes"].items(), key=lambda each: -each[1])
    return ", ".join(f"{FIXED.get(name, name)} {size(held_bytes)}" for name, held_bytes in held if held_bytes)


def _outstanding(ranks: list[dict[str, Any]], own: Callable[[dict[str, Any]], int]) -> list[list[dict[str, Any]]]:
    """Of many ranks the slowest, the fullest and the idlest, those with the same figures together."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for r in ranks:
        groups.setdefault((size(own(r)), size(r["host_bytes"]), milliseconds(r["step_ms"])), []).append(r)
    slow = sorted(groups.values(), key=lambda g: -g[0]["step_ms"])
    full = sorted(groups.values(), key=lambda g: -own(g[0]) - g[0]["host_bytes"])
    picked = {g[0]["rank"]: g for g in (*slow[:3], *full[:3], slow[-1])}
    return sorted(picked.values(), key=lambda g: g[0]["rank"])


def _tables(found: dict[str, Any], console: Console) -> None:
    tables = found["tables"]
    title = f"{len(tables):,} tables"
    if len(tables) > MANY_TABLES:
        tables = sorted(tables, key=lambda t: -t["ms_total"])[:MANY_TABLES]
        title += f"; the {MANY_TABLES} that take the most time"
    tiers = {t["tier"] for t in found["tables"]}
    if len(tiers) == 1:
        title += f", all in {'device' if tiers == {'device'} else 'host'} memory"
    _title(console, title)
    table = _one_line_each(tables)
    if Measurement.get(console, console.options.update(width=1000), table).maximum > console.width:
        table = _two_lines_each(tables, longest=max(18, console.width - 62))
    console.print(table)
    said = "bytes: rows and optimizer state; ms: of a step, over all ranks"
    said += "; runner-up: the next best placement, and what the step would grow by"
    if any(t["runner_up"] is None for t in tables):
        said += "; –: its rules, or the memory, leave nothing else"
    console.print(f"[dim]{said}[/dim]", highlight=False)


def _one_line_each(tables: list[dict[str, Any]]) -> Table:
    lines = _table(
        ("table", "left"), ("rows", "right"), ("dim", "right"), ("placement", "left"), ("ranks", "left"),
        ("bytes", "right"), ("ms", "right"), ("runner-up", "left"), ("+ ms", "right"),
    )  # fmt: skip
    for t in tables:
        other = t["runner_up"]
        lines.add_row(
            escape(t["name"]),
            f"{t['rows']:,}",
            str(t["dim"]),
            words(t["label"]),
            ranks_of(t["ranks"]),
            size(t["bytes"] + t["state_bytes"]),
            f"{t['ms_total']:.3f}",
            "–" if other is None else words(other["label"]),
            "–" if other is None else f"{other['price_ms']:.3f}",
        )
    return lines


def _two_lines_each(tables: list[dict[str, Any]], longest: int) -> Table:
    """For narrow terminals: the runner-up below the placement, long names and millions of rows in short."""
    lines = _table(
        ("table", "left"), ("rows", "right"), ("dim", "right"), ("placement\n  runner-up", "left"),
        ("ranks", "left"), ("bytes", "right"), ("ms\n+ ms", "right"),
        gap=0, no_wrap=True,
    )  # fmt: skip
    lines.columns[3].no_wrap = False
    for t in tables:
        other = t["runner_up"]
        lines.add_row(
            escape(in_short(t["name"], longest)),
            f"{t['rows']:,}" if t["rows"] < 1e6 else f"{t['rows'] / 1e6:,.1f}M",
            str(t["dim"]),
            f"{words(t['label'])}\n[dim]  {'–' if other is None else words(other['label'])}[/dim]",
            ranks_of(t["ranks"], most=8),
            size(t["bytes"] + t["state_bytes"]),
            f"{t['ms_total']:.3f}\n[dim]{'–' if other is None else '+' + format(other['price_ms'], '.3f')}[/dim]",
        )
    return lines


def words(label: str) -> str:
    """ "table_row_wise, host memory, 2% cached" -> "table-row-wise, 2% cached"."""
    return label.replace("_", "-").replace("host memory, ", "")


def in_short(name: str, most: int) -> str:
    """ "user_history_last_41_days", 18 -> "user_hist…_41_days"."""
    half = most // 2
    return name if len(name) <= most else f"{name[:half]}…{name[half + 1 - most :]}"


def ranks_of(ranks: list[int], *, most: int = 12) -> str:
    text = runs(sorted(set(ranks)))
    return text if len(text) <= most else f"{len(set(ranks))} ranks"


def _volumes(found: dict[str, Any]) -> str:
    v = found["volumes"]
    return (
        f"all ranks send in a step: ids {size(v['ids_bytes'])}, pooled vectors {size(v['vectors_bytes'])} and as much "
        f"of their gradients, gradients of data-parallel tables {size(v['data_parallel_bytes'])}, of the dense layers "
        f"{size(v['dense_all_reduce_bytes'])}; one rank, for tables, at most {size(v['most_of_a_rank_bytes'])}"
    )


def show_comparison(found: dict[str, Any], console: Console) -> None:
    """Two plans side by side."""
    a, b = found["a"], found["b"]
    table = _table(("", "left"), *((heading, "right") for heading in (a["name"], b["name"], "b / a")))
    table.add_row("cluster", a["cluster"], b["cluster"], "")
    table.add_row("step", milliseconds(a["step_ms"]), milliseconds(b["step_ms"]), f"{b['step_ms'] / a['step_ms']:.3f}")
    rates = (a["samples_per_second"], b["samples_per_second"])
    table.add_row("samples/s", f"{rates[0]:,.0f}", f"{rates[1]:,.0f}", f"{rates[1] / rates[0]:.3f}")
    table.add_row(
        "fullest rank", size(a["most_bytes"]), size(b["most_bytes"]), f"{b['most_bytes'] / a['most_bytes']:.3f}"
    )
    for part in a["parts_ms"]:
        x, y = a["parts_ms"][part], b["parts_ms"][part]
        if max(x, y) > 1e-6:
            table.add_row(f"  {SHORT[part]}", f"{x:.3f} ms", f"{y:.3f} ms", f"{y / x:.3f}" if x > 1e-9 else "")
    console.print(table)
    for plan in (a, b):
        if not plan["fits"]:
            console.print(f"[yellow]{escape(plan['name'])} does not fit the memory[/yellow]", highlight=False)
    for plan in (a, b):
        if plan["left"]:
            console.print(
                f"[yellow]not {escape(plan['name'])}, as they cannot be, but where the planner put them: "
                f"{escape(named(plan['left']))}[/yellow]",
                highlight=False,
            )
    if not found["differ"]:
        console.print("\nno table is held differently", highlight=False)
        return
    console.print(f"\n[bold]{len(found['differ'])} tables are held differently[/bold]", highlight=False)
    for moved in found["differ"][:MANY_TABLES]:
        console.print(f"  {escape(moved['name'])}: {words(moved['a'])} → {words(moved['b'])}", highlight=False)
    if len(found["differ"]) > MANY_TABLES:
        console.print(f"  and {len(found['differ']) - MANY_TABLES} more tables", highlight=False)


def show_what_if(found: dict[str, Any], console: Console) -> None:
    """Several clusters side by side."""
    weak = found["mode"] == "weak"
    first = found["clusters"][0]
    kept = f"{first['batch_size'] // first['ranks']:,} rows a rank" if weak else f"global batch {first['batch_size']:,}"
    _title(console, f"the same work on other clusters; {kept}")
    table = _table(
        ("cluster", "left"), ("ranks", "right"), ("samples/s", "right"), ("effi-\nciency", "right"),
        ("step", "right"), ("fullest\nrank", "right"), ("bottleneck", "left"),
        no_wrap=True,
    )  # fmt: skip
    table.columns[-1].no_wrap = False
    for c in found["clusters"]:
        head = (escape(c["cluster"]), f"{c['ranks']:,}")
        if not c["feasible"]:
            table.add_row(*head, "no plan", "", "", "", escape(first_words(c["why"])), style="yellow")
            continue
        table.add_row(
            *head,
            f"{c['samples_per_second']:,.0f}",
            f"{c['efficiency']:.0%}",
            milliseconds(c["step_ms"]),
            size(c["most_bytes"]),
            escape(c["bottleneck"]),
        )
    console.print(table)
    console.print("[dim]efficiency: samples/s of a rank, beside the first cluster's[/dim]", highlight=False)
    for sentence in stop_words(found):
        console.print(sentence, highlight=False)


def stop_words(found: dict[str, Any]) -> list[str]:
    """Where scaling stops, a sentence for each profile that is there in several sizes."""
    if not any(c["feasible"] for c in found["clusters"]):
        return ["none of these clusters has a plan"]
    return [
        f"scaling stops at {stop}: beyond it a further rank adds less than half of what a rank of the smallest does"
        if stop
        else f"scaling does not stop among these of {profile}: each further rank adds at least half of what a rank of "
        "the smallest does"
        for profile, stop in found["stops"].items()
    ]


def first_words(why: str) -> str:
    """What was in the way of a plan, without the ways out: up to the first semicolon or line end."""
    return why.partition("\n")[0].partition(";")[0]
