"""ROME, R-ROME, MEMIT, PMET, AlphaEdit and EMMET as published, written plainly, as `bench.serial` writes MEMIT: one
fact at a time, full forwards with hooks, torch's Adam, dense float64 solves; with neighbour-assisted values.

The oracle of the methods' tests. Every function here changes the model that it is given: the caller hands a copy.
Second moments are by the path of the module whose inputs they are of, and so are updates, dense [d_out, d_in] float64.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..engine.facts import Fact
from ..engine.hparams import Hparams
from ..engine.model import Model
from .serial import mixed, padded, read_module, serial_hidden, subject_last, template_keys

# the attention's output projection in a block
ATTENTION = {"gpt2": "attn.c_proj", "gptj": "attn.out_proj", "llama": "self_attn.o_proj", "gemma2": "self_attn.o_proj"}

Solve = Callable[[str, Tensor, Tensor], Tensor]  # (module, K [d_in, n], R [d_out, n]) -> Delta [d_out, d_in], float64


@dataclass(frozen=True)
class SerialTarget:
    """What each site shall give at the subject's last token of the plain prompt.

    first: site -> [d_model], what it gave; delta: site -> [d_model]; loss: the last one; updates: Adam steps made
    """

    first: dict[str, Tensor]
    delta: dict[str, Tensor]
    loss: float
    updates: int

    def at(self, site: str) -> Tensor:
        return self.first[site] + self.delta[site]


@dataclass(frozen=True)
class RankOne:
    """One fact's update of `module`: r uᵀ. u: [d_in], of length 1; r: [d_out]; both float64."""

    module: str
    u: Tensor
    r: Tensor


def attention_name(model: Model, layer: int) -> str:
    return f"{model.anatomy.blocks}.{layer}.{ATTENTION[model.anatomy.model_type]}"


