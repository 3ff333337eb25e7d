"""MEMIT as published, written plainly: one fact at a time, full forwards, dense float64 solves.

The oracle of the tests and the baseline of the benchmarks. It shares nothing with the fast way but the model, the
facts and the hyper-parameters: prompts are tokenised, positions counted and rows padded here again, by the published
rules (right for tokenizers that keep a leading space inside a token, such as GPT-2's and Llama 3's).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..engine.facts import Fact
from ..engine.hparams import Hparams
from ..engine.model import Model

KEY_BATCH = 128


@dataclass(frozen=True)
class SerialValue:
    """z: [d_model] float32; h0: [d_model]; loss: the last one; updates: Adam steps made; tokens: padded row length."""

    z: Tensor
    h0: Tensor
    loss: float
    updates: int
    tokens: int


def serial_value(model: Model, fact: Fact, contexts: Sequence[str], hparams: Hparams) -> SerialValue:
    """The target value of one fact."""
    tokenizer, anatomy, device = model.tokenizer, model.anatomy, model.device
    target = tokenizer.encode(" " + fact.target_new, add_special_tokens=False)
    templates = [context.replace("{}", fact.prompt) for context in ("{}", *contexts)]
    texts = [template + tokenizer.decode(target[:-1]) for template in templates]
    kl_template = "{} is a"
    ids, mask = padded(tokenizer, [text.replace("{}", fact.subject) for text in [*texts, kl_template]], device)
    at = [subject_last(tokenizer, template, fact.subject) for template in [*templates, kl_template]]
    labels = torch.full_like(ids[: len(texts)], -100)
    for row in range(len(texts)):
        end = int(mask[row].sum())
        labels[row, end - len(target) : end] = torch.tensor(target, device=device)

    delta = torch.zeros(anatomy.d_model, device=device, requires_grad=True)
    kept: dict[str, Tensor] = {}

    def add_delta(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        kept.setdefault("h0", hidden[0, at[0]].detach().clone())
        hidden = hidden.clone()
        for row, position in enumerate(at):
            hidden[row, position] = hidden[row, position] + delta
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def keep_last(module: nn.Module, args: Any, output: Any) -> None:
        kept["last"] = output[0] if isinstance(output, tuple) else output

    norm = model.hf.get_submodule(anatomy.norm)
    handles = [
        model.block(hparams.layers[-1]).register_forward_hook(add_delta),
        model.block(anatomy.n_layers - 1).register_forward_hook(keep_last),
    ]
    adam = torch.optim.Adam([delta], lr=hparams.v_lr)
    first: Tensor | None = None
    updates, loss_value = 0, float("nan")
    try:
        for step in range(hparams.v_num_grad_steps):
            adam.zero_grad()
            logits = model.hf(input_ids=ids, attention_mask=mask, use_cache=False).logits
            logp = model.logits(norm(kept["last"][: len(texts)])).log_softmax(-1)
            chosen = logp.gather(2, labels.clamp_min(0)[:, :, None])[:, :, 0]
            nll = (-(chosen * (labels != -100)).sum(1) / len(target)).mean()
            now = logits[-1, at[-1]].log_softmax(-1)
            first = now.detach().clone() if first is None else first
            kl = hparams.kl_factor * (now.exp() * (now - first)).sum()
            decay = hparams.v_weight_decay * delta.norm() / kept["h0"].norm() ** 2
            loss = nll + kl + decay
            loss_value = float(loss.detach())
            if loss_value < 0.05 or step == hparams.v_num_grad_steps - 1:
                break
            loss.backward()
            adam.step()
            updates += 1
            with torch.no_grad():
                radius = hparams.clamp_norm_factor * kept["h0"].norm()
                if delta.norm() > radius:
                    delta.mul_(radius / delta.norm())
    finally:
        for handle in handles:
            handle.remove()
    return SerialValue(kept["h0"] + delta.detach(), kept["h0"], loss_value, updates, ids.shape[1])


@torch.no_grad()
def serial_keys(model: Model, facts: Sequence[Fact], contexts: Sequence[str], layer: int) -> Tensor:
    """[n, d_in]: keys by full forwards in batches of 128 prompts; half plain, half the mean of the contexts."""
    return mixed(template_keys(model, model.projection(layer), facts, contexts))


def template_keys(model: Model, module: nn.Module, facts: Sequence[Fact], contexts: Sequence[str]) -> Tensor:
    """[n, 1 + contexts, d_in]: what enters `module` at the subject under the plain template and each context."""
    templates = ["{}", *contexts]
    texts, at = [], []
    for fact in facts:
        for template in templates:
            filled = template.replace("{}", fact.prompt)
            texts.append(filled.replace("{}", fact.subject))
            at.append(subject_last(model.tokenizer, filled, fact.subject))
    return read_module(model, module, texts, at, entering=True).view(len(facts), len(templates), -1)


def mixed(keys: Tensor) -> Tensor:
    """[n, 1 + contexts, d_in] -> [n, d_in]: half the plain key, half the mean of the contexts'."""
    return (keys[:, 0] + keys[:, 1:].mean(1)) / 2 if keys.shape[1] > 1 else keys[:, 0]


