"""Why a fact is not what was asked for, from what was measured of it."""

import re
import string
from collections.abc import Mapping
from typing import Any

from ..values import STOP_LOSS
from .content import FAILED, PARTLY, Reason, average, finite, number, percent
from .definitions import FOLLOWS, NEIGHBOR, PARAPHRASE, PROMPT

HALF = 0.5  # a target value that makes the new object less probable than this was not found
COMPARISONS = ("locality", "specificity_acc")  # these compare with the unedited model by themselves
ACHIEVED = 0.9  # of the residual: below this the weights are what failed


def of_edit(fact: Mapping[str, Any]) -> list[Reason]:
    """Of a fact of an edit's report, with its `before` and `after`: none where all is as asked."""
    before, after = fact["before"], fact["after"]
    found = []
    prompt = after["efficacy"]
    if prompt["accuracy"] < 1:
        text = f"Behind its own prompt the model says {quoted(after.get('said'))}"
        if prompt.get("success") == 1:
            found.append(Reason("not the first choice", f"{text}, though the new object beats the old one.", FAILED))
        elif prompt.get("success") == 0:
            found.append(Reason("old object wins", f"{text}, and the old object beats the new one.", FAILED))
        else:
            found.append(Reason("not the first choice", f"{text}.", FAILED))
        found += causes(fact)
    paraphrases = after.get("paraphrase", {})
    kind = "success" if "success" in paraphrases else "accuracy"
    if (finite(paraphrases.get(kind)) or 0.0) < 1 and kind in paraphrases:
        prefer = "prefer the new object" if kind == "success" else "go on with the new object"
        found.append(Reason("paraphrase failed", f"{_of(paraphrases, kind)} paraphrases {prefer}.", PARTLY))
    then, now = before.get("neighborhood", {}), after.get("neighborhood", {})
    if "success" in then and now.get("success", 1.0) < then["success"]:
        text = f"With {_of(now, 'success')} neighbours the true object wins, before with {_of(then, 'success')}."
        found.append(Reason("neighbour changed", text, PARTLY))
    return found


def of_experiment(record: Mapping[str, Any], fact: Mapping[str, Any]) -> list[Reason]:
    """Of a record in the layout of UnderEdit's results.

    fact: of the edit's report, empty where there is none
    """
    post = record["post"]
    found = []
    right, wins = mean_of(post.get("rewrite_acc")), mean_of(post.get("rewrite_success"))
    if right is not None and right < 1:
        text = f"Behind its own prompt {percent(right)} of the new object's tokens are the most probable ones"
        if wins == 0:
            found.append(Reason("old object wins", f"{text}, and the old object beats the new one.", FAILED))
        else:
            found.append(Reason("not the first choice", f"{text}.", FAILED))
        found += causes(fact)
    own = "rephrase_success" if post.get("rephrase_success") else "rephrase_acc"
    rephrased = mean_of(post.get(own))
    if rephrased is not None and rephrased < 1:
        what = "prefer the new object" if own == "rephrase_success" else "of the new object's tokens come first"
        found.append(Reason("paraphrase failed", f"In the paraphrases {percent(rephrased)} {what}.", PARTLY))
    kept = mean_of((post.get("locality") or {}).get("neighborhood_acc"))
    if kept is not None and kept < 1:
        found.append(Reason("neighbour changed", f"Of the neighbours {percent(kept)} answer as before.", PARTLY))
    return found


