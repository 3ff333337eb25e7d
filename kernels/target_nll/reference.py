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
) -> tuple[Tensor, Tensor]:
    """(nll, KL) of each fact, differentiable; the arguments are those of the public function, floats of one dtype."""

    def log_probabilities(rows: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(rows, head, bias)
        return (logits if softcap is None else softcap * torch.tanh(logits / softcap)).log_softmax(-1)

    m = len(labels)
    now = log_probabilities(hidden[m:])
    then = log_probabilities(hidden[m:].detach() if first is None else first)
    of_label = -log_probabilities(hidden[:m]).gather(1, labels[:, None])[:, 0]
    of_kl = (now.exp() * (now - then)).sum(-1)
    zero = of_label.new_zeros(facts)
    return zero.index_add(0, fact[:m], weight[:m] * of_label), zero.index_add(0, fact[m:], weight[m:] * of_kl)
