"""CounterFact in its two published forms: nested (MEMIT, multi-CounterFact) and flat (with edit-time neighbours)."""

from collections.abc import Mapping
from typing import Any


def is_nested(record: Mapping[str, Any]) -> bool:
    return "requested_rewrite" in record


def from_nested(record: Mapping[str, Any]) -> dict[str, Any]:
    """One multi-CounterFact record; attribute and generation prompts are not used here."""
    rewrite = record["requested_rewrite"]
    return {
        "id": record["case_id"],
        "subject": rewrite["subject"],
        "prompt": rewrite["prompt"],
        "target_new": rewrite["target_new"]["str"],
        "target_true": rewrite["target_true"]["str"],
        "paraphrases": record.get("paraphrase_prompts", []),
        "neighbors": record.get("neighborhood_prompts", []),
    }


def is_flat(record: Mapping[str, Any]) -> bool:
    return "locality" in record and "ground_truth" in record and "neighborhood_samples" in record


def from_flat(record: Mapping[str, Any]) -> dict[str, Any]:
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