def of_record(record: Mapping[str, Any], asked: Mapping[str, str | None]) -> list[Reason]:
    """Of a line of an evaluation's records.

    asked: PROMPT, PARAPHRASE, FOLLOWS, NEIGHBOR -> the metric that decides, None where there is none
    """
    found = []
    for what, makes in ((PROMPT, FAILED), (PARAPHRASE, PARTLY), (FOLLOWS, PARTLY), (NEIGHBOR, PARTLY)):
        key = asked[what]
        value = None if key is None else finite(record.get(key))
        if value is None or value >= 1:
            continue
        if what == PROMPT:
            found.append(_of_answer(record, value))
        elif what == PARAPHRASE:
            answer = record.get("paraphrase_answer")
            text = percent(value) if answer is None else f"the model says {quoted(answer)}"
            found.append(Reason("paraphrase failed", f"Asked in other words: {text}.", makes))
        elif what == FOLLOWS:
            text = f"Of what follows from the fact {percent(value)} is right."
            found.append(Reason("what follows is missing", text, makes))
        elif value < (finite(record.get(f"{key}_unedited")) or (1.0 if key in COMPARISONS else 0.0)):
            now, then = record.get("locality_answer"), record.get("locality_answer_unedited")
            text = f"{percent(value)} is as it should stay" if now is None else f"{quoted(then)} became {quoted(now)}"
            found.append(Reason("neighbour changed", f"A question about something else: {text}.", makes))
    return found


def causes(fact: Mapping[str, Any]) -> list[Reason]:
    """What went wrong inside an edit that failed: in the optimisation of the value, or in the weights."""
    found = []
    probability = finite(fact.get("probability_with_delta"))
    if probability is not None and probability < HALF:
        text = f"Even with its target value put in by hand the new object has a probability of {percent(probability)}."
        found.append(Reason("no target value found", text))
    loss = finite(fact.get("loss"))
    if loss is not None and loss >= STOP_LOSS:
        text = f"Behind {fact.get('steps')} steps the loss still was {number(loss)}; it stops below {STOP_LOSS:g}."
        found.append(Reason("loss above the stop", text))
    achieved = finite(fact.get("achieved"))
    if achieved is not None and achieved < ACHIEVED:
        found.append(Reason("residual left", f"The weights give {percent(achieved)} of the change that was asked for."))
    return found


def _of(side: Mapping[str, Any], kind: str) -> str:
    """ "2 of 3": a share of prompts as whole numbers."""
    prompts = len(side["new_logprob"])
    return f"{round(prompts * side[kind])} of {prompts}"


def _of_answer(record: Mapping[str, Any], value: float) -> Reason:
    answer, earlier, target = record.get("answer"), record.get("answer_unedited"), record.get("target_new")
    if not isinstance(answer, str) or not isinstance(target, str):
        return Reason("not right", f"Behind its own prompt {percent(value)} is right.", FAILED)
    now, wanted = plain(answer), plain(target)
    if not answer.strip():
        return Reason("answer empty", "The model says nothing.", FAILED)
    if now == wanted:
        return Reason("judged wrong", "The answer is the new object to the word, and still it counts as wrong.", FAILED)
    if f"{now} ".startswith(f"{wanted} "):
        return Reason("right, but went on", f"It begins right, then goes on: {quoted(answer)}.", FAILED)
    if f" {wanted} " in f" {now} ":
        return Reason("right, among other words", f"The new object stands within {quoted(answer)}.", FAILED)
    if isinstance(earlier, str) and now == plain(earlier):
        return Reason("answer unchanged", f"It still says {quoted(answer)}.", FAILED)
    return Reason("another answer", f"It says {quoted(answer)}.", FAILED)


def plain(text: str) -> str:
    """Lower case, without ASCII punctuation and articles, single spaces: how answers are compared."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def stripped(text: Any) -> Any:
    """An answer without the space that it begins with; where nothing is left, that is said."""
    return (text.strip() or "(nothing)") if isinstance(text, str) else text


def quoted(text: Any) -> str:
    """Short, in quotation marks."""
    if not isinstance(text, str) or not text.strip():
        return "nothing"
    text = " ".join(text.split())
    return f"“{text if len(text) <= 120 else text[:120] + '…'}”"


def mean_of(value: Any) -> float | None:
    """Published results have a number, or a list with one a prompt."""
    return average(map(finite, value)) if isinstance(value, list) else finite(value)
