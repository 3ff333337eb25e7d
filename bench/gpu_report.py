"""The report of `rewire bench gpu` as a page: the chip's name first, what is missing said with its reason."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def markdown(report: Mapping[str, Any]) -> str:
    """The page. Figures are medians; a fraction of the floor is that of the chip's own measured rates."""
    about = report["about"]
    lines = [f"# {about['device']}", ""]
    if report["rehearsal"]:
        lines += ["**A rehearsal on a CPU at small shapes: nothing here says anything about a GPU.**", ""]
    if not report["finished"]:
        lines += [f"**{report.get('broken') or 'Unfinished: what follows is what was done.'}**", ""]
    elif "broken" in report:
        lines += [f"**{report['broken']}**", ""]
    lines += [
        f"Checks {report['check']}. {report['seconds']:.0f} s of a budget of {report['budget']:.0f} s.",
        "",
        ", ".join(f"{name.replace('_', ' ')} {about[name]}" for name in about if name != "device" and about[name]),
        "",
    ]
    lines += _gates(report["gates"]) + _ceilings(report["ceilings"]) + _targets(report["targets"])
    lines += _rows(report["rows"]) + _statistics(report["statistics"]) + _values(report["values"])
    lines += _tuning(report["tuning"]) + _missing(report)
    return "\n".join(lines)


def _gates(gates: Sequence[Mapping[str, Any]]) -> list[str]:
    if not gates:
        return []
    counts = Counter(gate["result"] for gate in gates)
    said = ", ".join(f"{count} {result}" for result, count in sorted(counts.items()))
    found = ["## Gates C", "", f"Operation, implementation and dtype on all odd shapes: {said}.", ""]
    bad: dict[tuple[str, ...], list[str]] = {}
    for gate in gates:
        if gate["result"] != "passed":
            bad.setdefault((gate["name"], gate["impl"], gate["result"], gate["note"]), []).append(gate["dtype"])
    cells = [(*key[:2], ", ".join(dtypes), *key[2:]) for key, dtypes in bad.items()]
    return found + (_table(("operation", "implementation", "dtype", "result", "reason"), cells) if cells else [])


def _ceilings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = []
    for row in rows:
        good = row["status"] == "measured"
        rate = (
            ""
            if not good or row["rate"] is None
            else f"{row['rate'] / 1e12:.4g} T{'B' if row['name'] == 'copy' else 'FLOP'}/s"
        )
        seconds = _seconds(row["seconds"]) if good else ""
        cells.append((row["name"], row["dtype"], _shape(row["shape"]), seconds, rate, row["note"]))
    return ["## Ceilings", "", *_table(("", "dtype", "shape", "time", "rate (at p20)", ""), cells)] if cells else []


def _targets(targets: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [
        (t["name"], t["target"], t["dtype"], _shape(t["shape"]), t["bound"], _number(t["found"]), f"**{t['result']}**")
        for t in targets
    ]
    head = ("operation", "target", "dtype", "shape", "bound", "found", "result")
    return ["## Targets", "", *_table(head, cells)] if cells else []


def _rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [
        (
            row["name"], row["provider"], row["dtype"], _shape(row["shape"]), _seconds(row["seconds"]),
            f"{_seconds(row['p20'])} to {_seconds(row['p80'])}", _number(row["tflops"]), _number(row["gbs"]),
            _number(row["floor_fraction"]), _number(row["ratio"]), f"{row['peak_bytes'] / 2**20:.0f}",
        )
        for row in rows
    ]  # fmt: skip
    head = (
        *("operation", "provider", "dtype", "shape", "time", "p20 to p80", "TFLOP/s", "GB/s", "of the floor"),
        *("times plain torch", "peak MiB"),
    )
    return ["## Kernels", "", *_table(head, cells)] if cells else []


def _statistics(row: Mapping[str, Any] | None) -> list[str]:
    if row is None:
        return []
    if row["status"] != "measured":
        return ["## Statistics", "", f"{row['status']}: {row['note']}", ""]
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}"
    cells = (
        row["model"], _shape(row["shape"]), f"{row['seconds']:.3g}", f"{row['tokens_per_second']:,.0f}",
        _number(row["floor_fraction"]), _number(row["streaming_fraction"]), f"{row['projected_seconds']:.4g}", peak,
    )  # fmt: skip
    head = (
        *("model, bfloat16", "shape", "seconds", "tokens/s", "of the floor", "the same, without what is done once"),
        *(f"seconds for {row['projected_tokens'] / 1e6:.0f} M tokens (projected)", "peak GiB"),
    )
    return ["## Statistics", "", *_table(head, [cells])]


def _values(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = []
    for row in rows:
        if row["status"] != "measured":
            cells.append((row["config"], _shape(row["shape"]), *[""] * 7, f"{row['status']}: {row['note']}"))
            continue
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}"
        cells.append(
            (
                row["config"], _shape(row["shape"]), f"{row['steps']:.1f}", f"{row['seconds']:.3g}",
                _number(row["facts_per_second"]), _number(row["floor_fraction"]),
                f"{row['baseline_seconds_per_fact']:.3g}", _number(row["ratio"]), peak, "",
            )
        )  # fmt: skip
    head = (
        *("random weights, bfloat16", "shape", "updates made", "seconds", "facts/s", "of the floor"),
        *("serial, seconds a fact", "times serial", "peak GiB", ""),
    )
    return ["## Values", "", *_table(head, cells)] if cells else []


def _tuning(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = []
    for entry in entries:
        timed = [config for config in entry["configs"] if "seconds" in config]
        best, first = entry.get("best"), next((config for config in timed if config["index"] == 0), None)
        chosen = next((config for config in timed if config["index"] == best), None)
        gain = f"{first['seconds'] / chosen['seconds']:.3g}" if first and chosen else ""
        named = "; ".join(f"{key}: {_shape(config)}" for key, config in chosen["configs"].items()) if chosen else ""
        wrong = [f"{c['index']} {c['result']}: {c['note']}" for c in entry["configs"] if c["result"] != "passed"]
        of, reasons = f"{len(timed)} of {len(entry['configs'])}", "; ".join(filter(None, [entry["note"], *wrong]))
        cells.append((entry["name"], entry["dtype"], _shape(entry["shape"]), of, named, gain, reasons))
    head = ("operation", "dtype", "shape", "timed", "fastest", "times the first", "not timed")
    return ["## Configurations", "", *_table(head, cells)] if cells else []


def _missing(report: Mapping[str, Any]) -> list[str]:
    """What was not measured, one line a reason."""
    found: list[str] = []
    for kind, title in (("wrong", "## Wrong"), ("not_measured", "## Not measured")):
        reasons: dict[tuple[str, str], list[str]] = {}
        for row in report[kind]:
            reasons.setdefault((f"{row['name']} by {row['provider']}", row["note"]), []).append(
                f"{row['dtype']} {_shape(row['shape'])}"
            )
        if reasons:
            found += [title, "", *(f"- {what}: {note} ({'; '.join(at)})" for (what, note), at in reasons.items()), ""]
    return found


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines), ""]


def _shape(shape: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in shape.items())


def _seconds(value: float) -> str:
    return f"{value * 1e3:.4g} ms"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
