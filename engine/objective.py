"""What a value is optimised for: where its variable sits, and what its loss counts."""

from dataclasses import dataclass

BLOCK, MLP, ATTENTION = "block", "mlp", "attention"  # where a variable is added, and what a layer's update must move


@dataclass(frozen=True)
class Objective:
    """The part of a value's loss that belongs to the method and to the session; the numbers are hyper-parameters.

    site: where variables are added in the z-layer, at the subject's last token: (BLOCK,) to the block's output (MEMIT),
        (MLP,) to the MLP's output projection's (ROME), (MLP, ATTENTION) to both output projections' (PMET)
    nll_factor: PMET's weight of the likelihood, with its own rule to stop; None: 1, and no such rule
    neighbors: the facts' `edit_neighbors` are rows of the loss, that shall go on saying their own objects
    compat: a neighbour's row divides by the number of the new target's tokens, as published, instead of its own
    """

    site: tuple[str, ...] = (BLOCK,)
    nll_factor: float | None = None
    neighbors: bool = False
    compat: bool = False


MEMIT = Objective()
