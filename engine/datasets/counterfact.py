"""CounterFact in its two published forms: nested (MEMIT, multi-CounterFact) and flat (with edit-time neighbours)."""

from collections.abc import Mapping
from typing import Any

from ...kernels.errors import InputError
from ..facts import Fact


def is_nested(record: Mapping[str, Any]) -> bool:
    return "requested_rewrite" in record


def from_nested(
    record: Mapping[str, Any],
    candidates: bool = False,
    generation: bool = False,
    references: Mapping[tuple[str, str], tuple[str, ...]] | None = None,
) -> dict[str, Any]:
    """One multi-CounterFact record; attribute prompts are not used here.

    candidates: its `neighborhood_samples` (subject, prompt with `{}`) become `edit_neighbors`, as far as they are what
        the neighbourhood prompts ask: a few records have others.
    generation: `generation_prompts` are read
    references: as of `references.read_references`; those of the new object in this relation become the fact's
    """
    rewrite = record["requested_rewrite"]
    samples = record.get("neighborhood_samples", []) if candidates else []
    neighbors = record.get("neighborhood_prompts", [])
    more: dict[str, Any] = {"generation_prompts": record.get("generation_prompts", [])} if generation else {}
    if references is not None:
        more["references"] = references.get((rewrite["relation_id"], rewrite["target_new"]["id"]), ())
    return more | {
        "id": record["case_id"],
        "subject": rewrite["subject"],
        "prompt": rewrite["prompt"],
        "target_new": rewrite["target_new"]["str"],
        "target_true": rewrite["target_true"]["str"],
        "paraphrases": record.get("paraphrase_prompts", []),
        "neighbors": neighbors,
        "edit_neighbors": [
            {"subject": sample["subject"], "prompt": sample["prompt"], "target": rewrite["target_true"]["str"]}
            for sample in samples
            if sample["prompt"].count("{}") == 1 and sample["prompt"].replace("{}", sample["subject"]) in neighbors
        ],
    }


def is_flat(record: Mapping[str, Any]) -> bool:
    return "locality" in record and "ground_truth" in record and "neighborhood_samples" in record


def from_flat(record: Mapping[str, Any], position: int) -> dict[str, Any]:
    """One record of the neighbour-assisted sets: `neighborhood_samples` are for the edit, `locality` is held out."""
    return {
        "id": record["case_id"],
        "subject": record["subject"],
        "prompt": record["prompt"],
        "target_new": record["target_new"],
        "target_true": record["ground_truth"],
        "paraphrases": record["rephrase_prompt"],
        "neighbors": record["locality"]["neighborhood"]["prompt"],
        "edit_neighbors": [
            {"subject": sample["subject"], "prompt": sample["prompt"], "target": record["ground_truth"]}
            for sample in record["neighborhood_samples"]
        ],
    }


def check_flat(fact: Fact) -> None:
    """Raises `InputError` for a fact that the flat form has no place for."""
    reason = None
    if fact.target_true is None:
        reason = "no true object"
    elif fact.locality:
        reason = "questions about other things (locality)"
    elif fact.ripples:
        reason = "tests of what follows (ripples)"
    elif fact.generation_prompts or fact.references:
        reason = "what its generated texts are judged by (generation_prompts, references)"
    elif any(neighbor.target != fact.target_true for neighbor in fact.edit_neighbors):
        reason = "an edit-time neighbour with another object than its own"
    elif "{}" in fact.question or fact.question.replace(fact.subject, "{}") != fact.prompt:
        reason = "a subject that its prompt holds more than once, and the form does not mark the place"
    if reason:
        raise InputError(f"fact {fact.id} ({fact.subject}): {reason}; the flat form cannot say that: write .jsonl")


def to_flat(fact: Fact, number: int) -> dict[str, Any]:
    """The fact as published sets have it, the `number`-th of its file; `from_flat` reads it back, but for the id."""
    return {
        "prompt": fact.question,
        "target_new": fact.target_new,
        "ground_truth": fact.target_true,
        "portability": {},
        "locality": {
            "neighborhood": {"prompt": list(fact.neighbors), "ground_truth": [fact.target_true] * len(fact.neighbors)}
        },
        "subject": fact.subject,
        "rephrase_prompt": list(fact.paraphrases),
        "neighborhood_samples": [
            {"subject": neighbor.subject, "prompt": neighbor.prompt} for neighbor in fact.edit_neighbors
        ],
        "case_id": number,
    }
