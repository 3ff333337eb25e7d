"""What the metrics are called and what they mean, and which question each of them is about."""

from collections.abc import Iterable, Mapping
from typing import Any

from .content import Metric, finite, is_rate, label

PROMPT, PARAPHRASE, FOLLOWS, NEIGHBOR = "prompt", "paraphrase", "follows", "neighbor"
ABOUT = {  # how the names of metrics begin -> what they ask
    PROMPT: ("reliability", "efficacy", "rewrite"),
    PARAPHRASE: ("generalization", "generality", "paraphrase", "rephrase"),
    FOLLOWS: ("portability",),
    NEIGHBOR: ("specificity", "neighborhood", "locality"),
}
ASKED = {
    PROMPT: "on the edit's own prompt",
    PARAPHRASE: "on the paraphrases",
    FOLLOWS: "on what follows from the edits",
    NEIGHBOR: "on questions about other things, where the true object should stay",
}
MEANING = {
    "success": "share of prompts where the wanted object has the higher mean token log-probability of the two",
    "accuracy": "share of prompts where each token of the wanted object is the most probable one",
    "acc": "share of the wanted object's tokens that are the most probable one at their place",
    "magnitude": "probability of the wanted object minus that of the other one, by their mean log-probabilities",
    "ppl": "perplexity of the new object",
}
KNOWN = {  # key -> (label, definition)
    "score": ("score", "harmonic mean of the success rates of prompt, paraphrases and neighbours"),
    "score_success": ("score", "harmonic mean of the three success rates"),
    "score_acc": ("score, accuracy", "harmonic mean of the three accuracies"),
    "specificity_acc": ("specificity, answers as before", "share of neighbours whose answer the edit left as it was"),
    "me_ppl": ("perplexity of plain texts", "mean perplexity of texts that have nothing to do with the edit"),
    "spread": ("new object, SPREAD", "perplexity behind the update of the weights, under all templates"),
    "optimization": (
        "new object, OPTIMIZATION",
        "perplexity with its optimised value put in by hand: what the weights could give at best",
    ),
}


def about(key: str) -> str | None:
    """Which of PROMPT, PARAPHRASE and NEIGHBOR a metric's name begins with."""
    return next((asked for asked, starts in ABOUT.items() if key.startswith(starts)), None)


def define(key: str) -> tuple[str, str]:
    """(label, one line that says what it is) of a metric that came without a definition."""
    if key in KNOWN:
        return KNOWN[key]
    kind, _, what = key.rpartition("_")
    asked = about(key)
    meaning = MEANING.get(what)
    if asked is None or meaning is None:
        return label(key), ""
    named = {"acc": "token accuracy", "ppl": "perplexity"}.get(what, what)
    return f"{kind.replace('_', ' ')}, {named}", f"{meaning}; {ASKED[asked]}"


def metric(key: str, before: Any, after: Any, definition: str | None = None) -> Metric:
    """definition: as the evaluation itself gives it"""
    name, ours = define(key)
    numbers = finite(before), finite(after)
    known = [value for value in numbers if value is not None]
    return Metric(name, definition or ours, *numbers, rate=is_rate(key, known))


def metrics(
    before: Mapping[str, Any] | None, after: Mapping[str, Any], definitions: Mapping[str, str] | None = None
) -> list[Metric]:
    """All that were measured behind the edit, in their order; what was not measured at all is left out."""
    earlier = before or {}
    made = [metric(key, earlier.get(key), value, (definitions or {}).get(key)) for key, value in after.items()]
    return [each for each in made if each.before is not None or each.after is not None]


def telling(keys: Iterable[str], asked: str) -> str | None:
    """The metric that says whether a fact is as asked: the one of that very name, else the strictest that is a rate."""
    own = [key for key in keys if about(key) == asked and not key.endswith("_unedited") and is_rate(key, ())]
    ranks = {"accuracy": 0, "acc": 0, "success": 2}
    return min(own, key=lambda key: (key not in ABOUT[asked], ranks.get(key.rpartition("_")[2], 1)), default=None)
