"""QAEdit (arXiv 2502.11177): questions of SimpleQA, TriviaQA and Natural Questions, with their right answers."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from .marking import mark_subject


def is_qaedit(record: Mapping[str, Any]) -> bool:
    return {"prompt", "target", "subject", "rephrase"} <= set(record) and isinstance(record.get("locality"), list)


def from_qaedit(record: Mapping[str, Any], seen: Counter[str]) -> dict[str, Any]:
    """One record. `target` is the right answer and becomes the new object; no true one is known to be wrong.

    All of its questions about something else (five in the published file) become `locality`, in order; the published
    evaluation asks the first one alone, so a protocol that compares with it takes `locality[0]`.
    Texts stay as they are, also those that kept the quotes of a CSV cell: published figures are of these questions.
    `id` repeats in the published file, so the second 70 is "70-2"; seen: ids of the records before, which it counts
    Published code stops where a prompt holds the subject twice: `mark_subject` takes one of the places.
    """
    name = str(record["id"])
    seen[name] += 1
    prompt, subject = mark_subject(record["prompt"], record["subject"])
    return {
        "id": name if seen[name] == 1 else f"{name}-{seen[name]}",
        "subject": subject,
        "prompt": prompt,
        "target_new": record["target"],
        "paraphrases": record["rephrase"],
        "locality": [{"prompt": asked["loc"], "target": asked["loc_ans"]} for asked in record["locality"]],
    }
