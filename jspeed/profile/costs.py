"""What one instruction of a compiled module computes and moves: FLOPs and bytes of memory.

FLOPs are those of matrix products and convolutions, two per multiplication and addition; what is
elementwise costs memory traffic, not FLOPs. Bytes are those a kernel must read and write: its
operands and results, of a slice or an update only the part.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from jspeed.nn.attention_sparse import SCORES
from jspeed.profile.hlo import ArrayType, Computation, Instruction, Module

FREE = frozenset(
    {
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "opt-barrier",
        "optimization-barrier",
        "after-all",
        "partition-id",
        "replica-id",
        "iota",
    }
)
"""Opcodes that no kernel runs for, or none worth counting."""
_READS_A_PART = frozenset({"dynamic-slice", "slice", "gather"})
_KERNEL = "xla.gpu.triton"
"""Part of the target of a kernel that is written in Pallas."""
FULL_FLOAT32 = "float32 at HIGHEST"
"""How products in the whole of float32 are called where TF32 may stand for it."""
_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64"}
_HIGHEST = re.compile(r'operand_precision=?"?:?[\[{]"?(?:highest|HIGHEST)')
_SPARSE = re.compile(rf"{SCORES}_(\d+)[^\"]*block_sparse_attention_(forward|dq|dkv)\b")
_FUSED_ATTENTION = re.compile(r"__cudnn\$fmha\w*?(Backward)?(?:F8)?")
_LIST = re.compile(r"\d+")


@dataclass(frozen=True)
class Cost:
    """What an instruction costs once.

    Attributes:
      flops: of matrix products, by the dtype of their operands in JAX's spelling.
      bytes: read and written.
    """

    flops: Mapping[str, float] = field(default_factory=dict)
    bytes: int = 0


class Costs:
    """The costs of the instructions of one module."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self._fused: dict[str, dict[str, float]] = {}

    def of(self, computation: Computation, instruction: Instruction) -> Cost:
        """The cost of one execution of an instruction that runs as one kernel."""
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith("-done"):
            return Cost()
        if opcode in ("fusion", "fusion-start"):
            inner = self._callee(instruction)
            return Cost(self._inside(inner), self._fusion_bytes(computation, instruction, inner))
        if opcode == "custom-call":
            return Cost(
                _custom_call_flops(computation, instruction),
                _custom_call_bytes(computation, instruction),
            )
        flops = product_flops(computation, instruction)
        return Cost(flops, _plain_bytes(computation, instruction))

    def _callee(self, instruction: Instruction) -> Computation:
        return self.module.computations[(instruction.attribute("calls") or "").lstrip("%")]

    def _inside(self, computation: Computation) -> dict[str, float]:
        if computation.name not in self._fused:
            total: dict[str, float] = defaultdict(float)
            for inner in computation.instructions:
                found = (
                    self._inside(self._callee(inner))
                    if inner.opcode == "fusion"
                    else product_flops(computation, inner)
                )
                for dtype, flops in found.items():
                    total[dtype] += flops
            self._fused[computation.name] = dict(total)
        return self._fused[computation.name]

    def _fusion_bytes(
        self, outer: Computation, instruction: Instruction, inner: Computation
    ) -> int:
        users = _users(inner)
        read = 0
        for parameter in inner.instructions:
            if parameter.opcode == "parameter":
                operand = outer.by_name[instruction.operands[int(parameter.operands[0])]]
                read += _bytes_read(inner, parameter, users, _size(operand))
        return read + _bytes_written(inner, inner.root)


def product_flops(computation: Computation, instruction: Instruction) -> dict[str, float]:
    """FLOPs of a `dot` or `convolution`, `{}` of anything else."""
    if instruction.opcode == "dot":
        left = computation.by_name[instruction.operands[0]].arrays()[0]
        summed = _numbers(instruction.attribute("lhs_contracting_dims"))
        return _product(left, summed, instruction)
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    if instruction.opcode == "custom-call":
        return _custom_call_flops(computation, instruction)
    return {}


def _product(left: ArrayType, summed: list[int], instruction: Instruction) -> dict[str, float]:
    inner = math.prod(left.shape[dim] for dim in summed)
    dtype = _DTYPES.get(left.dtype, left.dtype)
    if dtype == "float32" and _HIGHEST.search(instruction.attributes):
        dtype = FULL_FLOAT32
    return {dtype: 2.0 * instruction.arrays()[0].elements * inner}


def _custom_call_flops(computation: Computation, instruction: Instruction) -> dict[str, float]:
    """FLOPs of a product that XLA hands to a library, or of a kernel of block-sparse attention."""
    if not is_library_product(instruction):
        fused = _fused_attention_flops(computation, instruction)
        return fused or _sparse_attention_flops(instruction)
    left = computation.by_name[instruction.operands[0]].arrays()[0]
    config = re.search(r'"dot_dimension_numbers":(\{.*?\})', instruction.attributes)
    if config is None:
        return {}
    numbers = json.loads(config.group(1))
    return _product(left, [int(dim) for dim in numbers["lhs_contracting_dimensions"]], instruction)


