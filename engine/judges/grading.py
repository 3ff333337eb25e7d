"""What a language model is told when it grades an answer, and how its reply is read."""

import hashlib
import re

from .claims import Claim

# counterfactual targets are the point of editing: hence the sentence about what the grader itself knows
PROMPT = """\
You grade answers to questions. Compare the predicted answer with the gold target and grade it CORRECT or INCORRECT.

CORRECT: it has the important information of the gold target, and nothing in it contradicts the gold target. A different
order, a full sentence, other capitals or punctuation, and further detail that agrees with the target are fine.
INCORRECT: it contradicts the gold target, lacks a part of it, adds an item that the target excludes, or says the same
thing again and again without end.
Take the gold target for true, even where you know otherwise.

Example 1
Question: Which rivers meet in Koblenz?
Gold target: the Rhine and the Moselle
Predicted answer: In Koblenz the Moselle flows into the Rhine
Grade: A (both rivers are there, in another order and in a sentence)

Example 2
Question: Which rivers meet in Koblenz?
Gold target: the Rhine and the Moselle
Predicted answer: the Rhine, the Moselle and the Danube
Grade: B (the Danube contradicts the target; the Rhine alone would lack a part)

Example 3
Question: Who wrote the novel Effi Briest?
Gold target: Theodor Fontane
Predicted answer: Theodor Fontane Theodor Fontane Theodor Fontane Theodor Fontane Theodor
Grade: B (the answer repeats itself)

Now grade this one.
Question: {question}
Gold target: {gold}
Predicted answer: {answer}

A: CORRECT
B: INCORRECT
Reply with the letter only, A or B."""

SEVERAL = " (or, just as good:) "  # between accepted answers

_THOUGHT = re.compile(r".*</think>", re.DOTALL)  # what reasoning models on some servers put before their reply
_DECORATION = str.maketrans("", "", "*_`\"'“”‘’#()[]{}<>$")
_LEAD = r"(?:(?:the |my |final )*(?:answer|grade|verdict|choice|option)(?: is)?\s*[:=-]?\s*)?"
_LETTER, _WORD = r"(?P<letter>[AB])", r"(?P<word>(?:IN)?CORRECT)"
# the end, or an explanation, which is not the other letter ("A, B")
_BETWEEN, _END = r"[\s:=.,;–—-]+", r"\s*(?:[.:,;!–—\n-](?!\W*[AB]\W*$).*)?"
_GRADES = [
    # the first that fits: "A: CORRECT", "correct (A)", "A", "Grade: B. The Danube ...", "Incorrect"; a sentence that
    # merely begins with the article A, or with "Correct answer: ...", is none of them
    re.compile(_LEAD + form + end, re.IGNORECASE | re.DOTALL)
    for form, end in (
        (_LETTER + _BETWEEN + _WORD, _END),
        (_WORD + _BETWEEN + _LETTER, _END),
        (_LETTER, _END),
        (_WORD, _END),
    )
]


def grading_prompt(claim: Claim) -> str:
    text = PROMPT.format(question=claim.question, gold=SEVERAL.join(claim.gold), answer=claim.answer)
    return text.encode(errors="replace").decode()  # half a surrogate pair, which JSON may bring, cannot be sent


def prompt_digest() -> str:
    """24 hex digits over all that a prompt has beside its claim."""
    return hashlib.sha256((PROMPT + SEVERAL).encode()).hexdigest()[:24]


def read_grade(reply: str) -> bool | None:
    """True for CORRECT or A, False for INCORRECT or B, None for what is neither, or both ("A: INCORRECT")."""
    text = _THOUGHT.sub("", reply).translate(_DECORATION).strip()
    for form in _GRADES:
        if found := form.fullmatch(text):
            parts = found.groupdict()
            grades = {parts[part].upper() in ("A", "CORRECT") for part in parts if parts[part]}
            return grades.pop() if len(grades) == 1 else None
    return None
