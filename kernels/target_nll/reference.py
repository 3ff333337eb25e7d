"""The specification of the loss of values: obvious torch, in whatever dtype it is given."""

import torch
from torch import Tensor


def target_nll(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    fact: Tensor,
    weight: Tensor,
    facts: int,
    first: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(nll, KL, missed) of each fact, two of them differentiable; arguments as of the public function, of one dtype."""

    def logits(rows: Tensor) -> Tensor:
        found = torch.nn.functional.linear(rows, head, bias)
        return found if softcap is None else softcap * torch.tanh(found / softcap)

    m = len(labels)
    now = logits(hidden[m:]).log_softmax(-1)
    then = logits(hidden[m:].detach() if first is None else first).log_softmax(-1)
    of_labels = logits(hidden[:m])
    picked = of_labels.gather(1, labels[:, None])[:, 0]
    of_label = -of_labels.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    missed = ((picked != of_labels.amax(1)) | of_label.isnan()).to(of_label.dtype)
    of_kl = (now.exp() * (now - then)).sum(-1)
    zero = of_label.new_zeros(facts)
    return (
        zero.index_add(0, fact[:m], weight[:m] * of_label),
        zero.index_add(0, fact[m:], weight[m:] * of_kl),
        zero.index_add(0, fact[:m], missed),
    )
