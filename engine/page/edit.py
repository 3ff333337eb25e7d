"""The page of an edit, from its report."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.counterfact import harmonic_mean
from ..values import STOP_LOSS
from . import reasons
from .content import (
    Content,
    Curves,
    Histogram,
    Lines,
    Metric,
    Phase,
    Picture,
    Row,
    average,
    cell,
    finite,
    percent,
    said,
    short_name,
)
from .content import facts as count
from .definitions import metrics
from .folder import REPORT, read_edits

MAIN = ("outcome", "question", "target_new", "said_before", "said_after", "why")
SETTINGS = ("layers", "statistics", "hparams", "versions", "implementations")
SUCCESSES = ("efficacy_success", "paraphrase_success", "neighborhood_success")
INNER = ("before", "after", "losses", "prompt", *("paraphrases", "neighbors", "edit_neighbors", "locality"))
INNER_TOO = ("ripples", "generation_prompts", "references")


def read(folder: Path) -> Content:
    edits = read_edits(folder / REPORT)
    facts = [fact for edit in edits for fact in edit.get("facts") or ()]
    last = edits[-1]
    content = Content(
        "edit",
        f"{count(len(facts))} edited into {short_name(last.get('model'))}",
        about_edit(edits),
        {},
        [row(fact) for fact in facts],
        MAIN,
        pictures=pictures(edits),
        phases=phases(edits),
        details=details(last),
        left_out=[
            (str(skipped.get("where")), str(skipped.get("reason")))
            for edit in edits
            for skipped in edit.get("skipped") or ()
        ],
    )
    measured = [edit for edit in edits if edit.get("after")]
    if measured:
        content.groups |= _groups(_together(measured, "before"), _together(measured, "after"))
        if len(measured) > 1:
            content.notes.append("Each edit was measured right behind it; the rates are means over all their facts.")
    else:
        content.notes.append("Nothing was measured: the edit was made without an evaluation.")
    passes = [each for edit in edits for each in edit.get("iterations") or ()]
    if passes:
        content.groups["perplexity of the new object"] = metrics(
            {name: passes[0].get("initial") for name in ("optimization", "spread")},
            {name: passes[-1].get(name) for name in ("optimization", "spread")},
        )
    return content


def about_edit(edits: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """How an edit (or several, of one session) came about: names for people -> texts; what is unknown is left out."""
    last = edits[-1]
    found = {
        "model": last.get("model"),
        "method": last.get("method"),
        "preset": last.get("preset"),
        "edits": len(edits) if len(edits) > 1 else None,
        "facts": sum(edit.get("fact_count") or 0 for edit in edits) or None,
        "passes": len(last.get("iterations") or ()) or None,
        "neighbours in the values": "yes" if last.get("neighbors") else None,
        "published behaviour": "yes, --compat" if last.get("compat") else None,
        "date": last.get("date"),
        "device": last.get("device"),
        "dtype": last.get("dtype"),
        "seed": last.get("seed"),
        "weights": last.get("fingerprint"),
        "facts' digest": last.get("facts_digest"),
        "Rewire": (last.get("versions") or {}).get("rewire"),
    }
    return {name: said(value) for name, value in found.items() if value is not None}


def row(fact: Mapping[str, Any]) -> Row:
    before, after = fact.get("before") or {}, fact.get("after") or {}
    question = str(fact.get("prompt", "")).replace("{}", str(fact.get("subject", "")))
    why = reasons.of_edit(fact) if after else []
    cells = {
        "question": question,
        "target_new": fact.get("target_new"),
        "said_before": reasons.stripped(before.get("said")),
        "said_after": reasons.stripped(after.get("said")),
        "id": fact.get("id"),
        "target_true": fact.get("target_true"),
        "new_probability_before": _probability(before, "new_logprob"),
        "new_probability": _probability(after, "new_logprob"),
        "true_probability": _probability(after, "true_logprob"),
    }
    for kind in ("paraphrase", "neighborhood"):
        for name in ("success", "accuracy"):
            cells[f"{kind}_{name}"] = after.get(kind, {}).get(name)
    cells |= inside(fact)
    texts = {"asked for": fact.get("target_new"), "before": before.get("said"), "now": after.get("said")}
    says = [(who, reasons.stripped(text)) for who, text in texts.items() if isinstance(text, str)]
    return Row(
        {key: cell(value) for key, value in cells.items()},
        str(fact.get("subject", "")),
        question,
        says,
        why,
        measured=bool(after),
    )


def inside(fact: Mapping[str, Any]) -> dict[str, Any]:
    """What the edit itself says of a fact: steps, losses, residuals, ..."""
    known = {*INNER, *INNER_TOO, "id", "subject", "target_new", "target_true"}
    return {key: value for key, value in fact.items() if key not in known}


def pictures(edits: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Of how the values were found and how far the weights got; and over edits or passes, where there are several."""
    facts = [fact for edit in edits for fact in edit.get("facts") or ()]
    found: list[Picture] = []
    if len(edits) > 1 and all(edit.get("after") for edit in edits):
        series = {key.removesuffix("_success"): [finite(edit["after"].get(key)) for edit in edits] for key in SUCCESSES}
        found.append(
            Lines("success, edit by edit", "Of each edit's own facts.", "edit", _count(edits), known(series), True)
        )
    passes = edits[-1].get("iterations") or ()
    if len(passes) > 1:
        series = {name: [finite(each.get(name)) for each in passes] for name in ("spread", "optimization")}
        caption = "SPREAD: as the weights give it. OPTIMIZATION: with the target values put in by hand."
        found.append(Lines("perplexity of the new object", caption, "pass", _count(passes), known(series), rate=False))
    curves = [numbers for fact in facts if len(numbers := _numbers(fact.get("losses") or ())) > 1]
    if curves:
        caption = f"Median and middle 80 % of the facts still at work; a fact stops below {STOP_LOSS:g}."
        found.append(Curves("loss while values are optimised", caption, "step", curves))
    mark = (STOP_LOSS, "stop")
    for key, title, caption, x_label, at in (
        ("loss", "last losses", "What lies right of the line did not get below the stop.", "loss", mark),
        ("steps", "steps", "Adam updates that each fact took.", "steps", None),
        ("achieved", "share of the residual achieved", "How much of Z - H the new weights give.", "achieved", None),
    ):
        values = _numbers(fact.get(key) for fact in facts)
        if len(set(values)) > 1:
            found.append(Histogram(title, caption, x_label, values, at))
    return found


