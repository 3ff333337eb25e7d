"""EasyEdit's forms of CounterFact (counterfact-edit.json), of the hallucinations of SimIE and WISE, and KnowEdit."""

from collections.abc import Mapping
from typing import Any

from ..facts import RIPPLES
from .marking import mark_subject
from .ripple import answers, first, ripple

# KnowEdit's name -> RippleEdits'. A question of `Reasoning` goes on from the new object ("the mayor of the place where
# Leo Arons died"), which is Compositionality_I; Compositionality_II would reach the subject from another one.
_CATEGORIES = {name: name for name in RIPPLES} | {"Reasoning": "Compositionality_I"}


def is_counterfact(record: Mapping[str, Any]) -> bool:
    return "rephrase_prompt" in record and "locality_prompt" in record and "ground_truth" in record


def from_counterfact(record: Mapping[str, Any], position: int) -> dict[str, Any]:
    """One record, with one paraphrase and one neighbour.

    A neighbour is judged by the record's own true object, so one with another answer is a question about something
    else (`locality`); one without an answer is left out.
    """
    answer = record.get("locality_ground_truth")
    same = answer == record["ground_truth"]
    probes = [] if same or answer is None else [{"prompt": record["locality_prompt"], "target": answer}]
    return {
        "id": record["case_id"],
        "subject": record["subject"],
        "prompt": record["prompt"],
        "target_new": record["target_new"],
        "target_true": record["ground_truth"],
        "paraphrases": record["rephrase_prompt"],
        "neighbors": record["locality_prompt"] if same else [],
        "locality": probes,
    }


def is_hallucination(record: Mapping[str, Any]) -> bool:
    needed = {"prompt", "target_new", "subject", "locality_prompt", "locality_ground_truth"}
    return needed <= set(record) and not {"rephrase_prompt", "ground_truth"} & set(record)


def from_hallucination(record: Mapping[str, Any], position: int) -> dict[str, Any]:
    """One record, the `position`-th of its file: records have no id.

    A beginning of an article, the sentence that shall follow, and an unrelated text, cut in two at no place in
    particular. There are no paraphrases and no true object. The subject is in small letters, as the prompt's first
    sentence has it.
    """
    prompt, subject = mark_subject(record["prompt"], record["subject"])
    return {
        "id": position,
        "subject": subject,
        "prompt": prompt,
        "target_new": record["target_new"],
        "locality": [{"prompt": record["locality_prompt"], "target": record["locality_ground_truth"]}],
    }


def is_knowedit(record: Mapping[str, Any]) -> bool:
    kinds = [record.get(name) for name in ("portability", "locality")]
    return any(isinstance(kind, Mapping) for kind in kinds) and (
        {"prompt", "target_new"} <= set(record) or {"text", "labels"} <= set(record)
    )


def from_knowedit(record: Mapping[str, Any], position: int) -> dict[str, Any]:
    """One record of KnowEdit (arXiv 2401.01286), the `position`-th of its file; WikiBio has text, concept, labels.

    `portability` and `locality` are tests of RippleEdits with its categories, `Reasoning` being Compositionality_I,
    without conditions: whether the unedited model knows what a test builds on is not asked. All that stands in
    `ground_truth`, at whatever depth, is right. Tests without an answer are left out.
    """
    text = record["prompt"] if "prompt" in record else record["text"]
    prompt, subject = mark_subject(text, record["subject"] if "subject" in record else record["concept"])
    tests = [
        ripple(_CATEGORIES[name], test.get("prompt"), answers(test.get("ground_truth")))
        for kind in ("portability", "locality")
        for name, listed in (record.get(kind) or {}).items()
        for test in listed or ()
    ]
    return {
        "id": position,
        "subject": subject,
        "prompt": prompt,
        "target_new": record["target_new"] if "target_new" in record else record["labels"],
        "target_true": first(record.get("ground_truth")),
        "paraphrases": record.get("rephrase_prompt") or record.get("rephrase") or [],
        "ripples": [test for test in tests if test],
    }
