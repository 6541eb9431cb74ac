"""The machine-code proof: its parsers on recorded text, planted faults, and the real kernels."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bench_cases import kernel

sys.path.append(str(Path(__file__).resolve().parents[2]))  # bench/ is not installed

from bench.machine_code.compile import Job, architectures, texts_of
from bench.machine_code.kernels import (
    MainLoop,
    choose_main_loop,
    describe,
    describe_loop,
    problems,
    resident_blocks,
    shorten,
)
from bench.machine_code.listing import (
    LaunchBounds,
    Resources,
    parse_access,
    parse_launch_bounds,
    parse_listing,
    parse_resources,
)
from bench.machine_code.loops import find_loops
from bench.sass import kernels_for
from bench.toolkit import Toolkit, ToolkitError, archs, find_tool, kernels, resolve, sources

# ------------------------------------------------------------------------------- parsers

PTX = """
.visible .entry _Z5boundPf(
\t.param .u64 .ptr .align 1 _Z5boundPf_param_0
)
.maxntid 128, 2, 1
.minnctapersm 2
{
\tret;
}
.entry _Z4openPf(
\t.param .u64 _Z4openPf_param_0
)
{
\tret;
}
"""

RESOURCES = """
Resource usage:
 Common:
  GLOBAL:0
 Function _Z5boundPf:
  REG:16 STACK:152 SHARED:1024 LOCAL:0 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z4openPf:
  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:360 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

# A loop over tasks with a loop over windows in it, whose rare path lies behind the end and jumps
# back into the middle: no loop. The call of a local label closes the outer loop, as ptxas does it
# for branches that the whole warp takes.
SASS = """
\t.section\t.text._Z4walkPf,"ax",@progbits
\t.sectioninfo\t@"SHI_REGISTERS=24"
        .type           _Z4walkPf,@function
_Z4walkPf:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.U16 R2, [R4.64] ;
        /*0020*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ;
.L_x_1:
        /*0030*/                   LDG.E.128.CONSTANT R8, [R4.64] ;
        /*0040*/                   BSSY B0, `(.L_x_2) ;
        /*0050*/              @!P0 BRA `(.L_x_4) ;
.L_x_3:
        /*0060*/                   BSYNC B0 ;
.L_x_2:
        /*0070*/                   STG.E.128 [R6.64], R8 ;
        /*0080*/                   LDG.E.64.STRONG.GPU R12, [R4.64] ;
        /*0090*/                   BRA P1, `(.L_x_1) ;
        /*00a0*/              @!P2 CALL.REL.NOINC `(.L_x_0) ;
        /*00b0*/                   BRX R14 -0xc0   (*"BRANCH_TARGETS .L_x_5,.L_x_6"*);
.L_x_5:
        /*00c0*/               @P3 EXIT ;
.L_x_6:
        /*00d0*/                   EXIT ;
.L_x_4:
        /*00e0*/                   FADD R8, R8, R8 ;
        /*00f0*/                   BRA `(.L_x_3) ;
        .type           $__internal_0_$__cuda_sm20_div_s64,@function
$__internal_0_$__cuda_sm20_div_s64:
        /*0100*/                   STL [R1], R2 ;
        /*0110*/                   RET.REL.NODEC R8 `(_Z4walkPf) ;
.L_x_7:
        /*0120*/                   BRA `(.L_x_7);
        /*0130*/                   NOP;
"""


def test_launch_bounds_are_read_from_ptx() -> None:
    assert parse_launch_bounds(PTX) == {
        "_Z5boundPf": LaunchBounds(256, 2),
        "_Z4openPf": LaunchBounds(None, None),
    }


def test_resources_are_read_from_the_report_of_cuobjdump() -> None:
    assert parse_resources(RESOURCES) == {
        "_Z5boundPf": Resources(16, 152, 1024),
        "_Z4openPf": Resources(40, 0, 0),
    }


def test_a_report_without_numbers_is_an_error() -> None:
    with pytest.raises(ValueError, match="not a report of cuobjdump"):
        parse_resources(" Function _Z1k:\n  GLOBAL:0\n")


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("LDG.E.128.CONSTANT", ("global", False, 128, False)),
        ("LDG.E.128.SYS", ("global", False, 128, False)),  # as sm_75 writes a plain load
        ("LDG.E.ENL2.256", ("global", False, 256, False)),
        ("LDG.E.64.STRONG.GPU", ("global", False, 64, True)),
        ("LDG.E", ("global", False, 32, False)),
        ("STG.E.U16", ("global", True, 16, False)),
        ("STG.E.U8", ("global", True, 8, False)),
        ("LDGSTS.E.BYPASS.128", ("global", False, 128, False)),
        ("LDL.LU", ("local", False, 32, False)),
        ("STL.64", ("local", True, 64, False)),
        ("LD.E", ("generic", False, 32, False)),
        ("UBLKCP.S.G", ("bulk", False, 0, False)),
    ],
)
def test_accesses_are_told_by_their_opcode(opcode: str, expected: tuple) -> None:
    access = parse_access(opcode)
    assert access is not None
    assert (access.space, access.store, access.bits, access.ordered) == expected


