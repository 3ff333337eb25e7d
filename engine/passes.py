"""Running the model: forward passes that read or generate (`suffix` has the one that is differentiated).

All rows are padded on the right and run without an attention mask: under causal attention no real token sees the
padding, and nothing is read from padded positions. Passes stop behind the last module that is asked for.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import FastGELUActivation, NewGELUActivation

from ..stats.collect import batches
from ..stats.memory import free_bytes
from .model import Model
from .prompts import CONTEXT_TOKENS, CONTEXT_TOP_K, SEED_WORDS, Row, clean_context, pad, prompt_ids

MEMORY_SHARE = 0.4  # of the free memory that a batch may take
MOST_WORKERS = 8  # threads that run Python
CPU_TOKENS = 1024  # larger batches leave the caches (docs/benchmarks.md)
GPU_TOKENS = 65536


Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
Call = tuple[tuple[Any, ...], dict[str, Any]]  # of a block: positional and keyword arguments behind the hidden states


class Stop(Exception):
    """Raised inside a forward, behind the last module that is needed."""


@contextlib.contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Evaluation mode and frozen weights inside; both as they were afterwards."""
    training = [module for module in model.hf.modules() if module.training]
    # by name: of a placed model, accelerate makes new parameters in every forward
    learning = [
        (module, name)
        for module in model.hf.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    ]
    model.hf.eval()
    for module, name in learning:
        getattr(module, name).requires_grad_(False)
    try:
        yield
    finally:
        for module, name in learning:
            getattr(module, name).requires_grad_(True)
        for module in training:
            module.training = True


@contextlib.contextmanager
def fused(model: Model) -> Iterator[None]:
    """`frozen`, and inside a GELU that is written out in a dozen operations (GPT-2, GPT-J) is torch's one of them."""
    spelled_out = [
        (module, name, child)
        for module in model.hf.modules()
        for name, child in module.named_children()
        if type(child) in (NewGELUActivation, FastGELUActivation)
    ]
    with frozen(model):
        for module, name, _ in spelled_out:
            setattr(module, name, nn.GELU(approximate="tanh"))
        try:
            yield
        finally:
            for module, name, child in spelled_out:
                setattr(module, name, child)


@contextlib.contextmanager
def in_threads(device: torch.device) -> Iterator[Map]:
    """A `map` whose calls run side by side on a CPU, each on its share of the cores: small products do not fill many.

    On a GPU, where torch has one thread, and for too few calls, it is the builtin one.
    """
    threads = torch.get_num_threads()
    workers = min(threads, MOST_WORKERS)
    if device.type != "cpu" or workers < 2:
        yield map
        return
    chosen = contextvars.copy_context()  # what serves the operations
    with ThreadPoolExecutor(workers, "part", torch.set_num_threads, (threads // workers,)) as pool:

        def side_by_side(call: Callable[[Any], Any], each: Iterable[Any]) -> Iterator[Any]:
            each = list(each)
            if len(each) < workers:
                return map(call, each)
            return pool.map(lambda one: chosen.copy().run(call, one), each)

        try:
            yield side_by_side
        finally:
            torch.set_num_threads(threads)  # it is also what threads that begin later have


@contextlib.contextmanager
def hooks(*handles: Any) -> Iterator[None]:
    """The handles' hooks are there inside, and gone afterwards."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hidden_of(output: Any) -> Tensor:
    """A block's hidden states: some families return a tuple, others the tensor."""
    return output[0] if isinstance(output, tuple) else output


def forward(model: Model, ids: Tensor, **kwargs: Any) -> None:
    """A forward over token ids [rows, T] that a hook may end by raising `Stop`."""
    with contextlib.suppress(Stop):
        model.hf(input_ids=ids, **({"use_cache": False} | kwargs))


def run_until(model: Model, ids: Tensor, module: nn.Module, **kwargs: Any) -> None:
    """A forward over token ids [rows, T] that ends where `module` is reached."""
    with hooks(module.register_forward_pre_hook(_stop)):
        forward(model, ids, **kwargs)


def _stop(*_: Any) -> None:
    raise Stop


def tokens_that_fit(model: Model, bytes_per_token: float) -> int:
    """Padded tokens a batch may hold when each takes `bytes_per_token`."""
    cap = GPU_TOKENS if model.device.type == "cuda" else CPU_TOKENS
    return max(1, min(cap, int(MEMORY_SHARE * free_bytes(model.device) / bytes_per_token)))


def forward_bytes(model: Model) -> float:
    """Rough bytes that one token takes in a pass without gradients: some buffers of each width of one block."""
    return 4.0 * (12 * model.anatomy.d_model + 4 * model.anatomy.d_in)


def out_of_memory(error: RuntimeError) -> bool:
    """On a GPU, or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        said in str(error) for said in ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )


@torch.no_grad()
def blocks_until(model: Model, ids: Tensor, layer: int) -> Tensor:
    """The output of block `layer` for token ids [rows, T]: [rows, T, d_model] in the model's dtype."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept.append(hidden_of(output))
        raise Stop

    with fused(model), hooks(model.block(layer).register_forward_hook(keep)):
        forward(model, ids)
    return kept[0]


def before_head(model: Model, ids: Tensor, **kwargs: Any) -> Tensor:
    """What the head would read for token ids [rows, T]: [rows, T, d_model]. The head does not run."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise Stop

    with hooks(model.head.register_forward_pre_hook(keep)):
        forward(model, ids, **kwargs)
    return seen[0]


@torch.no_grad()
def final_hidden(model: Model, rows: Sequence[Row], places: Sequence[Sequence[int]], batch_tokens: int) -> Tensor:
    """Hidden states behind the final norm at each row's places: [sum of places, d_model], rows in order."""
    result: dict[int, Tensor] = {}
    with fused(model):
        for batch in batches([len(row.ids) for row in rows], batch_tokens):
            hidden = before_head(model, pad([rows[i] for i in batch], model.device))
            for line, i in enumerate(batch):
                result[i] = hidden[line, list(places[i])]
    return torch.cat([result[i] for i in range(len(rows))])


@torch.no_grad()
def sample_contexts(
    model: Model, seed: int, asked: Sequence[tuple[int, int]] = ((CONTEXT_TOKENS, len(SEED_WORDS)),)
) -> tuple[str, ...]:
    """Context templates that begin with the published seed words, sampled (top-k).

    asked: (tokens, with the word's own and BOS; templates of that length, a multiple of the words) of each kind
    """
    generator = torch.Generator().manual_seed(seed)
    words = prompt_ids(model.tokenizer, SEED_WORDS)
    wanted = [(length, list(word)) for length, count in asked for word in words for _ in range(count // len(words))]
    while growing := [row for length, row in wanted if len(row) < length]:
        kept = [Row(tuple(row)) for row in growing]
        together = len(growing) * max(len(row) for row in growing)  # padded: all in one batch
        hidden = final_hidden(model, kept, [[len(row) - 1] for row in growing], batch_tokens=together)
        top = model.logits(hidden).cpu().topk(CONTEXT_TOP_K)
        picks = torch.multinomial(top.values.softmax(-1), 1, generator=generator)
        for row, token in zip(growing, top.indices.gather(1, picks)[:, 0].tolist(), strict=True):
            row.append(token)
    return tuple(clean_context(model.tokenizer.decode(row, skip_special_tokens=True)) for _, row in wanted)
