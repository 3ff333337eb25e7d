"""One way in which a kernel is launched, as data: what gate B compiles without a GPU, and what it must find."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A kernel with its types, constants and launch options.

    name: unique among all kernels: "gram-bf16-128x256x64-w8-s3"
    kernel: the jitted function
    types: argument -> its type as Triton spells it ("*bf16", "fp32", "i64", "tensordesc<bf16[64, 128]>"); others "i32"
    constants: constexpr -> its value
    aligned: arguments that are multiples of 16 (pointers: bytes): without it no load is vectorised
    tensor_cores: products must use them
    pipelined: loads must be asynchronous 16-byte copies (or descriptors')
    default: launched where nothing was tuned: must fit the shared memory of consumer cards
    chips: compute capabilities, 80 and 90, that it is meant for
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = False
    pipelined: bool = False
    default: bool = True
    chips: tuple[int, ...] = (80, 90)

    def __str__(self) -> str:
        return self.name
