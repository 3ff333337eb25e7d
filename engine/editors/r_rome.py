"""R-ROME (Gupta et al. 2024, arXiv 2403.07175): ROME with one key throughout.

r = (v - W k) / (k . u) with the mean key k above and below. ROME's quotient of two keys, the mean one and the plain
prompt's, grows without bound where they differ, and a single edit then breaks the model.
"""

from functools import partial

from ..objective import MLP
from . import rome
from .registry import Method

METHOD = Method(
    "r-rome",
    rome.RomeHparams,
    rome.check,
    partial(rome.edit, averaged=True),
    partial(rome.alone, averaged=True),
    site=(MLP,),
)
