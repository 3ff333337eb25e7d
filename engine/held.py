"""What a session knows of the unedited model: second moments of its keys, and what is made of them for solves."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..kernels.errors import InputError
from ..kernels.spd_solve import Factor, NullSpace
from ..stats import Corpus, Moment, cache_root, read_corpus
from ..stats.collect import Budget
from ..stats.derived import Derived
from ..stats.memory import free_bytes
from ..stats.projections import Projections, basis_of
from ..stats.ranks import ALONE, Ranks
from .hparams import Hparams
from .model import DEMO, Model, demo_file
from .phases import Phases
from .statistics import second_moments

log = logging.getLogger("rewire")

Made = TypeVar("Made", Factor, NullSpace)
KEEP = 4  # float64 copies of C that must be free for one more to be kept


class Held:
    """Second moments by the name of the projection, once they were asked for.

    stats: a folder of them; None: the cache, else collected over `corpus` (None: the demo's text)
    projections: AlphaEdit's, published: then no second moment is read
    said: name -> where each came from, for the report
    """

    def __init__(
        self,
        model: Model,
        hparams: Hparams,
        stats: str | Path | None,
        corpus: Corpus | str | Path | None,
        projections: Projections | None,
        ranks: Ranks,
    ) -> None:
        self.model, self.hparams, self.ranks = model, hparams, ranks
        self.fingerprint = model.fingerprint
        self.said: dict[str, dict[str, Any]] = {}
        self.moments: dict[str, Tensor] = {}
        self._stats, self._corpus, self._projections = stats, corpus, projections
        self._digests: dict[str, str] = {}
        self._derived = Derived(cache_root() / "stats" / "derived")
        self._kept: dict[tuple[str, str], Any] = {}

    def second_moments(self, names: Sequence[str], phases: Phases, edited: bool) -> dict[str, Tensor]:
        """C of each, [d_in, d_in] float32; edited: the weights are no longer those that they are of."""
        missing = [name for name in names if name not in self.moments]
        if self._projections is not None:  # C itself does not enter
            self.said = {"projections": {"source": str(self._projections.path)}}
            return {}
        if missing:
            with phases("statistics") as tick:
                corpus = None if self._stats else self._read_corpus()
                if self._corpus is None and corpus is not None and self.model.name != DEMO:
                    log.warning("no corpus named: second moments come from the demo's small text (see --corpus)")
                if edited and self._stats is None:
                    raise InputError("statistics are those of the unedited model: it was edited before they were there")
                wanted = self.hparams
                tokens = wanted.mom2_tokens or 20 * self.model.anatomy.d_in
                found: dict[str, Moment] = {}
                for ranks in (self.ranks, ALONE):  # what was collected together is the first's; others read it then
                    lacking = [name for name in missing if name not in found]
                    if not lacking:
                        break
                    found |= second_moments(
                        self.model,
                        lacking,
                        corpus,
                        Budget(wanted.mom2_max_length, wanted.mom2_n_samples, tokens),
                        seed=wanted.mom2_seed,
                        stats=self._stats,
                        fingerprint=self.fingerprint,
                        ranks=ranks,
                        progress=tick,
                    )
            for name in list(found):
                moment = found.pop(name)  # its triangle goes as the next mean comes
                self.moments[name] = moment.mean
                self._digests[name] = moment.digest
                over = None if corpus is None else f"{corpus.name}-{corpus.digest}"
                self.said[name] = {"source": moment.source, "tokens": moment.count, "corpus": over}
        return {name: self.moments[name] for name in names}

    def _read_corpus(self) -> Corpus:
        named = self._corpus or demo_file("corpus.txt")
        return named if isinstance(named, Corpus) else read_corpus(named)

    def factor(self, name: str) -> Factor:
        """The `regular_factor` of a C, on its layer's device."""
        C, digest = self.moments[name], self._digests[name]
        return self._keep(name, "factor", lambda device: self._derived.factor(digest, C, device, name))

    def space(self, name: str, threshold: float) -> NullSpace:
        """The null space of a C, or what was published for it, on its layer's device."""
        published = self._projections
        if published is not None:
            layer = next(layer for layer in published.layers if self.model.anatomy.layer_name(layer) == name)
            return self._keep(name, "published", lambda device: basis_of(published[layer]).to(device))
        C, digest = self.moments[name], self._digests[name]
        return self._keep(
            name, f"null space {threshold}", lambda device: self._derived.null_space(digest, C, device, threshold)
        )

    def _keep(self, name: str, what: str, make: Callable[[torch.device], Made]) -> Made:
        """What is made of a C, on its layer's device; kept there or on the CPU while memory is plentiful."""
        weight = self.model.hf.get_parameter(f"{name}.weight")
        if (name, what) in self._kept:
            kept: Made = self._kept[name, what]
            return kept.to(weight.device)
        made = make(weight.device)
        for place in dict.fromkeys((weight.device, torch.device("cpu"))):
            if free_bytes(place) > KEEP * 8 * self.model.anatomy.d_in**2:
                self._kept[name, what] = made.to(place)
                break
        return made