@pytest.mark.parametrize("opcode", ["LDS.128", "STS", "LDC.64", "LDCU.128", "FADD", "BAR.SYNC"])
def test_other_opcodes_are_no_access(opcode: str) -> None:
    assert parse_access(opcode) is None


def test_the_listing_keeps_helpers_apart_and_resolves_jumps() -> None:
    listing = parse_listing(SASS)["_Z4walkPf"]
    assert [i.address for i in listing.own] == list(range(0, 0x100, 16))
    assert [i.opcode for i in listing.helpers] == ["STL", "RET.REL.NODEC", "BRA"]
    by_address = {i.address: i for i in listing.own}
    assert by_address[0x20].targets == ()  # a real call
    assert by_address[0x40].targets == ()  # BSSY jumps nowhere
    assert by_address[0x50].targets == (0xE0,) and by_address[0x50].conditional
    assert by_address[0x90].targets == (0x30,) and by_address[0x90].conditional
    assert by_address[0xB0].targets == (0xC0, 0xD0) and not by_address[0xB0].conditional


def test_loops_nest_and_rare_paths_belong_to_their_loop() -> None:
    outer, inner = find_loops(parse_listing(SASS)["_Z4walkPf"].own)
    assert (outer.header, outer.nested) == (0x10, 1)
    assert [i.address for i in outer.own] == [0x10, 0x20, 0xA0]
    assert (inner.header, inner.nested) == (0x30, 0)
    assert [i.address for i in inner.own] == [*range(0x30, 0xA0, 16), 0xE0, 0xF0]


def test_the_way_of_whole_windows_makes_no_narrow_access() -> None:
    """Through a loop whose detour moves a lane, and through one that has no other way."""
    detour = SASS.replace("FADD R8, R8, R8", "LDG.E.U16 R8, [R4.64]")
    _, inner = find_loops(parse_listing(detour)["_Z4walkPf"].own)
    assert [i.address for i in inner.whole] == [*range(0x30, 0xA0, 16)]
    whole, every = describe_loop(inner, exact=False), describe_loop(inner)
    assert (whole.instructions, whole.narrow) == (7, {})
    assert (every.instructions, every.narrow) == (9, {16: 1})
    masked = detour.replace("LDG.E.U16 R8", "LDG.E.U8 R8")  # a byte is of a mask
    _, inner = find_loops(parse_listing(masked.replace("@!P0 BRA", "BRA"))["_Z4walkPf"].own)
    assert describe_loop(inner, exact=False).instructions == 9
    _, inner = find_loops(parse_listing(detour.replace("STG.E.128", "STG.E.32"))["_Z4walkPf"].own)
    assert inner.whole == ()
    assert describe_loop(inner, exact=False).instructions == 9
    # Of two ways, the one that moves more, and else the one that does more with it.
    wider = SASS.replace("FADD R8, R8, R8", "LDG.E.128 R8, [R4.64]")
    _, inner = find_loops(parse_listing(wider)["_Z4walkPf"].own)
    assert describe_loop(inner, exact=False).windows == 3
    _, inner = find_loops(parse_listing(SASS)["_Z4walkPf"].own)
    assert describe_loop(inner, exact=False).instructions == 9


def test_the_main_loop_moves_the_most() -> None:
    loops = find_loops(parse_listing(SASS)["_Z4walkPf"].own)
    loop = choose_main_loop([describe_loop(loop) for loop in loops])
    # The ordered load is an exchange between blocks, not data.
    assert loop == MainLoop(0x30, 9, loads={128: 1}, stores={128: 1}, nested=0)
    assert loop.windows == 2 and loop.instructions_per_window == 4.5 and loop.narrow == {}


def test_of_equal_loops_the_shorter_is_the_main_loop() -> None:
    _, inner = find_loops(parse_listing(SASS)["_Z4walkPf"].own)
    tail = replace(inner, header=0x200, own=(*inner.own, inner.own[-1]))
    for loops in ([inner, tail], [tail, inner]):
        assert choose_main_loop([describe_loop(loop) for loop in loops]).address == 0x30
    assert choose_main_loop([]) is None


