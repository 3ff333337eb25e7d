"""What a model writes about a subject, as CounterFact judges it (arXiv 2202.05262): n-gram entropy, reference score.

Texts are up to `LENGTH` tokens long, the prompt's among them, and are judged with their prompt, as published. They are
continued greedily and end with the end of the text; published ones are sampled (from the five most probable tokens) and
go on behind it. So these are the same each time, and repeat themselves more: entropies lie below the published ones, to
be held against those of the unedited model.

Words are runs of letters and digits, and each other visible character for itself; published ones come from NLTK's
`word_tokenize` ("don't" is "do n't" there and "don ' t" here), whose data has to be downloaded.
Inverse document frequencies come from the references of all the facts; the published ones from all attribute snippets
of CounterFact, also of objects that no fact has.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ...kernels.errors import InputError
from ..asked import Asked
from ..facts import Fact
from ..phases import Tick
from ..prompts import prompt_ids

LENGTH = 100  # tokens of a text with its prompt
WEIGHTS = {2: 2 / 3, 3: 4 / 3}  # n of the n-grams -> their part in the mean
_WORD = re.compile(r"\w+|[^\w\s]")


def fluency(asked: Asked, facts: Sequence[Fact], progress: Tick) -> list[dict[str, Any]]:
    """Of each fact {"ngram_entropy": mean of its texts, bits, "reference_score", "texts"}; {} of one without
    `generation_prompts`, no score of one without `references`.

    Raises `InputError` where scikit-learn is needed and missing.
    """
    judged = [fact.references if fact.generation_prompts else () for fact in facts]
    vectors = _vectorizer([text for references in judged for text in references])
    found: list[dict[str, Any]] = []
    for texts, references in zip(_written(asked, facts, progress), judged, strict=True):
        record: dict[str, Any] = {}
        if texts:
            record = {"ngram_entropy": sum(map(ngram_entropy, texts)) / len(texts), "texts": texts}
        if references:
            ours, theirs = vectors.transform([" ".join(texts), " ".join(references)]).toarray()  # of length 1, or 0
            record["reference_score"] = float(ours @ theirs)
        found.append(record)
    return found


def ngram_entropy(text: str) -> float:
    """Bits: the mean of 2/3 of the entropy of its bigrams and 4/3 of that of its trigrams; 0 where it has none."""
    words = _WORD.findall(text)
    return sum(weight * _entropy(words, n) for n, weight in WEIGHTS.items()) / len(WEIGHTS)


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    total = counts.total()
    return math.fsum(count / total * math.log2(total / count) for count in counts.values())


def _written(asked: Asked, facts: Sequence[Fact], progress: Tick) -> list[list[str]]:
    """What the model writes from each fact's prompts, prompt and all."""
    tokenizer = asked.model.tokenizer
    prompts = list(dict.fromkeys(prompt for fact in facts for prompt in fact.generation_prompts))
    ids = dict(zip(prompts, prompt_ids(tokenizer, prompts), strict=True))
    wanted = [
        (number, prompt)
        for number, fact in enumerate(facts)
        for prompt in fact.generation_prompts
        if len(ids[prompt]) < LENGTH
    ]
    # one limit for all, so that they run together; what the longer prompts got too much is cut
    limit = LENGTH - min((len(ids[prompt]) for _, prompt in wanted), default=0)
    said = dict(zip(wanted, asked.continuations(wanted, limit=limit, progress=progress), strict=True))

    def text(number: int, prompt: str) -> str:
        own = ids[prompt]
        more = said[number, prompt].ids[: LENGTH - len(own)] if (number, prompt) in said else ()
        whole = tokenizer.decode([*own, *more], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return unicodedata.normalize("NFKD", whole).replace("\n\n", " ")

    return [[text(number, prompt) for prompt in fact.generation_prompts] for number, fact in enumerate(facts)]


def _vectorizer(references: Sequence[str]) -> Any:
    """tf-idf fitted to the distinct references; None where there are none."""
    if not references:
        return None
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise InputError("reference_score needs scikit-learn: pip install 'rewire[eval]'") from None
    try:
        return TfidfVectorizer().fit(dict.fromkeys(references))
    except ValueError:
        raise InputError("the facts' references hold no word of two letters or more, expected texts") from None
