"""Finds the loops of a kernel: natural loops of its control flow graph.

Ranges of backward branches would not do: the compiler moves rare paths behind the code that they
belong to, and the jump back from there is no loop.
"""

from __future__ import annotations

from dataclasses import dataclass

from .listing import Access, Instruction

WINDOW_BITS = 128
MASK_BITS = 8  # of the mask of a fused ReLU, for a window; no activation is as narrow
_ENDS = {"EXIT", "RET", "BRA", "BRX", "BRXU", "JMP", "JMX", "KILL", "BPT"}


@dataclass(frozen=True)
class Loop:
    """`own` are its instructions without those of the loops inside it."""

    header: int  # address of its first instruction
    own: tuple[Instruction, ...]
    nested: int  # loops inside it
    # Of an innermost loop, what a pass runs through that moves the most windows, no single lanes.
    whole: tuple[Instruction, ...] = ()


def find_loops(code: list[Instruction]) -> list[Loop]:
    """All loops, by address of their header."""
    blocks = _basic_blocks(code)
    successors = _successors(blocks)
    bodies = _natural_loops(successors)
    loops = []
    for header, body in bodies.items():
        inner = [other for head, other in bodies.items() if head != header and head in body]
        own = sorted(body.difference(*inner))
        instructions = tuple(i for block in own for i in blocks[block])
        path = [] if inner else _whole_path(header, set(own), blocks, successors)
        whole = tuple(i for block in path for i in blocks[block])
        loops.append(Loop(blocks[header][0].address, instructions, len(inner), whole))
    return sorted(loops, key=lambda loop: loop.header)


def _whole_path(
    header: int,
    own: set[int],
    blocks: list[list[Instruction]],
    successors: list[list[int]],
) -> list[int]:
    """Of the ways from the header back to it that move no lanes one at a time: of those that move
    the most windows, the longest: a shorter one leaves out the work on absent windows. Empty: there
    is none."""
    best: dict[int, tuple[int, int, int] | None] = {}  # windows, instructions, next block

    def explore(block: int) -> tuple[int, int, int] | None:
        if block in best:
            return best[block]
        best[block] = None  # a way back to here without the header: a loop of several entries
        code = blocks[block]
        if any(MASK_BITS < a.bits < WINDOW_BITS for a in _moves(code)):
            return None
        ahead = []
        for following in successors[block]:
            if following == header:
                ahead.append((0, 0, header))
            elif following in own and (rest := explore(following)) is not None:
                ahead.append((rest[0], rest[1], following))
        if ahead:
            windows, length, following = max(ahead)
            best[block] = (windows + _windows(code), length + len(code), following)
        return best[block]

    if explore(header) is None:
        return []
    path = [header]
    while (following := best[path[-1]][2]) != header:
        path.append(following)
    return path


def _windows(code: list[Instruction]) -> int:
    in_shared = sum(i.shared_window is not None for i in code)
    return in_shared + sum(access.bits // WINDOW_BITS for access in _moves(code))


def _moves(code: list[Instruction]) -> list[Access]:
    """Accesses to data in global memory."""
    accesses = (i.access for i in code if i.access is not None)
    return [a for a in accesses if a.space == "global" and not a.ordered]


def _falls_through(last: Instruction) -> bool:
    if last.mnemonic == "CALL":
        return last.conditional or not last.targets
    return last.conditional or last.mnemonic not in _ENDS


def _basic_blocks(code: list[Instruction]) -> list[list[Instruction]]:
    targets = {target for instruction in code for target in instruction.targets}
    blocks: list[list[Instruction]] = []
    start_next = True
    for instruction in code:
        if start_next or instruction.address in targets:
            blocks.append([])
        blocks[-1].append(instruction)
        start_next = bool(instruction.targets) or instruction.mnemonic in _ENDS
    return blocks


def _successors(blocks: list[list[Instruction]]) -> list[list[int]]:
    index = {block[0].address: i for i, block in enumerate(blocks)}
    result = []
    for i, block in enumerate(blocks):
        last = block[-1]
        following = [index[target] for target in last.targets if target in index]
        if _falls_through(last) and i + 1 < len(blocks):
            following.append(i + 1)
        result.append(following)
    return result


def _natural_loops(successors: list[list[int]]) -> dict[int, set[int]]:
    """Blocks of each loop by its header block; loops that share a header are one."""
    order = _reverse_postorder(successors)
    predecessors: list[list[int]] = [[] for _ in successors]
    for block in order:
        for following in successors[block]:
            predecessors[following].append(block)
    dominator = _immediate_dominators(order, predecessors)
    bodies: dict[int, set[int]] = {}
    for block in order:
        for header in successors[block]:
            if _dominates(dominator, header, block):
                body = bodies.setdefault(header, {header})
                _add_reaching(body, block, predecessors)
    return bodies


def _add_reaching(body: set[int], block: int, predecessors: list[list[int]]) -> None:
    """Adds every block from which `block` is reached without leaving through the header."""
    pending = [block]
    while pending:
        current = pending.pop()
        if current not in body:
            body.add(current)
            pending += predecessors[current]


def _reverse_postorder(successors: list[list[int]]) -> list[int]:
    seen, postorder = {0}, []
    stack = [(0, iter(successors[0]))] if successors else []
    while stack:
        block, following = stack[-1]
        for candidate in following:
            if candidate not in seen:
                seen.add(candidate)
                stack.append((candidate, iter(successors[candidate])))
                break
        else:
            postorder.append(block)
            stack.pop()
    return postorder[::-1]


def _immediate_dominators(order: list[int], predecessors: list[list[int]]) -> dict[int, int]:
    """By the iteration of Cooper, Harvey and Kennedy (2001); the entry dominates itself."""
    if not order:
        return {}
    rank = {block: i for i, block in enumerate(order)}
    dominator = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [p for p in predecessors[block] if p in dominator]
            new = known[0]
            for other in known[1:]:
                while new != other:
                    if rank[new] > rank[other]:
                        new = dominator[new]
                    else:
                        other = dominator[other]
            if dominator.get(block) != new:
                dominator[block] = new
                changed = True
    return dominator


def _dominates(dominator: dict[int, int], above: int, block: int) -> bool:
    while block != above and dominator[block] != block:
        block = dominator[block]
    return block == above
