"""Parses what nvcc, cuobjdump and nvdisasm print about compiled kernels. Text in, records out."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# ------------------------------------------------------------------------------- PTX


@dataclass(frozen=True)
class LaunchBounds:
    """The arguments of __launch_bounds__ as they reached ptxas; None where they are not given."""

    threads: int | None
    blocks_per_sm: int | None


def parse_launch_bounds(ptx: str) -> dict[str, LaunchBounds]:
    """By mangled kernel name."""
    bounds = {}
    for entry in re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", ptx, re.DOTALL):
        threads = re.search(r"\.(?:max|req)ntid\s+([\d, ]+)", entry.group(3))
        blocks = re.search(r"\.minnctapersm\s+(\d+)", entry.group(3))
        total = 1
        for size in threads.group(1).split(",") if threads else ():
            total *= int(size)
        bounds[entry.group(1)] = LaunchBounds(
            total if threads else None, int(blocks.group(1)) if blocks else None
        )
    return bounds


# ------------------------------------------------------------------------------- cuobjdump


@dataclass(frozen=True)
class Resources:
    registers: int
    stack_bytes: int  # spilled registers are there, too
    static_shared_bytes: int  # 1 KB of it CUDA's own, from 8.0 on


def parse_resources(report: str) -> dict[str, Resources]:
    """What `cuobjdump -res-usage` prints of a cubin, by mangled kernel name."""
    found = {}
    for part in re.split(r"^ Function ", report, flags=re.MULTILINE)[1:]:
        used = dict(re.findall(r"\b([A-Z]+):(\d+)", part))
        if not {"REG", "STACK", "SHARED"} <= used.keys():
            raise ValueError(f"not a report of cuobjdump: {part[:200]!r}")
        values = (int(used[name]) for name in ("REG", "STACK", "SHARED"))
        found[part.split(":")[0]] = Resources(*values)
    return found


# ------------------------------------------------------------------------------- nvdisasm


@dataclass(frozen=True)
class Access:
    """One memory instruction."""

    space: str  # "global", "local", "generic" or "bulk"
    store: bool
    bits: int  # 0 for bulk copies, whose size is an operand
    ordered: bool  # an exchange between blocks (volatile, acquire, relaxed), not plain data


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with its modifiers: "LDG.E.128.CONSTANT"
    conditional: bool  # under a predicate: it may have no effect
    targets: tuple[int, ...] = ()  # addresses that it may branch to

    @property
    def mnemonic(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def kind(self) -> str:
        """The class of its work, one of KINDS."""
        if self.mnemonic == "HADD2" and "F32" in self.opcode:
            return "convert"  # half to float, as an addition of -0
        found = _KINDS.get(self.mnemonic)
        return found or ("float" if self.mnemonic[0] in "DH" else "integer")

    @property
    def shared_window(self) -> str | None:
        """ "load" or "store" of 16 bytes of shared memory."""
        if "128" not in self.opcode.split("."):
            return None
        return {"LDS": "load", "STS": "store"}.get(self.mnemonic)

    @property
    def access(self) -> Access | None:
        return parse_access(self.opcode)


KINDS = ("memory", "convert", "float", "integer", "control")
# By mnemonic; half2 and double arithmetic by its first letter, the rest is integer: addresses,
# selections, moves, and bfloat16's conversion to float, which is a shift.
_KINDS = {
    "memory": "LD LDG LDGSTS LDS LDC LDL LDCU ULDC ST STG STS STL ATOM ATOMS ATOMG RED SHFL UBLKCP",
    "convert": "F2F F2FP I2F I2FP F2I",
    "float": "FADD FADD2 FHADD FMUL FMUL2 FFMA FFMA2 FHFMA FSEL FSETP FMNMX FSET FCHK MUFU",
    "control": "BRA BRX BRXU JMP JMX CALL RET EXIT BSSY BSYNC BREAK WARPSYNC BAR DEPBAR LDGDEPBAR "
    "MEMBAR ERRBAR CGAERRBAR CCTL YIELD UCGABAR_ARV UCGABAR_WAIT ENDCOLLECTIVE VOTE VOTEU",
}
_KINDS = {mnemonic: kind for kind, names in _KINDS.items() for mnemonic in names.split()}

_SPACES = {"LDG": "global", "STG": "global", "LDGSTS": "global", "LDL": "local", "STL": "local"}
_SPACES |= {"LD": "generic", "ST": "generic", "UBLKCP": "bulk"}


def parse_access(opcode: str) -> Access | None:
    """The access that an opcode makes to global, local or unknown memory; None if it makes none."""
    mnemonic, *modifiers = opcode.split(".")
    space = _SPACES.get(mnemonic)
    if space is None:
        return None
    widths = {"8": 8, "U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    bits = next((widths[m] for m in modifiers if m in widths), 32)
    ordered = "STRONG" in modifiers or "MMIO" in modifiers
    return Access(space, mnemonic.startswith("ST"), 0 if space == "bulk" else bits, ordered)


@dataclass
class Listing:
    """The code of one kernel: its own, and that of the helpers it calls (64-bit division, say)."""

    own: list[Instruction] = field(default_factory=list)
    helpers: list[Instruction] = field(default_factory=list)


_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)(.*?);")
_LABEL = re.compile(r"(\.L\w+):")
_TYPE = re.compile(r"\s+\.type\s+([^,\s]+),@function")
# Instructions that jump to the label they name. BSSY and WARPSYNC name one too, but only as the
# place where the warp's lanes meet again; a CALL of a local label is a jump, of a helper it is not.
_JUMPS = {"BRA", "BRX", "BRXU", "JMP", "JMX", "CALL"}


def parse_listing(text: str) -> dict[str, Listing]:
    """`nvdisasm -c` output, by mangled kernel name."""
    listings = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]:
        name = re.match(r"[^,\s]+", section).group()
        listings[name] = _parse_section(name, section.splitlines())
    return listings


def _parse_section(name: str, lines: list[str]) -> Listing:
    labels: dict[str, int] = {}
    pending: list[str] = []
    raw: list[tuple[bool, re.Match[str]]] = []
    in_kernel = True
    for line in lines:
        if label := _LABEL.match(line):
            pending.append(label.group(1))
        elif function := _TYPE.match(line):
            in_kernel = function.group(1) == name
        elif instruction := _INSTRUCTION.match(line):
            labels |= dict.fromkeys(pending, int(instruction.group(1), 16))
            pending.clear()
            if instruction.group(3) != "NOP":
                raw.append((in_kernel, instruction))
    listing = Listing()
    for own, match in raw:
        (listing.own if own else listing.helpers).append(_instruction(match, labels))
    return listing


def _instruction(match: re.Match[str], labels: dict[str, int]) -> Instruction:
    address, guard, opcode, operands = match.groups()
    targets: tuple[int, ...] = ()
    conditional = guard is not None
    if opcode.split(".")[0] in _JUMPS:
        names = re.findall(r"\.L\w+", operands)
        targets = tuple(labels[label] for label in names if label in labels)
        # "BRA P1, `(.L_x_7)" and "BRA.U !UP0, ..." carry a second condition before the label.
        conditional |= re.match(r"\s*!?U?P\w", operands) is not None
    return Instruction(int(address, 16), opcode, conditional, targets)
