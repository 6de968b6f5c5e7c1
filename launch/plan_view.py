"""What `tablemesh plan` shows a person: numbers into bars, tables and sentences."""

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sharding.explain import BOUNDS
from trainer.words import milliseconds, runs, size

MANY_RANKS = 16  # above it ranks are summed up: the fullest, the slowest, the mean
MANY_TABLES = 40  # above it the tables that take the most time
BAR = 20  # characters
COLOURS = {"input": "yellow", "lookup": "blue", "output": "cyan", "gradients": "magenta", "update": "green"}


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
    console.print(
        f"[bold]{escape(found['name'])}[/bold] on [bold]{escape(found['cluster'])}[/bold]: "
        f"{found['world_size']} ranks, global batch {found['batch_size']:,}",
        highlight=False,
    )
    console.print(
        f"step [bold]{milliseconds(predicted['step_ms'])}[/bold], {predicted['samples_per_second']:,.0f} samples/s; "
        f"bound {milliseconds(found['bound']['step_ms'])}: {reached}",
        highlight=False,
    )
    console.print(f"bottleneck: {escape(found['bottleneck'])}", highlight=False, soft_wrap=True)
    simulated = found["simulated"]
    if simulated["step_ms"] > 1.001 * predicted["step_ms"]:
        console.print(
            f"a run is slower: {milliseconds(simulated['step_ms'])}, {simulated['samples_per_second']:,.0f} samples/s, "
            f"whatever the plan; what bounds it is {BOUNDS[simulated['bound_by']]} (docs/scaling.md)",
            highlight=False,
            soft_wrap=True,
        )
    console.print(_timeline(found))
    console.print(_ranks(found))
    console.print(_tables(found))
    console.print(_volumes(found), highlight=False)
    if found["estimates"]:
        console.print(
            f"[dim]{len(found['estimates'])} numbers of this cluster are estimates that no run has confirmed: "
            f"{', '.join(found['estimates'])} (sharding/topology.py; --profiles FILE sets your own)[/dim]",
            highlight=False,
            soft_wrap=True,
        )


def _show_infeasible(found: dict[str, Any], console: Console) -> None:
    console.print(f"[bold red]no plan fits[/bold red] {escape(found['cluster'])}", highlight=False)
    console.print(escape(found["message"]), highlight=False, soft_wrap=True)
    ways = found["ways_out"]
    if not ways:
        console.print("no way out was found among those that were tried", highlight=False)
        return
    console.print("\nways out, each tried by planning again:", highlight=False)
    for way in ways:
        console.print(
            f"  • {escape(way['how'])} → step {milliseconds(way['step_ms'])}", highlight=False, soft_wrap=True
        )


def _bar(shares: list[tuple[float, str]], width: int = BAR) -> Text:
    """A bar of coloured pieces; shares add up to at most 1."""
    text, drawn, upto = Text(), 0, 0.0
    for share, colour in shares:
        upto += share
        end = min(width, round(upto * width))
        text.append("█" * (end - drawn), style=colour)
        drawn = max(drawn, end)
    text.append("·" * (width - drawn), style="bright_black")
    return text


def _timeline(found: dict[str, Any]) -> Table:
    step = found["predicted"]["step_ms"]
    table = _table(f"step of rank {found['slowest_rank']}, the slowest")
    for heading, justify in (("part", "left"), ("", "left"), ("ms", "right"), ("share", "right")):
        table.add_column(heading, justify=justify)
    for event in found["timeline"]:
        if event["ms"] < 1e-6:
            continue
        start, length = event["start_ms"] / step, event["ms"] / step
        bar = Text(" " * min(BAR - 1, round(start * BAR)))
        bar.append("█" * max(1, round(length * BAR)), style=COLOURS.get(event["name"], "white"))
        name = event["name"] + (" (beside the rest)" if event["beside"] else "")
        table.add_row(name, bar, f"{event['ms']:.3f}", f"{length:.0%}")
    return table


def _table(title: str) -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left")


def _ranks(found: dict[str, Any]) -> Table:
    ranks = found["ranks"]
    limit = found["limits"]["device_bytes"]
    step = found["predicted"]["step_ms"]
    shown = ranks
    title = "ranks"
    if len(ranks) > MANY_RANKS:
        by_time = sorted(ranks, key=lambda r: -r["step_ms"])
        by_memory = sorted(ranks, key=lambda r: -(r["hbm_bytes"] + r["host_bytes"]))
        picked = [*by_time[:4], *by_memory[:4], by_time[-1]]
        shown = sorted({r["rank"]: r for r in picked}.values(), key=lambda r: r["rank"])
        mean = sum(r["step_ms"] for r in ranks) / len(ranks)
        title = f"the slowest, the fullest and the idlest of {len(ranks):,} ranks; mean step {milliseconds(mean)}"
    table = _table(title)
    cpu = all(r["hbm_bytes"] == 0 for r in ranks)
    headings = [("rank", "right"), (f"memory, of {size(limit)}", "left"), ("", "right")]
    headings += [] if cpu else [("host", "right")]
    for heading, justify in [*headings, (f"time, of {milliseconds(step)}", "left"), ("", "right")]:
        table.add_column(heading, justify=justify)
    for r in shown:
        m = r["memory"]
        own = r["host_bytes"] if cpu else r["hbm_bytes"]
        outside = m["fixed"]
        memory = [(outside, "white"), (m["weights"], "blue"), (m["state"], "magenta"),
                  (m["gradient"] + m["buffers"] + m["ids"] + m["cache"], "yellow")]  # fmt: skip
        on_host = 0 if cpu else r["host_bytes"]
        parts = [(ms, COLOURS[name]) for name, ms in r["parts_ms"].items() if r["hidden_ms"] == 0 or name != "input"]
        rest = r["main_ms"] - sum(ms for ms, _ in parts)
        time = [(rest, "white"), *parts]
        table.add_row(
            str(r["rank"]),
            _bar([(b / limit, c) for b, c in memory]),
            size(own),
            *([] if cpu else [size(on_host) if on_host else "–"]),
            _bar([(ms / step, c) for ms, c in time]),
            f"{r['step_ms']:.3f} ms",
        )
    table.caption = (
        "memory: white fixed, blue weights, magenta optimizer, yellow buffers; time: white what no plan changes"
    )
    table.caption_justify = "left"
    return table


