"""Compile one Triton kernel ahead of time and read its resources from the cubin."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.aot.cases import Case

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Maximum shared memory per block in bytes, by compute capability × 10."""

MATRIX_INSTRUCTION = re.compile(r"\b(HGMMA|QGMMA|UTC[A-Z]*MMA|HMMA|QMMA)\b")
"""Matrix instructions: HGMMA and QGMMA on sm_90, UTC*MMA on sm_100, warp-level HMMA and QMMA elsewhere."""

LOGARITHM = ", -1059760811"
"""End of the instruction with which the library's logarithm starts: it extracts the exponent of its argument."""

NARROW_LOAD = re.compile(r"\bLDG\S*\.[US]16\b")

LOCAL = {"loads": re.compile(r"\bLDL\b"), "stores": re.compile(r"\bSTL\b")}


def compile_case(case: Case, target: int) -> Any:
    """Compile a case for one chip."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    place = {name: (i,) for i, name in enumerate(case.signature)}
    source = ASTSource(
        fn=case.load(),
        signature=case.signature,
        constexprs={place[name]: value for name, value in case.constants.items()},
        attrs={place[name]: [["tt.divisibility", 16]] for name in case.aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=case.options)


def instructions(sass: str) -> dict[str, Any]:
    """Count the spills (local-memory loads and stores) in a kernel's SASS, and its matrix instructions by name.

    The stack size and LOCAL of ``cuobjdump -res-usage`` do not reveal spills: a stack may only be alignment, and LOCAL
    stays 0 when registers are spilled. Loads without any store are not spills: on sm_100 ptxas emits one after
    asynchronous copies.
    """
    found = {name: len(pattern.findall(sass)) for name, pattern in LOCAL.items()}
    spills = found["stores"] + found["loads"] if found["stores"] else 0
    return {"spills": spills, "matrix_instructions": dict(Counter(MATRIX_INSTRUCTION.findall(sass)))}


def logarithms_of_approximate_quotients(ptx: str) -> int:
    """Count the logarithms of a quotient that PTX computes approximately.

    Such a quotient of equal numbers need not be 1, so the loss of equal networks would not be 0.
    """
    sources: dict[str, tuple[str, list[str]]] = {}  # register -> (instruction, registers that it reads)
    logarithms = []
    for name, operands in re.findall(r"^\s*(?:@%p\d+ )?([a-z0-9_.]+)\s+(%[^;]*);", ptx, re.MULTILINE):
        registers = re.findall(r"%[a-z]+\d+", operands)
        if registers:
            sources[registers[0]] = (name, registers[1:])
            if name.startswith("lg2") or operands.endswith(LOGARITHM):
                logarithms.append(registers[0])

    def approximate(register: str, depth: int) -> bool:
        name, read = sources.get(register, ("", []))
        if name.startswith(("div.full", "div.approx", "rcp.approx")):
            return True
        copies = name.startswith(("lg2", "mov", "mul", "selp", "add.s32"))
        return copies and depth > 0 and any(approximate(other, depth - 1) for other in read)

    return sum(approximate(register, 6) for register in logarithms)


def sums_in_tensor_cores(ttgir: str) -> int:
    """Count the matrix products in Triton's GPU dialect whose accumulator is carried by a loop.

    Tensor cores truncate sums, so the products of a loop's steps are added in fp32. On sm_100, whose products write to
    tensor memory, none is counted.
    """
    carried = {name for names in re.findall(r"iter_args\((.*?)\) ->", ttgir) for name in re.findall(r"(%\w+) =", names)}
    accumulators = re.findall(r"(?:tt\.dot|ttng\.warp_group_dot) %[\w#]+, %[\w#]+, (%[\w#]+)", ttgir)
    return sum(name in carried for name in accumulators)


def resources(cubin: bytes) -> dict[str, Any]:
    """Return the registers, stack, shared and local memory (bytes) and some counts of instructions of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "--dump-sass")
        )
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    if set(found) != {"REG", "STACK", "SHARED", "LOCAL"}:
        raise RuntimeError(f"cannot parse the output of cuobjdump -res-usage: {text!r}")
    used = {"registers": found["REG"], "stack": found["STACK"], "shared": found["SHARED"], "local": found["LOCAL"]}
    return used | instructions(sass) | {"loads_of_16_bits": len(NARROW_LOAD.findall(sass))}