def test_names_are_shortened() -> None:
    space = "batchnorm_cuda::(anonymous namespace)::"
    cursor = "batchnorm_cuda::AlongS<__half, int>"
    name = f"void {space}k<{cursor} >(batchnorm_cuda::Params<{cursor}::scalar_t>)"
    assert shorten(name) == "k<AlongS<__half, int>>"
    assert shorten("batchnorm_cuda::_GLOBAL__N__34ec_9_a_cu_f7::k(int)") == "k"


@pytest.mark.parametrize(
    ("registers", "threads", "arch", "blocks"),
    [
        (128, 256, "8.0", 2),
        (33, 256, "8.0", 6),  # allocated in steps of 8
        (32, 256, "8.0", 8),
        (32, 256, "7.5", 4),  # 1024 threads per SM
        (32, 256, "8.6", 6),  # 1536
        (72, 512, "9.0", 1),  # 7 warps fit into a quarter of the registers
        (64, 512, "9.0", 2),
    ],
)
def test_resident_blocks(registers: int, threads: int, arch: str, blocks: int) -> None:
    assert resident_blocks(registers, threads, arch) == blocks


# ------------------------------------------------------------------------------- rules

CLEAN = kernel()
TEAM = replace(
    CLEAN,
    name="team_kernel<AlongC<__half, int, true>, TeamBackward, 12, Identity<float>>",
    main_loop=MainLoop(0x100, 900, {128: 14, 32: 8}, {128: 7, 32: 8}, 3),
)
NARROW = MainLoop(0x100, 80, {128: 4}, {128: 3, 16: 8}, 0)
MASKED = "transform_input_kernel<AlongRuns<__half, int, false>>"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"resources": Resources(128, 16, 0)}, "has a stack frame of 16 bytes"),
        ({"resources": Resources(129, 0, 0)}, "uses 129 registers, the plan allows 128"),
        ({"local_accesses": 3}, "makes 3 accesses to local memory"),
        ({"main_loop": NARROW}, "makes 8 accesses of 16 bits in its main loop"),
        ({"main_loop": None}, "is exact, but no loop moves 16 bytes at a time"),
    ],
)
def test_each_rule_is_checked(change: dict, problem: str) -> None:
    assert problems(CLEAN) == []
    assert problems(replace(CLEAN, **change)) == [problem]


def test_the_round_of_a_team_moves_whole_windows() -> None:
    assert problems(TEAM) == []  # parameters and statistics are narrow
    for loads, stores, problem in (
        ({128: 11}, {128: 6}, "loads 11 whole windows in its main loop instead of 12"),
        ({128: 12}, {128: 5}, "stores 5 whole windows in its main loop instead of 6"),
    ):
        loop = MainLoop(0x100, 900, loads, stores, 3)
        assert problems(replace(TEAM, main_loop=loop)) == [problem]
    # A loop of its own for the windows has nothing else to move.
    inner = MainLoop(0x100, 90, {128: 12, 32: 8}, {128: 12}, 0)
    found = problems(replace(TEAM, main_loop=inner))
    assert found == ["makes 8 accesses of 32 bits in its main loop"]


@pytest.mark.parametrize(
    ("cursor", "exact"),
    [
        ("AlongS<__half, int>", True),
        ("AlongC<float, long, false>", False),
        ("AlongRuns<float, long, true>", True),
        ("AlongRow<double, int, true>", True),
        ("AlongRow<double, long, false>", False),
        ("AlongSamples<double, int>", False),
    ],
)
def test_exact_tiling_is_told_by_the_cursor(cursor: str, exact: bool) -> None:
    assert replace(CLEAN, name=f"transform_input_kernel<{cursor}>").exact is exact


def test_masked_kernels_may_be_narrow() -> None:
    assert problems(replace(CLEAN, name=MASKED, main_loop=NARROW)) == []


def test_a_fused_kernel_may_move_a_byte_of_the_mask_beside_two_windows() -> None:
    fused = "transform_input_kernel<AlongS<__half, int, true>, FusedForward<__half>>"
    loop = MainLoop(0x100, 80, {128: 4}, {128: 2, 8: 2}, 0)
    plain = replace(CLEAN, main_loop=loop)
    assert problems(plain) == ["makes 2 accesses of 8 bits in its main loop"]
    assert problems(replace(plain, name=fused)) == []
    for accesses, problem in (({8: 4}, "4 accesses of 8 bits"), ({16: 2}, "2 accesses of 16 bits")):
        more = replace(loop, stores={128: 2, **accesses})
        found = problems(replace(plain, name=fused, main_loop=more))
        assert found == [f"makes {problem} in its main loop"]