def _tables(found: dict[str, Any]) -> Table:
    tables = found["tables"]
    title = f"{len(tables):,} tables"
    if len(tables) > MANY_TABLES:
        tables = sorted(tables, key=lambda t: -t["ms_total"])[:MANY_TABLES]
        title += f"; the {MANY_TABLES} that take the most time"
    tiers = {t["tier"] for t in found["tables"]}
    if len(tiers) == 1:
        title += f", all in {'device' if tiers == {'device'} else 'host'} memory"
    table = _table(title + "; ms over all ranks; runner-up: what the step would grow by")
    headings = [("table", "left"), ("rows", "right"), ("dim", "right"), ("placement", "left")]
    headings += [("tier", "left")] if len(tiers) > 1 else []
    headings += [("ranks", "left"), ("bytes", "right"), ("ms", "right"), ("runner-up", "left"), ("+ ms", "right")]
    for heading, justify in headings:
        table.add_column(heading, justify=justify, overflow="fold")
    for t in tables:
        other = t["runner_up"]
        tier = [t["tier"] + (f" {t['cache_share']:.0%}" if t["tier"] == "cache" else "")]
        table.add_row(
            escape(t["name"]),
            f"{t['rows']:,}",
            str(t["dim"]),
            _words(t["sharding"] + (f" in {t['column_parts']}" if t["column_parts"] > 1 else "")),
            *(tier if len(tiers) > 1 else []),
            _ranks_of(t["ranks"]),
            size(t["bytes"] + t["state_bytes"]),
            f"{t['ms_total']:.3f}",
            "–" if other is None else _words(other["label"]),
            "–" if other is None else f"{other['price_ms']:.3f}",
        )
    return table


def _words(label: str) -> str:
    """table_row_wise -> table-row-wise."""
    return label.replace("_", "-")


def _ranks_of(ranks: list[int]) -> str:
    text = runs(sorted(set(ranks)))
    return text if len(text) <= 12 else f"{len(set(ranks))} ranks"


def _volumes(found: dict[str, Any]) -> str:
    v = found["volumes"]
    return (
        f"all ranks send in a step: ids {size(v['ids_bytes'])}, pooled vectors {size(v['vectors_bytes'])} and as much "
        f"of gradients, gradients of data-parallel tables {size(v['data_parallel_bytes'])}, of the dense layers "
        f"{size(v['dense_all_reduce_bytes'])}"
    )


def show_comparison(found: dict[str, Any], console: Console) -> None:
    """Two plans side by side."""
    a, b = found["a"], found["b"]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("", a["name"], b["name"], "b / a"):
        table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
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
            table.add_row(f"  {part}", f"{x:.3f} ms", f"{y:.3f} ms", f"{y / x:.3f}" if x > 1e-9 else "")
    console.print(table)
    for plan in (a, b):
        if not plan["fits"]:
            console.print(f"[yellow]{escape(plan['name'])} does not fit the memory[/yellow]", highlight=False)
    if not found["differ"]:
        console.print("no table is held differently", highlight=False)
    for moved in found["differ"][:MANY_TABLES]:
        console.print(f"  {escape(moved['name'])}: {_words(moved['a'])} → {_words(moved['b'])}", highlight=False)
    if len(found["differ"]) > MANY_TABLES:
        console.print(f"  and {len(found['differ']) - MANY_TABLES} more tables", highlight=False)


def show_what_if(found: dict[str, Any], console: Console) -> None:
    """Several clusters side by side."""
    weak = found["mode"] == "weak"
    batches = {c["batch_size"] for c in found["clusters"]}
    kept = "the rows of each rank stay" if weak else f"global batch {batches.pop():,}"
    table = _table(f"the same work on other clusters; {kept}")
    headings = [("cluster", "left"), ("ranks", "right"), ("samples/s", "right"), ("effi-\nciency", "right")]
    headings += [("step", "right"), ("fullest\nrank", "right"), ("bottleneck", "left")]
    for heading, justify in headings:
        table.add_column(heading, justify=justify, no_wrap=heading != "bottleneck", overflow="fold")
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
    console.print(stop_words(found), highlight=False)


def stop_words(found: dict[str, Any]) -> str:
    """Where scaling stops, in a sentence; empty where the clusters are not one in several sizes."""
    if found["stops_at"]:
        return (
            f"scaling stops at {found['stops_at']}: beyond it a further rank adds less than half of what a rank of the "
            "smallest cluster does"
        )
    if len({c["cluster"].partition(":")[0] for c in found["clusters"]}) > 1 or len(found["clusters"]) < 2:
        return ""
    if not any(c["feasible"] for c in found["clusters"]):
        return "none of these clusters has a plan"
    return "scaling does not stop among these: each further rank adds at least half of what a rank of the smallest does"


def first_words(why: str) -> str:
    """What was in the way of a plan, without the ways out: up to the first semicolon or line end."""
    return why.partition("\n")[0].partition(";")[0]
