"""Statistics of a model's keys over a corpus: streamed, kept on disk, found again. Knows no models."""

from .cache import cache_root
from .corpora import Corpus, read_corpus
from .moments import Moment
from .supply import moments_for

__all__ = ["Corpus", "Moment", "cache_root", "moments_for", "read_corpus"]