def phases(edits: Sequence[Mapping[str, Any]]) -> list[Phase]:
    """Seconds of each phase, of all edits together; with floors where the reports have them."""
    seconds: dict[str, float] = {}
    floors: dict[str, float] = {}
    for edit in edits:
        for total, own in ((seconds, edit.get("seconds")), (floors, edit.get("floors"))):
            for name, value in (own or {}).items():
                if finite(value) is not None:
                    total[name] = total.get(name, 0.0) + value
    return [Phase(name.replace("_", " "), value, floors.get(name)) for name, value in seconds.items()]


def details(edit: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Settings and what else an edit says of itself, to be folded away."""
    found: dict[str, dict[str, str]] = {}
    titles = {"hparams": "hyper-parameters", "implementations": "kernels: what served how many calls"}
    for key in SETTINGS:
        value = edit.get(key)
        if key == "layers" and value:
            value = {each.get("weight"): _layer(each) for each in value}
        if isinstance(value, Mapping) and value:
            found[titles.get(key, key)] = {str(name): said(item) for name, item in value.items()}
    contexts = edit.get("contexts")
    if contexts:
        found["context templates"] = {str(place): text for place, text in enumerate(contexts, 1)}
    return found


def known(series: Mapping[str, Sequence[float | None]]) -> dict[str, Sequence[float | None]]:
    """Without those of which nothing is known."""
    return {name: values for name, values in series.items() if any(value is not None for value in values)}


def _groups(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[Metric]]:
    """Success first, then accuracy, then the rest."""
    groups: dict[str, dict[str, Any]] = {name: {} for name in ("success rates", "most probable", "magnitudes")}
    heads = {"accuracy": "most probable", "magnitude": "magnitudes"}
    for key, value in after.items():
        groups[heads.get(key.rpartition("_")[2], "success rates")][key] = value
    return {name: made for name, own in groups.items() if (made := metrics(before, own))}


def _layer(layer: Mapping[str, Any]) -> str:
    change = finite(layer.get("relative_change"))
    parts = [] if change is None else [f"changed by {percent(change)} of its norm"]
    for key, name in (("residual", "residual of the solve"), ("condition", "condition")):
        if (value := finite(layer.get(key))) is not None:
            parts.append(f"{name} {value:.2g}")
    lost = finite(layer.get("lost_to_rounding"))
    return ", ".join(parts if lost is None else [*parts, f"{lost:.2g} of the update lost to rounding"])


def _together(edits: Sequence[Mapping[str, Any]], side: str) -> dict[str, float | None]:
    """Means over the facts of all edits; the score is made of these."""
    own = [(edit.get("fact_count") or 1, edit.get(side) or {}) for edit in edits]
    found: dict[str, float | None] = {}
    for key in dict.fromkeys(key for _, of in own for key in of):
        numbers = [(weight, value) for weight, of in own if (value := finite(of.get(key))) is not None]
        total = sum(weight for weight, _ in numbers)
        found[key] = sum(weight * value for weight, value in numbers) / total if numbers else None
    if len(edits) > 1 and "score" in found:
        found["score"] = harmonic_mean([found.get(key) for key in SUCCESSES])
    return found


def _probability(side: Mapping[str, Any], key: str) -> float | None:
    logprob = average(map(finite, side.get("efficacy", {}).get(key) or ()))
    return None if logprob is None else math.exp(logprob)


def _numbers(values: Any) -> list[float]:
    return [number for value in values if (number := finite(value)) is not None]


def _count(items: Sequence[Any]) -> list[float]:
    return [float(place) for place in range(1, len(items) + 1)]
