"""One record per compiled kernel and architecture, and what must not be found in it."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field

from .compile import Job, Texts
from .listing import (
    Access,
    LaunchBounds,
    Listing,
    Resources,
    parse_launch_bounds,
    parse_listing,
    parse_resources,
)
from .loops import MASK_BITS, WINDOW_BITS, Loop, find_loops

# Of every architecture here, by the CUDA programming guide's table of technical specifications.
REGISTERS_PER_SM = 65536
SM_PARTITIONS = 4  # each has a quarter of the registers and runs every fourth warp
MAX_REGISTERS = 255
THREADS_PER_SM = {"7.5": 1024, "8.0": 2048, "9.0": 2048, "10.0": 2048, "10.3": 2048}
THREADS_PER_SM_ELSEWHERE = 1536

WARP = 32


@dataclass(frozen=True)
class MainLoop:
    """The loop that moves the most data in 16-byte accesses, without the loops inside it.

    `bits` maps the width of an access to global memory to the number of such instructions.
    """

    address: int
    instructions: int
    loads: dict[int, int]
    stores: dict[int, int]
    nested: int
    kinds: dict[str, int] = field(default_factory=dict, compare=False)  # instructions by class
    # Windows read from shared memory, and moved there from global memory.
    shared_loads: int = field(default=0, compare=False)
    copied: int = field(default=0, compare=False)

    @property
    def windows(self) -> int:
        """Windows of 16 bytes loaded and stored by one pass."""
        accesses = Counter(self.loads) + Counter(self.stores)
        return sum(bits // WINDOW_BITS * count for bits, count in accesses.items())

    @property
    def instructions_per_window(self) -> float | None:
        return self.instructions / self.windows if self.windows else None

    @property
    def narrow(self) -> dict[int, int]:
        accesses = Counter(self.loads) + Counter(self.stores)
        return {bits: count for bits, count in accesses.items() if bits < WINDOW_BITS}


@dataclass(frozen=True)
class Kernel:
    name: str  # "transform_input_kernel<AlongS<__half, int, true>>"
    arch: str
    source: str
    bounds: LaunchBounds
    resources: Resources
    instructions: int  # with the helpers that it calls
    loads: dict[int, int]  # from global memory: width in bits -> instructions
    stores: dict[int, int]
    local_accesses: int
    generic_accesses: int
    bulk_copies: int
    main_loop: MainLoop | None
    loops: tuple[MainLoop, ...] = ()

    @property
    def template(self) -> str:
        return self.name.split("<")[0]

    @property
    def exact(self) -> bool:
        return is_exact(self.name)

    @property
    def fused(self) -> bool:
        """True if it adds a residual, takes a ReLU or filters by its mask."""
        return is_fused(self.name)

    @property
    def held_windows(self) -> int | None:
        """Windows that a thread of a team kernel holds in registers, all tensors together."""
        held = re.search(r">, Team\w+, (\d+)\b", self.name)
        return int(held.group(1)) if held else None

    @property
    def tensors(self) -> int:
        """Activations that a team kernel holds: x, or dy and x."""
        return 2 if "Backward" in self.name else 1

    @property
    def passing(self) -> int:
        """Activations that a team kernel moves beside these: the output, and fused the residual or
        its gradient, where there is one."""
        return 2 if self.fused else 1

    @property
    def register_limit(self) -> int:
        """What the launch bounds leave a thread, as the hardware allocates: in steps of 8."""
        threads = self.bounds.threads or 1024
        limit = REGISTERS_PER_SM // (threads * (self.bounds.blocks_per_sm or 1))
        return min(limit // 8 * 8, MAX_REGISTERS)

    @property
    def blocks_per_sm(self) -> int:
        """Blocks of the launch bounds' size that an SM holds by registers and threads.

        Shared memory is the launch's and not known here.
        """
        return resident_blocks(self.resources.registers, self.bounds.threads or 1024, self.arch)


def is_exact(name: str) -> bool:
    """True if the kernel's cursor walks over full windows only, so that nothing may be narrow."""
    return re.search(r"\bAlong(C|Row|Runs)<[^<>]*, true>|\bAlongS<", name) is not None


def is_fused(name: str) -> bool:
    """True if the kernel does what csrc/kernels/fused.cuh adds to batch norm."""
    return re.search(r"\bFused(Forward|Backward)<", name) is not None


