"""`rewire bench evaluation`: answers against the published way, and single edits against one after the other.

Each figure stands beside its check from the same run: the same tokens, the same outcomes; where a float32 tie went the
other way (the two best logits less than `TIE` apart), it is listed and not counted as wrong.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from ..engine.evaluation import evaluate
from ..engine.evaluation.contexts import in_context
from ..engine.facts import Fact, held_out
from ..engine.model import Model
from ..engine.phases import Listener, silent
from ..engine.session import EditSession
from ..stats.cache import cache_root
from .about import about
from .serial_evaluation import first_difference, gap_at, plain_logprobs, published_ids
from .timing import single
from .watch import own_cache

Result = TypeVar("Result")

TIE = 1e-4  # of logits, or of mean log-probabilities, in float32
KINDS = ("rewrite", "rephrase", "locality")
FORCED = ("efficacy", "paraphrase", "neighborhood")


def bench_answers(
    model: Model, facts: Sequence[Fact], serial: int, context: str = "qa_inst", listener: Listener = silent
) -> dict[str, Any]:
    """WILD over all facts, ours, and on `serial` of them, spread over all, the published way: seconds a prompt.

    {"check", "flips", "wrong", "rows", ...}
    """
    evaluate(model, facts[:2], "wild", context=context)  # warm
    seconds, found = _timed(
        model, partial(evaluate, model, facts, "wild", None, partial(listener, "wild"), context=context)
    )
    records = found["facts"]
    answers = [each for record in records for kind in KINDS for each in record[kind]]
    step = max(1, len(facts) // serial)
    sample = [each for record in records[::step][:serial] for kind in KINDS for each in record[kind]]
    published_ids(model, in_context(model, sample[0]["prompt"], context))
    spent = 0.0
    flips: list[dict[str, Any]] = []
    wrong: list[dict[str, Any]] = []
    for done, each in enumerate(sample):
        prompt = in_context(model, each["prompt"], context)
        took, said = _timed(model, partial(published_ids, model, prompt))
        spent += took
        _judge(model, prompt, each["ids"], said, each["prompt"], flips, wrong)
        listener("published", done + 1, len(sample))
    a_prompt, baseline = seconds / len(answers), spent / len(sample)
    row = {
        "name": "wild",
        "dtype": str(model.dtype).removeprefix("torch."),
        "shape": {"facts": len(facts), "prompts": len(answers), "published": len(sample)},
        "seconds": a_prompt,
        "baseline_seconds": baseline,
        "ratio": baseline / a_prompt,
        "peak_bytes": None,
    }
    return _report(model, flips, wrong, [row]) | {"context": context, "metrics": found["metrics"]}


def bench_singles(
    model: Model,
    facts: Sequence[Fact],
    begin: Callable[[], EditSession],
    context: str = "question-only",
    listener: Listener = silent,
) -> dict[str, Any]:
    """Single edits all at once (`EditSession.edit_each`, deltas beside the weights) against edit, evaluate, take back.

    begin: makes a session on the model
    Both measure `counterfact` (teacher-forced) and `wild` (generation), one by one each edit's prompts in one batch, by
    our own evaluation and, teacher-forced, also by a plain padded forward with all logits. Values start from nothing.
    """
    facts = [replace(fact, neighbors=kept) for fact, kept in zip(facts, held_out(facts), strict=True)]  # also alone
    protocols: dict[str, dict[str, Any]] = {"counterfact": {}, "wild": {"context": context}}
    flips: list[dict[str, Any]] = []
    wrong: list[dict[str, Any]] = []
    with own_cache():
        begin().edit_each(facts[:1])  # warm; second moments are there now
        plain = evaluate(model, facts, "wild", context=context)
        _forget_values()
        ours, together = {}, {}
        ours["edit"], made = _timed(model, lambda: begin().edit_each(facts))
        for name, more in protocols.items():
            against = {"unedited": plain} if name == "wild" else {}
            call = partial(evaluate, model, facts, name, None, partial(listener, name), deltas=made.updates)
            ours[name], together[name] = _timed(model, partial(call, **more, **against))
        _forget_values()
        serial = dict.fromkeys(("edit", *protocols, "padded"), 0.0)
        session = begin()
        for number, fact in enumerate(facts):
            seconds, edit = _timed(model, partial(session.edit, [fact], evaluate=False))
            serial["edit"] += seconds
            alone = {}
            for name, more in protocols.items():
                seconds, alone[name] = _timed(model, partial(evaluate, model, [fact], name, **more))
                serial[name] += seconds
            seconds, padded = _timed(model, partial(plain_logprobs, model, _pairs(fact)))
            serial["padded"] += seconds
            forced = together["counterfact"]["facts"][number]
            _compare_forced(fact, forced, alone["counterfact"]["facts"][0], flips, wrong)
            _compare_padded(fact, forced, [value for value, _ in padded], wrong)
            for kind in KINDS:
                mine, theirs = together["wild"]["facts"][number][kind], alone["wild"]["facts"][0][kind]
                for a, b in zip(mine, theirs, strict=True):
                    prompt = in_context(model, a["prompt"], context)
                    _judge(model, prompt, a["ids"], b["ids"], f"{fact.id}: {a['prompt']}", flips, wrong)
            serial["edit"] += _timed(model, partial(session.undo, edit.id))[0]
            listener("one by one", number + 1, len(facts))

    def row(name: str, seconds: float, baseline: float) -> dict[str, Any]:
        return {
            "name": name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "shape": {"edits": len(facts)},
            "seconds": seconds,
            "baseline_seconds": baseline,
            "ratio": baseline / seconds,
            "peak_bytes": None,
        }

    rows = [
        row("edit", ours["edit"], serial["edit"]),
        row("teacher-forced", ours["counterfact"], serial["counterfact"]),
        row("teacher-forced, plain padded forwards", ours["counterfact"], serial["padded"]),
        row("generation", ours["wild"], serial["wild"]),
        row("together", sum(ours.values()), sum(serial[name] for name in ours)),
    ]
    return _report(model, flips, wrong, rows) | {
        "method": session.method.name,
        "context": context,
        "metrics": {name: found["metrics"] for name, found in together.items()},
    }


def _timed(model: Model, call: Callable[[], Result]) -> tuple[float, Result]:
    """(seconds, what it returned)"""
    found: list[Result] = []
    return single(lambda: found.append(call()), model.device).p50, found[0]


def _pairs(fact: Fact) -> list[tuple[str, str]]:
    """What `counterfact` asks of a fact."""
    prompts = (fact.question, *fact.paraphrases, *fact.neighbors)
    targets = [target for target in (fact.target_new, fact.target_true) if target is not None]
    return [(prompt, target) for prompt in prompts for target in targets]


def _forget_values() -> None:
    """What one side has optimised, the other does not find."""
    shutil.rmtree(cache_root() / "values", ignore_errors=True)


def _judge(
    model: Model,
    prompt: str,
    ours: Sequence[int],
    theirs: Sequence[int],
    named: str,
    flips: list[dict[str, Any]],
    wrong: list[dict[str, Any]],
) -> None:
    """Where two answers part, with the weights as they are: a tie, or wrong."""
    at = first_difference(ours, theirs)
    if at is not None:
        gap = gap_at(model, prompt, list(theirs)[:at])
        (flips if gap < TIE else wrong).append({"prompt": named, "token": at, "gap": gap})


def _compare_forced(
    fact: Fact, a: dict[str, Any], b: dict[str, Any], flips: list[dict[str, Any]], wrong: list[dict[str, Any]]
) -> None:
    for kind in FORCED:
        if kind not in b:
            continue
        pairs = [
            (x, y) for key in ("new_logprob", "true_logprob") for x, y in zip(a[kind][key], b[kind][key], strict=True)
        ]
        apart = max((abs(x - y) for x, y in pairs), default=0.0)
        if not apart <= TIE:  # NaN is no tie
            wrong.append({"prompt": f"{fact.id}: {kind}", "token": None, "gap": apart})
        elif a[kind].get("success") != b[kind].get("success"):
            flips.append({"prompt": f"{fact.id}: {kind}", "token": None, "gap": apart})


def _compare_padded(fact: Fact, a: dict[str, Any], padded: Sequence[float], wrong: list[dict[str, Any]]) -> None:
    """padded: of `_pairs`, in order"""
    ours: list[float] = []
    for kind in (kind for kind in FORCED if kind in a):
        sides = [a[kind][key] for key in ("new_logprob", "true_logprob") if a[kind][key]]
        ours += [value for values in zip(*sides, strict=True) for value in values]
    apart = max(abs(x - y) for x, y in zip(ours, padded, strict=True))
    if not apart <= TIE:
        wrong.append({"prompt": f"{fact.id}: padded forwards", "token": None, "gap": apart})


def _report(
    model: Model, flips: list[dict[str, Any]], wrong: list[dict[str, Any]], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "check": "failed" if wrong else "passed",
        "flips": flips,
        "wrong": wrong,
        "rows": [] if wrong else rows,
        "model": model.name,
        "about": about(model.device),
    }