def serial_target(
    model: Model,
    fact: Fact,
    contexts: Sequence[str],
    hparams: Hparams,
    sites: Sequence[str],
    *,
    nll_loss_factor: float | None = None,
    neighbors: bool = False,
    compat: bool = False,
) -> SerialTarget:
    """Targets of one fact: a variable is added to what each module of `sites` gives.

    nll_loss_factor: PMET's, with its rule of stopping; None: the likelihood counts once, and no such rule
    neighbors: a row for each of the fact's `edit_neighbors`, under the first context alone (without contexts: the plain
        template), whose own subject gets the same variables and whose labels are its own object
    compat: neighbours' rows divide by the number of the new target's tokens, not of their own
    """
    tokenizer, device = model.tokenizer, model.device
    new = tokenizer.encode(" " + fact.target_new, add_special_tokens=False)
    rows = [(context.replace("{}", fact.prompt), fact.subject, new) for context in ("{}", *contexts)]
    for neighbor in fact.edit_neighbors if neighbors else ():
        true = tokenizer.encode(" " + neighbor.target.strip(), add_special_tokens=False)
        rows.append(([*contexts, "{}"][0].replace("{}", neighbor.prompt), neighbor.subject, true))
    texts = [text.replace("{}", subject) + tokenizer.decode(target[:-1]) for text, subject, target in rows]
    ids, mask = padded(tokenizer, [*texts, f"{fact.subject} is a"], device)
    at = [subject_last(tokenizer, text, subject) for text, subject, _ in [*rows, ("{} is a", fact.subject, [])]]
    labels = torch.full_like(ids[: len(rows)], -100)
    for row, (_, _, target) in enumerate(rows):
        end = int(mask[row].sum())
        labels[row, end - len(target) : end] = torch.tensor(target, device=device)
    labelled = labels != -100
    counts = torch.full((len(rows),), len(new), device=device) if compat else labelled.sum(1)

    deltas = {site: torch.zeros(model.anatomy.d_model, device=device, requires_grad=True) for site in sites}
    first: dict[str, Tensor] = {}

    def adding(site: str) -> Callable[[nn.Module, Any, Any], Any]:
        def add(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            first.setdefault(site, hidden[0, at[0]].detach().clone())
            hidden = hidden.clone()
            for row, position in enumerate(at):
                hidden[row, position] = hidden[row, position] + deltas[site]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return add

    def row_means(logp: Tensor) -> Tensor:
        return (logp * labelled).sum(1) / counts

    handles = [model.hf.get_submodule(site).register_forward_hook(adding(site)) for site in sites]
    adam = torch.optim.Adam(list(deltas.values()), lr=hparams.v_lr)
    factor = 1.0 if nll_loss_factor is None else nll_loss_factor
    before: Tensor | None = None
    updates, loss_value = 0, float("nan")
    try:
        for step in range(hparams.v_num_grad_steps):
            adam.zero_grad()
            logits = model.hf(input_ids=ids, attention_mask=mask, use_cache=False).logits
            logp = logits[: len(rows)].log_softmax(-1)
            said = row_means(logp.gather(2, labels.clamp_min(0)[:, :, None])[:, :, 0])
            now = logits[-1, at[-1]].log_softmax(-1)
            before = now.detach().clone() if before is None else before
            kl = hparams.kl_factor * (now.exp() * (now - before)).sum()
            decay = sum(hparams.v_weight_decay * deltas[site].norm() / first[site].norm() ** 2 for site in sites)
            loss = factor * -said.mean() + kl + decay
            loss_value = float(loss.detach())
            if loss_value < 0.05:
                break
            if nll_loss_factor is not None:
                certain = torch.equal(said.exp().mean(), row_means(logp.max(-1).values).exp().mean())
                factor = 0.1 * nll_loss_factor if certain else nll_loss_factor  # of the next step
                if certain and float(kl.detach()) <= 0.01:
                    break
            if step == hparams.v_num_grad_steps - 1:
                break
            loss.backward()
            adam.step()
            updates += 1
            with torch.no_grad():
                for site, delta in deltas.items():
                    radius = hparams.clamp_norm_factor * first[site].norm()
                    if delta.norm() > radius:
                        delta.mul_(radius / delta.norm())
    finally:
        for handle in handles:
            handle.remove()
    return SerialTarget(first, {site: delta.detach() for site, delta in deltas.items()}, loss_value, updates)


def serial_rome(
    model: Model,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    hparams: Hparams,
    C: Tensor | None,
    *,
    averaged: bool = False,
    neighbors: bool = False,
    compat: bool = False,
) -> list[RankOne]:
    """ROME's sweep: one fact after the other, each written before the next is looked at.

    C: [d_in, d_in], or None for updates along the key itself; averaged: R-ROME
    """
    name = model.anatomy.layer_name(hparams.layers[-1])
    made = []
    for fact in facts:
        target = serial_target(model, fact, contexts, hparams, [name], neighbors=neighbors, compat=compat).at(name)
        keys = template_keys(model, model.hf.get_submodule(name), [fact], contexts)[0].double()
        given = _outputs(model, name, fact, contexts).double()
        mean = keys.mean(0)
        u = mean if C is None else torch.linalg.solve(C.double(), mean)
        u = u / u.norm()
        k, w = (mean, given.mean(0)) if averaged else (keys[0], given[0])
        r = (target.double() - w) / (k @ u)
        _write(model, name, torch.outer(r, u))
        made.append(RankOne(name, u, r))
    return made


def serial_memit(
    model: Model,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    hparams: Hparams,
    moments: Mapping[str, Tensor],
    *,
    history: dict[str, Tensor] | None = None,
    neighbors: bool = False,
    compat: bool = False,
) -> dict[str, Tensor]:
    """Delta = R Kᵀ (weight C + K Kᵀ)⁻¹.

    history: module -> the sum of K Kᵀ of earlier batches, which joins the system (MEMIT with history); grown here
    """

    def solve(name: str, K: Tensor, R: Tensor) -> Tensor:
        system = hparams.mom2_update_weight * moments[name].double() + K @ K.T
        if history is not None:
            system += history.get(name, 0)
            history[name] = history.get(name, 0) + K @ K.T
        return R @ torch.linalg.solve(system, K).T

    return _by_block(model, facts, contexts, hparams, solve, neighbors, compat)


def serial_alphaedit(
    model: Model,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    hparams: Hparams,
    moments: Mapping[str, Tensor],
    history: dict[str, Tensor],
    *,
    nullspace_threshold: float,
    L2: float,
    neighbors: bool = False,
    compat: bool = False,
) -> dict[str, Tensor]:
    """Delta = Xᵀ with (P (K Kᵀ + history) + L2 I) X = P K Rᵀ, a dense system without symmetry.

    history: module -> the sum of K Kᵀ of earlier batches, empty at first; grown here
    """

    def solve(name: str, K: Tensor, R: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(moments[name].double())
        null = vectors[:, values < nullspace_threshold]
        P = null @ null.T
        system = P @ (K @ K.T + history.get(name, 0)) + L2 * torch.eye(len(K), dtype=K.dtype, device=K.device)
        history[name] = history.get(name, 0) + K @ K.T
        return torch.linalg.solve(system, P @ K @ R.T).T

    return _by_block(model, facts, contexts, hparams, solve, neighbors, compat)


def serial_emmet(
    model: Model,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    hparams: Hparams,
    moments: Mapping[str, Tensor],
    *,
    emmet_lambda: float,
    update_norm_lambda: float = 0.0,
    neighbors: bool = False,
    compat: bool = False,
) -> dict[str, Tensor]:
    """Delta = R (Kᵀ S⁻¹ K + emmet_lambda I)⁻¹ Kᵀ S⁻¹ with S = weight C + update_norm_lambda I."""

    def solve(name: str, K: Tensor, R: Tensor) -> Tensor:
        S = hparams.mom2_update_weight * moments[name].double()
        S.diagonal().add_(update_norm_lambda)
        X = torch.linalg.solve(S, K)
        D = K.T @ X
        D.diagonal().add_(emmet_lambda)
        return R @ torch.linalg.solve(D, X.T)

    return _by_block(model, facts, contexts, hparams, solve, neighbors, compat)


def serial_pmet(
    model: Model,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    hparams: Hparams,
    moments: Mapping[str, Tensor],
    *,
    nll_loss_factor: float = 1.0,
    both: bool = False,
    neighbors: bool = False,
    compat: bool = False,
) -> dict[str, Tensor]:
    """MEMIT's system for the MLP's output projection, or for it and attention's (`both`); the residual's share is
    1 / sqrt(layers left). Both targets are found together even where the MLP alone is written, as published."""

    def modules(layer: int) -> list[str]:
        return [model.anatomy.layer_name(layer), attention_name(model, layer)]

    def solve(name: str, K: Tensor, R: Tensor) -> Tensor:
        return R @ torch.linalg.solve(hparams.mom2_update_weight * moments[name].double() + K @ K.T, K).T

    sites = modules(hparams.layers[-1])
    targets = [
        serial_target(
            model, fact, contexts, hparams, sites,
            nll_loss_factor=nll_loss_factor, neighbors=neighbors, compat=compat,
        )
        for fact in facts
    ]  # fmt: skip
    Z = [torch.stack([target.at(site) for target in targets]) for site in sites]
    updates: dict[str, Tensor] = {}
    for done, layer in enumerate(hparams.layers):
        changes = {}
        for name, site, z in list(zip(modules(layer), sites, Z, strict=True))[: 2 if both else 1]:
            now = torch.cat([_outputs(model, site, fact, ()) for fact in facts])
            R = (z - now).double().T / (len(hparams.layers) - done) ** 0.5
            changes[name] = solve(name, _keys(model, facts, contexts, name), R)
        for name, change in changes.items():  # both are of the weights below, neither of the other
            _write(model, name, change)
        updates |= changes
    return updates


def _by_block(
    model: Model,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    hparams: Hparams,
    solve: Solve,
    neighbors: bool,
    compat: bool,
) -> dict[str, Tensor]:
    """MEMIT's way: targets at the z-layer's block, shares of the residual 1 / layers left."""
    last = hparams.layers[-1]
    site = f"{model.anatomy.blocks}.{last}"
    found = [
        serial_target(model, fact, contexts, hparams, [site], neighbors=neighbors, compat=compat) for fact in facts
    ]
    Z = torch.stack([target.at(site) for target in found])
    updates = {}
    for done, layer in enumerate(hparams.layers):
        name = model.anatomy.layer_name(layer)
        R = (Z - serial_hidden(model, facts, last)).double().T / (len(hparams.layers) - done)
        updates[name] = solve(name, _keys(model, facts, contexts, name), R)
        _write(model, name, updates[name])
    return updates


def _keys(model: Model, facts: Sequence[Fact], contexts: Sequence[str], name: str) -> Tensor:
    return mixed(template_keys(model, model.hf.get_submodule(name), facts, contexts)).double().T


def _outputs(model: Model, name: str, fact: Fact, contexts: Sequence[str]) -> Tensor:
    """[1 + contexts, d_out]: what the module gives at the subject, under the plain template and each context."""
    filled = [context.replace("{}", fact.prompt) for context in ("{}", *contexts)]
    at = [subject_last(model.tokenizer, text, fact.subject) for text in filled]
    texts = [text.replace("{}", fact.subject) for text in filled]
    return read_module(model, model.hf.get_submodule(name), texts, at, entering=False)


@torch.no_grad()
def _write(model: Model, name: str, change: Tensor) -> None:
    module = model.hf.get_submodule(name)
    weight = module.weight
    assert isinstance(weight, Tensor)
    weight.add_((change.T if isinstance(module, Conv1D) else change).to(weight.dtype))
