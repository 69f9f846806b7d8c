"""Compile every Triton kernel for GPUs that need not be here: run as a program, with TRITON_INTERPRET=0.

It prints a JSON object: for each kernel, variant and architecture its instructions that load and store global
memory, without their modifiers of caching.
"""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loracle.torch_impl import merge_kernel, prove_kernel, softmax_kernel

FLOATS = {"fp32": 0, "bf16": 1, "fp16": 2}
ALIGNED = [["tt.divisibility", 16]]


def source(kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> ASTSource:
    """A kernel with pointers of these types, constants, and integers of 32 bits for all else.

    All are multiples of 16, as are the addresses of torch's tensors and the usual sizes of a model's.
    """
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = {(at,): ALIGNED for at, name in enumerate(names) if name not in constants}
    return ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)


def variants() -> Iterator[tuple[str, ASTSource, int]]:
    """Name, source and number of warps of each kernel, as its module launches it."""
    for name, kind in FLOATS.items():
        for write in (True, False):
            pointers = {"z": f"*{name}", "targets": "*i64", "fraction": "*fp32", "losses": "*fp32"}
            constants: dict[str, Any] = {"WRITE": write, "BLOCK": softmax_kernel.BLOCK}
            yield (
                f"softmax {name} {'write' if write else 'read'}",
                source(softmax_kernel._softmax_errors, pointers, constants),
                16,
            )
        stored = "*i16" if name == "bf16" else f"*{name}"
        for wide in (True, False) if name == "bf16" else (True,):
            for whole in (True, False):
                yield f"merge {name} wide={wide} whole={whole}", merge_source(stored, kind, wide, whole), 4
        factors = ("A", "B", "row_norms", "column_norms", "error")
        pointers = dict.fromkeys(factors, "*fp64") | {"W0": stored, "merged": stored}
        pointers |= {"found": "*i64", "left": "*i1"}
        yield f"prove {name}", source(prove_kernel._prove, pointers, {"KIND": kind, "BLOCK": 128}), 4


def merge_source(stored: str, kind: int, wide: bool, whole: bool) -> ASTSource:
    """The merge's kernel at r = 16."""
    factors = ("A", "Bt", "row_norms", "slopes", "offsets", "error")
    pointers = dict.fromkeys(factors, "*fp64" if wide else "*fp32")
    pointers |= {"W0": stored, "merged": stored, "marks": "*u8"}
    rows, columns = merge_kernel.block_of(wide)
    constants = {"R": 16, "STEP": 16, "KIND": kind, "WIDE": wide, "WHOLE": whole}
    constants |= {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns}
    # Triton takes a stride of 1 for a constant by itself.
    constants |= {"W0_column": 1, "merged_column": 1}
    return source(merge_kernel._merge, pointers, constants)


def main() -> None:
    found = {}
    for architecture in (80, 90):
        target = GPUTarget("cuda", architecture, 32)
        for name, kernel, warps in variants():
            compiled = triton.compile(
                kernel, target=target, options={"num_warps": warps, "enable_fp_fusion": True}
            )
            assert compiled.asm["cubin"]
            found[f"{name} sm_{architecture}"] = sorted(
                set(re.findall(r"(?:ld|st)\.global(?:\.v\d)?\.[a-z]\d+", compiled.asm["ptx"]))
            )
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
