"""Second moments of many layers in one pass over a corpus. Knows no model: it is handed a function that runs one."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from torch import Tensor

from ..kernels.errors import InputError
from .corpora import Corpus
from .moments import Moment, SecondMoment

Sink = Callable[[str, Tensor], None]
Run = Callable[[list[list[int]], Sink], None]
Encode = Callable[[list[str]], list[list[int]]]
Progress = Callable[[int, int], None]

WINDOW = 512  # documents that are tokenised, and sorted by length, together


def default_tokens(widths: dict[str, int]) -> int:
    """The budget where none is asked for: 20 tokens a column of the widest layer."""
    return 20 * max(widths.values())


def collect(
    run: Run,
    encode: Encode,
    corpus: Corpus,
    widths: dict[str, int],
    *,
    max_length: int | None,
    n_samples: int | None = None,
    tokens: int | None = None,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> dict[str, Moment]:
    """The second moments of all layers in `widths`, over the same tokens.

    run: runs the model on a batch of token rows (longest first, unpadded, as lists) and calls sink(layer, X) with the
        keys X [tokens of the batch, d_in] of each layer, padding dropped; layers that are not in `widths` are ignored
    encode: texts -> token rows, special tokens included
    widths: layer name -> d_in
    max_length: tokens that are kept of a document's start, special tokens counted; None keeps all
    n_samples, tokens: documents are taken in the corpus' order until there are `n_samples` of them or they hold
        `tokens` tokens, whichever is first, the last one whole; neither given: `default_tokens(widths)`
    batch_tokens: padded tokens of a batch at most (a longer document goes alone); changes the result by rounding only
    progress: called after each batch with (tokens done, tokens in all: an estimate where only `n_samples` is given)

    Raises `InputError` for NaN or Inf among the keys, and for fewer than 2 d_in tokens of the widest layer.
    """
    if n_samples is None and tokens is None:
        tokens = default_tokens(widths)
    widest = max(widths, key=lambda layer: widths[layer])
    least = 2 * widths[widest]
    for name, asked in (("mom2_n_samples", n_samples), ("the cap of tokens a document", max_length)):
        if asked is not None and asked < 1:
            raise InputError(f"{name} is {asked}, expected at least 1")
    if tokens is not None and tokens < least:
        raise InputError(f"a budget of {tokens} tokens; layer {widest} of width {least // 2} needs at least {least}")

    sums: dict[str, SecondMoment] = {}

    def sink(layer: str, X: Tensor) -> None:
        if layer in widths:
            if layer not in sums:  # only now is the device known
                sums[layer] = SecondMoment(widths[layer], X.device, layer)
            sums[layer].add(X)

    documents = read = done = 0
    for rows in windows(encode, corpus, max_length, n_samples, tokens):
        documents += len(rows)
        read += sum(map(len, rows))
        bounds = [tokens, n_samples and read * n_samples // documents]
        total = min(bound for bound in bounds if bound is not None)
        for chosen in batches([len(row) for row in rows], batch_tokens):
            batch = [rows[i] for i in chosen]
            run(batch, sink)
            done += sum(map(len, batch))
            if progress is not None:
                progress(done, max(total, done))

    if done < least:
        raise InputError(
            f"{corpus.source}: gave {done} tokens in {documents} documents, layer {widest} of width {least // 2} needs "
            f"at least {least}; use a longer corpus, or raise mom2_n_samples or the cap of tokens a document"
        )
    for layer in widths:
        got = sums[layer].count if layer in sums else 0
        if got != done:
            raise RuntimeError(f"run gave {got} keys for layer {layer} where it was handed {done} tokens")
    return {layer: sums.pop(layer).finish(documents) for layer in widths}


def windows(
    encode: Encode, corpus: Corpus, max_length: int | None, n_samples: int | None, tokens: int | None
) -> Iterator[list[list[int]]]:
    """The token rows of the documents that `collect` takes, `WINDOW` documents at a time, in the corpus' order."""
    texts = iter(corpus)
    documents = read = 0
    while chunk := list(islice(texts, WINDOW if n_samples is None else min(WINDOW, n_samples - documents))):
        rows: list[list[int]] = []
        for row in encode(chunk):
            if tokens is not None and read >= tokens:
                break
            if row:
                rows.append(row[:max_length])
                read += len(rows[-1])
        if rows:
            yield rows
        documents += len(rows)
        if tokens is not None and read >= tokens:
            return


def batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices in batches of at most `tokens` padded tokens (at least one row each), longest rows first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    result: list[list[int]] = []
    for index in order:
        # rows come longest first, so the first of a batch is its width
        if result and (len(result[-1]) + 1) * lengths[result[-1][0]] <= tokens:
            result[-1].append(index)
        else:
            result.append([index])
    return result