def _fused_attention_flops(computation: Computation, instruction: Instruction) -> dict[str, float]:
    """FLOPs of cuDNN's attention for all pairs of a query and a key, those behind a mask included:
    two products forward, five backward. Queries and keys are `[batch, tokens, heads, features]`."""
    target = (instruction.attribute("custom_call_target") or "").strip('"')
    found = _FUSED_ATTENTION.fullmatch(target)
    if found is None:
        return {}
    query, key = (computation.by_name[name].arrays()[0] for name in instruction.operands[:2])
    products = 5 if found.group(1) else 2
    flops = 2.0 * products * query.elements * key.shape[1]
    return {_DTYPES.get(query.dtype, query.dtype): flops}


def is_library_product(instruction: Instruction) -> bool:
    """Whether a custom call is a product that XLA hands to a library."""
    target = (instruction.attribute("custom_call_target") or "").strip('"')
    return target.startswith(("__cublas", "__onednn$matmul"))


def _sparse_attention_flops(instruction: Instruction) -> dict[str, float]:
    """Two per score and feature of each product: scores and output forward; backward scores again,
    the weights' gradient and the query's, or the key's and the value's."""
    found = _SPARSE.search(instruction.attributes)
    if found is None:
        return {}
    result = instruction.arrays()[0]
    products = {"forward": 2, "dq": 3, "dkv": 4}[found.group(2)]
    flops = 2.0 * products * int(found.group(1)) * result.shape[-1]
    return {_DTYPES.get(result.dtype, result.dtype): flops}


def _convolution_flops(computation: Computation, instruction: Instruction) -> dict[str, float]:
    """Two per element of the result, kernel element and input channel of one output channel."""
    kernel = computation.by_name[instruction.operands[1]].arrays()[0]
    labels = (instruction.attribute("dim_labels") or "").partition("_")[2].partition("->")[0]
    if len(labels) != len(kernel.shape):
        return {}
    outputs = kernel.shape[labels.index("o")]
    result = instruction.arrays()[0]
    dtype = _DTYPES.get(kernel.dtype, kernel.dtype)
    return {dtype: 2.0 * result.elements * kernel.elements / outputs}


def _custom_call_bytes(computation: Computation, instruction: Instruction) -> int:
    """Operands and results; of a library's call the first result, the others are its workspace."""
    read = sum(_size(computation.by_name[name]) for name in instruction.operands)
    arrays = instruction.arrays()
    if _KERNEL not in (instruction.attribute("custom_call_target") or ""):
        arrays = arrays[:1]
    return read + sum(array.bytes for array in arrays)


def _plain_bytes(computation: Computation, instruction: Instruction) -> int:
    written = sum(array.bytes for array in instruction.arrays())
    if instruction.opcode in _READS_A_PART:
        return 2 * written
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _size(computation.by_name[instruction.operands[1]])
    if instruction.opcode == "broadcast":
        return written
    return written + sum(_size(computation.by_name[name]) for name in instruction.operands)


def _users(computation: Computation) -> dict[str, list[Instruction]]:
    users: dict[str, list[Instruction]] = defaultdict(list)
    for instruction in computation.instructions:
        if instruction.opcode not in ("parameter", "constant"):
            for name in instruction.operands:
                users[name].append(instruction)
    return users


def _bytes_read(
    computation: Computation,
    value: Instruction,
    users: Mapping[str, list[Instruction]],
    whole: int,
) -> int:
    """What a fusion reads of a parameter: all of it, unless every use takes a part."""
    read = 0
    for user in users[value.name]:
        position = user.operands.index(value.name)
        if user.opcode in _READS_A_PART and position == 0:
            read += _size(user)
        elif user.opcode == "dynamic-update-slice" and position == 0:
            continue  # written in place
        elif user.opcode == "bitcast":
            read += _bytes_read(computation, user, users, whole)
        else:
            return whole
    return min(read, whole)


def _bytes_written(computation: Computation, value: Instruction) -> int:
    if value.opcode == "tuple":
        return sum(_bytes_written(computation, computation.by_name[n]) for n in value.operands)
    if value.opcode == "bitcast":
        return _bytes_written(computation, computation.by_name[value.operands[0]])
    if value.opcode == "dynamic-update-slice":
        return _size(computation.by_name[value.operands[1]])
    return _size(value)


def _size(instruction: Instruction) -> int:
    return sum(array.bytes for array in instruction.arrays())


def _numbers(text: str | None) -> list[int]:
    return [int(number) for number in _LIST.findall(text or "")]
