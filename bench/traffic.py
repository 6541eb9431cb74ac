"""Counts the memory traffic of one operation on a described GPU, on the CPU model of CUDA.

    python -m bench.traffic --shape 32,64,56,56 --layout nchw --dtype fp16 --op forward \\
        --device a100 [--sms 8] [--strategy auto] [--shift 0] [--json] [--force]

Prints the fewest bytes possible, the plan's prediction, the DRAM bytes counted behind an L2 cache
of the device's size that starts cold, and the sectors that warps touch against the fewest that
would do; beside it the same with two passes forced. A model's count: nothing is measured.

--sms K models the device cut to K SMs, with L2 cache in proportion and each SM as it is. The tensor
is always run as given: to keep an SM's share of a large one, divide N by the same factor.

Bytes compulsory, predicted and counted are of activations; per-channel vectors and workspace are
counted apart. Exit status 2 for a bad argument, or a tensor that would take longer than five
minutes here without --force.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from batchnorm_cuda import devices

from .models.traffic_model import (
    DTYPES,
    LAYOUTS,
    OPS,
    STRATEGIES,
    WINDOW_BYTES,
    Case,
    Site,
    Traffic,
    count,
    scaled_device,
)

# Bytes of x that one core of a server works off in a second, under the slower operation and both
# strategies together. An order of magnitude, to warn before a long run.
_BYTES_PER_SECOND = 4e6
_WORTH_SAYING, _LIMIT = 5, 300  # seconds
_WORST_SITES = 5


def summary(case: Case, device: dict[str, Any], chosen: Traffic, two_pass: Traffic) -> dict:
    """What --json prints."""
    return {
        "op": case.op,
        "shape": case.shape,
        "layout": case.layout,
        "dtype": case.dtype,
        "device": device["name"],
        "sm_count": device["sm_count"],
        "l2_bytes": device["l2_bytes"],
        "strategy": chosen.strategy,
        "launches": len(chosen.launches),
        "compulsory_bytes": chosen.compulsory_bytes,
        "predicted_bytes": chosen.predicted_bytes,
        "counted_bytes": chosen.counted_bytes,
        "two_pass_bytes": two_pass.counted_bytes,
        "parameter_bytes": chosen.dram_bytes("parameter"),
        "workspace_bytes": chosen.dram_bytes("workspace"),
        "sector_efficiency": chosen.sector_efficiency,
        "buffers": [asdict(buffer) for buffer in chosen.buffers],
        "sites": [asdict(site) | {"efficiency": site.efficiency} for site in chosen.sites],
    }


def report(case: Case, device: dict[str, Any], chosen: Traffic, two_pass: Traffic) -> str:
    """The same for reading."""
    shape = " x ".join(map(str, case.shape))
    shifted = f", {case.shift} elements past a 16-byte boundary" if case.shift else ""
    lines = [
        f"batch norm {case.op}, {case.dtype} {shape}, {case.layout}{shifted}",
        f"on a model of {device['name']}: {device['sm_count']} SMs, "
        f"{device['l2_bytes']:,} bytes of L2 cache, cold at the start",
        "counted on the CPU; nothing here is measured on a GPU",
        "",
        f"  plan        {chosen.strategy}: {chosen.reason}",
        f"  launches    {len(chosen.launches)}",
    ]
    rows = [
        ("compulsory", chosen.compulsory_bytes, "every activation once"),
        ("predicted", chosen.predicted_bytes, "by the plan"),
        ("counted", chosen.counted_bytes, "DRAM bytes of activations"),
        ("two passes", two_pass.counted_bytes, "the same, forced"),
        ("parameters", chosen.dram_bytes("parameter"), "per-channel vectors, counted"),
        ("workspace", chosen.dram_bytes("workspace"), "partial results and flags, counted"),
    ]
    for name, size, meaning in rows:
        ratio = size / chosen.compulsory_bytes if chosen.compulsory_bytes else 1.0
        lines.append(f"  {name:<10}  {size:>15,}  {ratio:6.3f} x compulsory  {meaning}")
    lines.append(
        f"  sectors     {chosen.sector_efficiency:.3f} of the touched ones are needed "
        "(activations, 32 bytes each)"
    )
    return "\n".join([*lines, "", *_buffer_lines(chosen), "", *_site_lines(chosen)])


def _buffer_lines(traffic: Traffic) -> list[str]:
    lines = [f"  {'buffer':<16}{'kind':<12}{'bytes':>15}{'DRAM read':>15}{'DRAM written':>15}"]
    for b in traffic.buffers:
        lines.append(
            f"  {b.name:<16}{b.kind:<12}{b.bytes:>15,}{b.dram_read:>15,}{b.dram_written:>15,}"
        )
    return lines


def _site_lines(traffic: Traffic) -> list[str]:
    """The accesses that waste most, activations first: those set the efficiency."""
    wasteful = [site for site in traffic.sites if site.sectors > site.fewest]
    wasteful.sort(key=lambda site: (site.kind != "activation", site.efficiency))
    if not wasteful:
        return ["  no access touches more sectors than it needs"]
    lines = ["  least efficient accesses: fewest sectors over touched"]
    for site in wasteful[:_WORST_SITES]:
        lines.append(
            f"  {site.efficiency:5.3f}  {site.fewest:>10,} of {site.sectors:>10,}  "
            f"{'write' if site.write else 'read '} {site.buffer} at {site.site}, {_kernel(site)}"
        )
    return lines


def _kernel(site: Site) -> str:
    return site.kernel.partition("<")[0]


def parse_shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise argparse.ArgumentTypeError(
            f"expected two or more sizes >= 1, such as 32,64,56,56, got {text!r}"
        )
    return shape


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", required=True, type=parse_shape, help="N,C[,L | ,H,W | ,D,H,W]")
    parser.add_argument("--layout", choices=LAYOUTS, default="nchw", help="nhwc: channels last")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16", help="of activations")
    parser.add_argument("--op", choices=OPS, default="forward")
    parser.add_argument("--device", choices=sorted(devices.DEVICES), default="a100")
    parser.add_argument("--sms", type=int, help="cut the device to so many SMs")
    parser.add_argument("--strategy", choices=STRATEGIES, default="auto")
    parser.add_argument("--shift", type=int, default=0, help="elements past a 16-byte boundary")
    parser.add_argument("--json", action="store_true", help="one object, for programs")
    parser.add_argument("--force", action="store_true", help="run however long it takes")
    options = parser.parse_args(arguments)
    problem = find_problem(options)
    if problem is not None:
        parser.error(problem)
    return options


def find_problem(options: argparse.Namespace) -> str | None:
    """What is wrong with arguments that are well-formed each by itself."""
    most = devices.DEVICES[options.device]["sm_count"]
    if options.sms is not None and not 1 <= options.sms <= most:
        return f"argument --sms: expected 1 to {most} for {options.device}, got {options.sms}"
    last = WINDOW_BYTES // DTYPES[options.dtype].itemsize - 1
    if not 0 <= options.shift <= last:
        return f"argument --shift: expected 0 to {last} for {options.dtype}, got {options.shift}"
    if options.op == "forward" and case_of(options).numel == options.shape[1]:
        return (
            "argument --shape: expected more than one value per channel to train, "
            f"got {options.shape}"
        )
    seconds = estimate_seconds(case_of(options))
    if seconds > _LIMIT and not options.force:
        return (
            f"argument --shape: expected a tensor that takes up to {_LIMIT} s, got one of about "
            f"{seconds:.0f} s; --force runs it, and N and --sms divided by the same factor leave "
            "each SM its share"
        )
    return None


def estimate_seconds(case: Case) -> float:
    return case.nbytes / _BYTES_PER_SECOND


def case_of(options: argparse.Namespace) -> Case:
    return Case(options.shape, options.layout, options.dtype, options.op, options.shift)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    case, device = case_of(options), scaled_device(options.device, options.sms)
    if estimate_seconds(case) > _WORTH_SAYING:
        print(f"counting takes about {estimate_seconds(case):.0f} s", file=sys.stderr)
    chosen = count(case, device, options.strategy)
    two_pass = chosen if chosen.strategy == "two_pass" else count(case, device, "two_pass")
    if options.json:
        print(json.dumps(summary(case, device, chosen, two_pass)))
    else:
        print(report(case, device, chosen, two_pass))
    return 0


if __name__ == "__main__":
    sys.exit(main())