@torch.no_grad()
def serial_hidden(model: Model, facts: Sequence[Fact], layer: int) -> Tensor:
    """[n, d_model]: the block's output at the subject on the plain prompt."""
    at = [subject_last(model.tokenizer, fact.prompt, fact.subject) for fact in facts]
    return read_module(model, model.block(layer), [fact.question for fact in facts], at, entering=False)


@torch.no_grad()
def serial_spread(
    model: Model,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    hparams: Hparams,
    Z: Tensor,
    moments: dict[int, Tensor],
) -> dict[str, Tensor]:
    """Weight name -> its dense update [d_out, d_in] in float64; the model is left as it was.

    moments: layer -> C. Each layer is solved by LU in float64 with the lower layers updated.
    """
    updates: dict[str, Tensor] = {}
    originals: dict[str, Tensor] = {}
    try:
        for done, layer in enumerate(hparams.layers):
            K = serial_keys(model, facts, contexts, layer).double().T
            R = (Z - serial_hidden(model, facts, hparams.layers[-1])).double().T
            A = torch.linalg.solve(hparams.mom2_update_weight * moments[layer].double() + K @ K.T, K)
            change = (R / (len(hparams.layers) - done)) @ A.T
            projection = model.projection(layer)
            weight = projection.weight
            assert isinstance(weight, Tensor)
            name = model.anatomy.weight_name(layer)
            originals[name] = weight.detach().clone()
            weight.copy_(originals[name] + (change.T if isinstance(projection, Conv1D) else change).float())
            updates[name] = change
    finally:
        for name, original in originals.items():
            model.hf.get_submodule(name.removesuffix(".weight")).weight.copy_(original)  # type: ignore[operator]
    return updates


def padded(tokenizer: Any, texts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """(token ids, attention mask), both [texts, longest], padded on the right."""
    coded = [tokenizer.encode(text) for text in texts]
    longest = max(len(ids) for ids in coded)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in coded], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in coded], device=device)
    return ids, mask


def subject_last(tokenizer: Any, template: str, subject: str) -> int:
    """Index of the subject's last token where it stands for the `{}` of the template."""
    return len(tokenizer.encode(template.split("{}")[0] + subject)) - 1


@torch.no_grad()
def read_module(model: Model, module: nn.Module, texts: Sequence[str], at: Sequence[int], entering: bool) -> Tensor:
    """[texts, width] float32: what enters `module`, or what it gives, at one position of each text."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        tensor = args[0] if entering else output
        found.append(tensor[0] if isinstance(tensor, tuple) else tensor)

    handle = module.register_forward_hook(keep)
    read = []
    try:
        for start in range(0, len(texts), KEY_BATCH):
            ids, mask = padded(model.tokenizer, texts[start : start + KEY_BATCH], model.device)
            model.hf(input_ids=ids, attention_mask=mask, use_cache=False)
            hidden = found.pop()
            read += [hidden[row, position] for row, position in enumerate(at[start : start + KEY_BATCH])]
    finally:
        handle.remove()
    return torch.stack(read).float()