def test_launch_bounds_are_required() -> None:
    unbounded = replace(CLEAN, bounds=LaunchBounds(None, None))
    assert "has no __launch_bounds__" in problems(unbounded)


# ------------------------------------------------------------------------------- with nvcc

PLANTED = """
template <typename scalar_t, typename index_t> struct AlongS {};

template <typename Cursor>
__global__ void __launch_bounds__(256, 2) wide_kernel(const uint4* x, uint4* y, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 256) y[i] = x[i];
}
template __global__ void wide_kernel<AlongS<float, int>>(const uint4*, uint4*, int);

template <typename Cursor>
__global__ void __launch_bounds__(256, 2) narrow_kernel(const uint4* x, float* y, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 256) y[i] = x[i].x + x[i].y + x[i].z + x[i].w;
}
template __global__ void narrow_kernel<AlongS<float, int>>(const uint4*, float*, int);

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 2) crowded_kernel(const float* x, float* y) {
  float kept[64], sum = 0;
#pragma unroll
  for (int i = 0; i < 64; ++i) kept[i] = x[i * kThreads + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) sum += kept[i] * kept[63 - i] + kept[(i * 7) % 64];
#pragma unroll
  for (int i = 0; i < 64; ++i) y[i * kThreads + threadIdx.x] = kept[i] - sum;
}
template __global__ void crowded_kernel<256>(const float*, float*);
template __global__ void crowded_kernel<1024>(const float*, float*);  // 32 registers for 64 values

__global__ void __launch_bounds__(256, 2) indexed_kernel(const int* x, int* y) {
  int table[32];
  for (int i = 0; i < 32; ++i) table[x[i] & 31] = i;
  y[threadIdx.x] = table[threadIdx.x & 31];
}

__global__ void unbounded_kernel(float* x) { x[threadIdx.x] = 0; }
"""


@pytest.fixture(scope="module")
def kit() -> Toolkit:
    try:
        found = resolve()
        for name in ("cuobjdump", "nvdisasm"):
            find_tool(name, found.home)
    except ToolkitError as error:
        pytest.skip(str(error))
    return found


def test_planted_faults_are_found(kit: Toolkit, tmp_path: Path) -> None:
    source = tmp_path / "planted.cu"
    source.write_text(PLANTED)
    job = Job(source, "8.0")
    recipe = kernels.KernelRecipe.of("half", kit, ["8.0+PTX"])
    planted = tmp_path / "planted.o"
    subprocess.run([*recipe.compiler, "-c", source, "-o", planted], check=True)
    texts = texts_of(job, planted, kit, build_dir=tmp_path)
    found = {kernel.name: " ".join(problems(kernel)) for kernel in describe(job, texts)}
    assert found.pop("wide_kernel<AlongS<float, int>>") == ""
    assert found.pop("crowded_kernel<256>") == ""
    narrow = found.pop("narrow_kernel<AlongS<float, int>>")
    assert narrow == "makes 1 accesses of 32 bits in its main loop"
    spilling = found.pop("crowded_kernel<1024>")
    assert "stack frame" in spilling and "accesses to local memory" in spilling
    indexed = found.pop("indexed_kernel")
    assert "stack frame" in indexed and "accesses to local memory" in indexed
    assert found == {"unbounded_kernel": "has no __launch_bounds__"}


def test_one_compilation_serves_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what the environment asks for holds what is wanted, with its PTX."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX;10.0+PTX")
    assert architectures(["9.0"]) == ["8.0", "9.0+PTX", "10.0+PTX"]
    assert architectures(["8.0"]) == ["8.0+PTX"]
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    assert architectures(["9.0", "8.0"]) == ["8.0+PTX", "9.0+PTX"]


@pytest.mark.nvcc
@pytest.mark.parametrize("arch", archs.DEFAULT)
def test_the_kernels_hold_the_rules(kit: Toolkit, arch: str) -> None:
    if arch not in kit.gpu_codes():
        pytest.skip(f"nvcc {kit.version} cannot generate {arch}")
    kernels = kernels_for([arch], kit)
    assert {kernel.source for kernel in kernels} == {path.name for path in sources.kernel_sources()}
    assert sum(kernel.exact for kernel in kernels) > len(kernels) / 2
    found = [f"{kernel.name} {problem}" for kernel in kernels for problem in problems(kernel)]
    assert found == []
