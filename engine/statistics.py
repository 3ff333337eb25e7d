"""Second moments of a model's keys: `rewire.stats` knows no models, here it gets one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..kernels.errors import InputError
from ..kernels.floors import Cost, statistics_cost
from ..stats import Corpus, Moment, moments_for
from ..stats.collect import BLOCK, Budget, Means, Progress, Rows, Run, Sink, default_tokens
from ..stats.ranks import ALONE, Ranks
from .hparams import Hparams, load_hparams
from .model import Model
from .outline import model_shape, reach_of
from .passes import forward_bytes, tokens_that_fit
from .streams import can_pack, linear_widths, stream_inputs


def second_moments(
    model: Model,
    modules: Sequence[str],
    corpus: Corpus | None,
    budget: Budget,
    *,
    seed: int | None = 0,
    shard: tuple[int, int] = (0, 1),
    stats: str | Path | None = None,
    out: Path | None = None,
    fingerprint: str | None = None,
    place: str = "auto",
    checkpoint_tokens: int | None = None,
    ranks: Ranks = ALONE,
    progress: Progress | None = None,
) -> dict[str, Moment]:
    """The second moments of the inputs of any named linear maps: from a folder, the cache, or one pass over a corpus.

    modules: paths such as "transformer.h.3.mlp.c_proj"; the pass ends behind the last of them
    budget: its `max_length` is lowered to the model's own longest row
    fingerprint: of the weights before they were edited; None: as they are
    place: where the running sums go: "device", "cpu", "disk", or "auto": the first that they fit into
    corpus, seed, shard, stats, out, ranks, progress: as in `rewire.stats.moments_for`; checkpoint_tokens: as in `Means`

    Raises `InputError` for a module that is not there, a corpus or folder that will not do, and NaN among the keys.
    """
    widths = linear_widths(model, modules)

    def prepare() -> tuple[Run, Means]:
        packed = can_pack(model, modules)
        chosen = None if place == "auto" else place
        room = tokens_that_fit(model, forward_bytes(model))

        def run(rows: Rows, sink: Sink) -> None:
            stream_inputs(model, rows, modules, sink, packed)

        return run, Means(room, packed, chosen, checkpoint_tokens, str(model.device))

    return moments_for(
        widths,
        model=model.name,
        fingerprint=fingerprint or model.fingerprint,
        dtype=str(next(model.hf.parameters()).dtype).removeprefix("torch."),
        prepare=prepare,
        encode=lambda texts: encode(model, texts),
        corpus=corpus,
        budget=Budget(
            min(budget.max_length or model.max_length, model.max_length),
            budget.documents, budget.tokens, budget.tolerance,
        ),
        seed=seed,
        shard=shard,
        stats=stats,
        out=out,
        ranks=ranks,
        progress=progress,
    )  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """What is to be collected; what nobody says is what an edit with MEMIT's preset for the model asks for.

    seed: of the order; None: the corpus' own
    """

    modules: list[str]
    budget: Budget
    seed: int | None


def wanted(
    model: Model,
    layers: Sequence[int] | None = None,
    modules: Sequence[str] | None = None,
    budget: Budget = Budget(None),  # noqa: B008
    seed: int | None = None,
    in_order: bool = False,
) -> Wanted:
    """modules: paths of linear maps, or layers: MLP output projections of blocks; of neither, the preset's layers."""
    preset, _ = load_hparams(Hparams, "memit", model.name, model.anatomy)
    names = [model.anatomy.layer_name(layer) for layer in known_layers(model, layers or preset.layers)]
    names = list(dict.fromkeys(modules or names))
    budget = replace(budget, max_length=budget.max_length or preset.mom2_max_length)
    if budget.documents is None and budget.tokens is None and budget.tolerance is None:
        tokens = preset.mom2_tokens or default_tokens(linear_widths(model, names))
        budget = replace(budget, documents=preset.mom2_n_samples, tokens=tokens)
    return Wanted(names, budget, None if in_order else preset.mom2_seed if seed is None else seed)


def known_layers(model: Model, layers: Sequence[int]) -> list[int]:
    """Each once. Raises `InputError` for one that the model does not have."""
    for layer in layers:
        if not 0 <= layer < model.anatomy.n_layers:
            raise InputError(f"layer {layer}: the model has layers 0 to {model.anatomy.n_layers - 1}")
    return list(dict.fromkeys(layers))


def parse_layers(text: str | None) -> list[int] | None:
    """ "3,4,5" -> [3, 4, 5]."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--layers {text}: expected numbers of blocks, such as 3,4,5") from None


def encode(model: Model, texts: list[str]) -> list[list[int]]:
    """Token rows with the special tokens that the tokenizer adds by itself, however long."""
    coded = model.tokenizer(texts, return_token_type_ids=False, return_attention_mask=False, verbose=False)
    rows: list[list[int]] = coded["input_ids"]
    return rows


Floor = Callable[[Cost, torch.dtype], float | None]  # seconds at a machine's rates; None: that rate is not known


def floor_seconds(model: Model, modules: Sequence[str], lengths: Sequence[int], floor: Floor) -> float | None:
    """Seconds below which nothing collects the moments of these maps over documents of these lengths, in tokens."""
    weight = next(model.hf.parameters())
    widths = linear_widths(model, modules).values()
    cost = statistics_cost(model_shape(model), reach_of(model, modules), widths, lengths, weight.element_size())
    forward = floor(cost.forward, weight.dtype)
    # on a CPU keys are multiplied in float32, on a GPU in their own dtype
    gram = floor(cost.gram, torch.float32 if weight.device.type == "cpu" else weight.dtype)
    return None if forward is None or gram is None else forward + gram


def best_rate(model: Model, modules: Sequence[str], length: int, floor: Floor) -> float | None:
    """Tokens a second that nothing collects faster than, over documents of `length` tokens."""
    lengths = [length] * max(1, BLOCK // length)
    least = floor_seconds(model, modules, lengths, floor)
    return least and sum(lengths) / least