def resident_blocks(registers: int, threads: int, arch: str) -> int:
    """By registers, which a warp gets in units of 256 within its SM partition, and by threads."""
    per_warp = -(-registers // 8) * 8 * WARP
    warps = REGISTERS_PER_SM // SM_PARTITIONS // per_warp * SM_PARTITIONS
    block_warps = -(-threads // (WARP * SM_PARTITIONS)) * SM_PARTITIONS
    by_threads = THREADS_PER_SM.get(arch, THREADS_PER_SM_ELSEWHERE) // threads
    return min(warps // block_warps, by_threads)


# ------------------------------------------------------------------------------- findings


def problems(kernel: Kernel) -> list[str]:
    """What breaks the rules: a stack, local memory, narrow accesses, registers past the bounds."""
    found = []
    r = kernel.resources
    if r.stack_bytes:
        found.append(f"has a stack frame of {r.stack_bytes} bytes")
    if kernel.local_accesses:
        found.append(f"makes {kernel.local_accesses} accesses to local memory")
    if kernel.bounds.threads is None:
        found.append("has no __launch_bounds__")
    if r.registers > kernel.register_limit:
        found.append(f"uses {r.registers} registers, the plan allows {kernel.register_limit}")
    if kernel.exact:
        found += _narrow_accesses(kernel)
    return found


def _narrow_accesses(kernel: Kernel) -> list[str]:
    loop = kernel.main_loop
    if loop is None or not loop.windows:
        return ["is exact, but no loop moves 16 bytes at a time"]
    if loop.nested and kernel.held_windows:
        return _missing_windows(kernel, loop, kernel.held_windows)
    narrow = loop.narrow
    # The mask has a byte for each window that is stored (forward), or of dy (backward): beside
    # each byte at least two windows move.
    if kernel.fused and 2 * narrow.get(MASK_BITS, 0) <= loop.windows:
        narrow.pop(MASK_BITS, None)
    return [
        f"makes {count} accesses of {bits} bits in its main loop"
        for bits, count in sorted(narrow.items())
    ]


def _missing_windows(kernel: Kernel, loop: MainLoop, held: int) -> list[str]:
    """A team's main loop is a round, which loads and stores what its threads hold, unrolled.

    It also reads parameters and saves statistics, one channel at a time, so that narrow accesses
    prove nothing; a window that is not moved as a whole does.
    """
    found = []
    for what, accesses, expected in (
        ("loads", loop.loads, held),
        ("stores", loop.stores, held // kernel.tensors),
    ):
        whole = sum(count for bits, count in accesses.items() if bits >= WINDOW_BITS)
        if whole < expected:
            found.append(f"{what} {whole} whole windows in its main loop instead of {expected}")
    return found


# ------------------------------------------------------------------------------- building records


def describe(job: Job, texts: Texts) -> list[Kernel]:
    """Every kernel of one compiled source, by name."""
    bounds = parse_launch_bounds(texts.ptx)
    listings = parse_listing(texts.sass)
    resources = parse_resources(texts.resources)
    if not (bounds.keys() == listings.keys() == resources.keys()):
        raise ValueError(f"{job.source.name}: PTX, resources and disassembly differ in kernels")
    names = demangle(sorted(resources))
    kernels = [
        _kernel(names[k], job, bounds[k], resources[k], listings[k]) for k in sorted(resources)
    ]
    return sorted(kernels, key=lambda kernel: kernel.name)


def _kernel(
    name: str, job: Job, bounds: LaunchBounds, resources: Resources, listing: Listing
) -> Kernel:
    code = [*listing.own, *listing.helpers]
    accesses = [i.access for i in code if i.access is not None]
    exact = is_exact(name)
    loops = [describe_loop(loop, exact) for loop in find_loops(listing.own)]
    return Kernel(
        name=name,
        arch=job.arch,
        source=job.source.name,
        bounds=bounds,
        resources=resources,
        instructions=len(code),
        loads=_widths(accesses, store=False),
        stores=_widths(accesses, store=True),
        local_accesses=sum(access.space == "local" for access in accesses),
        generic_accesses=sum(access.space == "generic" for access in accesses),
        bulk_copies=sum(access.space == "bulk" for access in accesses),
        main_loop=choose_main_loop(loops),
        loops=tuple(loops),
    )


def choose_main_loop(loops: list[MainLoop]) -> MainLoop | None:
    """Of loops that move as much, the shortest: it is the one without the tail's conditions."""
    moving = [loop for loop in loops if loop.loads or loop.stores]
    return max(moving, key=lambda loop: (loop.windows, -loop.instructions), default=None)


def describe_loop(loop: Loop, exact: bool = True) -> MainLoop:
    """Of kernels that are not exact the way that whole windows take: nearly all of them do, and of
    the others the walk is apart, or they are the first and last of a block."""
    own = loop.own if exact or not loop.whole else loop.whole
    accesses = [i.access for i in own if i.access is not None and not i.access.ordered]
    return MainLoop(
        loop.header,
        len(own),
        _widths(accesses, store=False),
        _widths(accesses, store=True),
        loop.nested,
        dict(Counter(i.kind for i in own)),
        sum(i.shared_window == "load" for i in own),
        # Before 8.0 through registers: a load from global, a store to shared memory.
        sum(i.mnemonic == "LDGSTS" or i.shared_window == "store" for i in own),
    )


def _widths(accesses: list[Access], *, store: bool) -> dict[int, int]:
    chosen = [a.bits for a in accesses if a.space == "global" and a.store == store]
    return dict(sorted(Counter(chosen).items(), reverse=True))


def demangle(mangled: list[str]) -> dict[str, str]:
    """Readable names: without return type, arguments and our own namespace."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    )
    return dict(zip(mangled, map(shorten, done.stdout.splitlines()), strict=True))


def shorten(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|batchnorm_cuda::", "", name)
    name = name.removeprefix("void ").replace("> >", ">>")
    depth = 0
    for i, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return name[:i]
    return name
