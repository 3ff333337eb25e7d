"""CounterFact in EasyEdit's form (counterfact-edit.json): flat records with one paraphrase and one neighbour each."""

from collections.abc import Mapping
from typing import Any


def is_counterfact(record: Mapping[str, Any]) -> bool:
    return "rephrase_prompt" in record and "locality_prompt" in record and "ground_truth" in record


def from_counterfact(record: Mapping[str, Any]) -> dict[str, Any]:
    """One record. Its neighbour is judged by the record's own true object, so one with another answer is left out."""
    same = record.get("locality_ground_truth") == record["ground_truth"]
    return {
        "id": record["case_id"],
        "subject": record["subject"],
        "prompt": record["prompt"],
        "target_new": record["target_new"],
        "target_true": record["ground_truth"],
        "paraphrases": record["rephrase_prompt"],
        "neighbors": record["locality_prompt"] if same else [],
    }
