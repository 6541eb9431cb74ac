"""Described devices: what the planner needs to know of a GPU that is not here.

The planner itself never looks at a name: on a GPU it reads the device's own properties
(csrc/device_query.cpp), and the entries below spell out what that query returns there. Threads and
shared memory follow from the compute capability (CUDA C++ Programming Guide, "Technical
Specifications per Compute Capability"); SM count, L2 cache, bandwidth and clock from NVIDIA's white
paper or data sheet of the product, named beside each entry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

KIB, MIB = 1024, 1024 * 1024

# By compute capability: threads an SM can hold, shared memory of an SM, and what one block may have
# of it by opting in. From 8.0 on the system keeps 1 KiB of each block for itself.
_LIMITS = {
    (7, 5): (1024, 64 * KIB, 64 * KIB),
    (8, 0): (2048, 164 * KIB, 163 * KIB),
    (8, 6): (1536, 100 * KIB, 99 * KIB),
    (8, 9): (1536, 100 * KIB, 99 * KIB),
    (9, 0): (2048, 228 * KIB, 227 * KIB),
    (10, 0): (2048, 228 * KIB, 227 * KIB),
    (12, 0): (1536, 100 * KIB, 99 * KIB),
}
# Clusters came with 9.0; eight blocks are portable, and more are not asked for. The SMs of a
# cluster are of one GPC. How those of a product are dealt to its GPCs is not published, and may
# differ from chip to chip: `gpcs` below is assumed, in pairs of SMs and as evenly as may be. On a
# GPU csrc/kernels/cluster_query.cuh asks the driver.
_FIRST_WITH_CLUSTERS = (9, 0)
_PORTABLE_CLUSTER = 8

# What the planner does not need and takes no notice of, but a report shows.
MEMORY_KEYS = ("bandwidth_gb_s", "boost_mhz")

# Cycles from a load of DRAM to its use. Published pointer-chase measurements of Ampere, Ada, Hopper
# and Blackwell lie between some 450 and 900 (arXiv:2402.13499, arXiv:2507.10789); a memory system
# at full bandwidth queues on top of that. Only an order of magnitude is meant.
LATENCY_CYCLES = 1000


def _device(
    name: str,
    capability: tuple[int, int],
    *,
    sms: int,
    l2_mib: float,
    gb_s: float,
    mhz: int,
    gpcs: Sequence[int] = (),
) -> dict[str, Any]:
    assert sum(gpcs) == (sms if capability >= _FIRST_WITH_CLUSTERS else 0)
    threads, shared_sm, shared_block = _LIMITS[capability]
    return {
        "name": name,
        "compute_major": capability[0],
        "compute_minor": capability[1],
        "sm_count": sms,
        "max_threads_per_sm": threads,
        "registers_per_sm": 64 * KIB,
        "shared_bytes_per_sm": shared_sm,
        "shared_bytes_per_block": 48 * KIB,
        "shared_bytes_per_block_optin": shared_block,
        "l2_bytes": int(l2_mib * MIB),
        "max_grid": 2**31 - 1,
        "cooperative": True,
        "max_cluster": _PORTABLE_CLUSTER if capability >= _FIRST_WITH_CLUSTERS else 0,
        **{f"clusters_of_{size}": sum(gpc // size for gpc in gpcs) for size in (2, 4, 8)},
        "bandwidth_gb_s": gb_s,
        "boost_mhz": mhz,
    }


DEVICES: Mapping[str, Mapping[str, Any]] = {
    # Turing white paper and T4 data sheet: TU104 with 40 SMs, 256-bit GDDR6 at 10 Gb/s.
    "t4": _device("Tesla T4", (7, 5), sms=40, l2_mib=4, gb_s=320, mhz=1590),
    # A100 white paper, A100 40 GB SXM; the 80 GB version differs in bandwidth only (2039 GB/s).
    "a100": _device("A100-SXM4-40GB", (8, 0), sms=108, l2_mib=40, gb_s=1555, mhz=1410),
    # Ada white paper: AD102 with 128 of 144 SMs and 72 of 96 MB of L2 cache, 384-bit GDDR6X.
    "rtx4090": _device("GeForce RTX 4090", (8, 9), sms=128, l2_mib=72, gb_s=1008, mhz=2520),
    # L40S data sheet: AD102 with 142 SMs (18176 CUDA cores) and all of its L2 cache, 384-bit GDDR6.
    "l40s": _device("L40S", (8, 9), sms=142, l2_mib=96, gb_s=864, mhz=2520),
    # H100 white paper, SXM5: 132 SMs of 144 in 8 GPCs of up to 18, five HBM3 stacks; 66.9 TFLOP/s
    # are 1980 MHz.
    "h100": _device(
        "H100 SXM5", (9, 0), sms=132, l2_mib=50, gb_s=3350, mhz=1980, gpcs=(16,) * 6 + (18,) * 2
    ),
    # B200: two dies of 74 SMs, taken to be in four GPCs each. Data sheets say "up to 8 TB/s"; a
    # 7680-bit bus at 3996 MHz, as the driver reports them, is 7672 GB/s, and it reports 126.5 MB of
    # L2 cache.
    "b200": _device(
        "B200", (10, 0), sms=148, l2_mib=126.5, gb_s=7672, mhz=1965, gpcs=(18,) * 6 + (20,) * 2
    ),
    # RTX Blackwell white paper: GB202 with 11 GPCs, 170 of 192 SMs and 96 of 128 MB of L2 cache,
    # 512-bit GDDR7 at 28 Gb/s.
    "rtx5090": _device(
        "GeForce RTX 5090",
        (12, 0),
        sms=170,
        l2_mib=96,
        gb_s=1792,
        mhz=2407,
        gpcs=(16,) * 8 + (14,) * 3,
    ),
}
"""Properties by name, of "t4", "a100", "rtx4090", "l40s", "h100", "b200" and "rtx5090"."""


def describe(device: str | Mapping[str, Any]) -> dict[str, Any]:
    """The properties of a known device by its name, or of a described one.

    What a description leaves out is the H100's, except bandwidth and clock, which then are unknown.

    Args:
        device: a key of `DEVICES`, in any case of letters, or a dict of properties.

    Returns:
        A new dict with bytes, counts and compute capability as csrc/device_query.cpp reads them on
        a GPU, "bandwidth_gb_s" in 10^9 bytes a second, "boost_mhz" in 10^6 cycles a second.

    Raises:
        ValueError: the name, or a property, is not known; the message lists those that are.
    """
    known = DEVICES["h100"]
    if isinstance(device, str):
        if device.lower() not in DEVICES:
            raise ValueError(
                f"explain: expected device to be one of {', '.join(sorted(DEVICES))} or a dict of "
                f"properties, got {device!r}"
            )
        return dict(DEVICES[device.lower()])
    unknown = sorted(set(device) - set(known))
    if unknown:
        raise ValueError(
            f"explain: expected the properties of device to be among {', '.join(known)}, "
            f"got {', '.join(map(repr, unknown))}"
        )
    return {**planner_properties(known), "name": "described device", **device}


def planner_properties(device: Mapping[str, Any]) -> dict[str, Any]:
    """What of `device` the planner takes."""
    return {key: value for key, value in device.items() if key not in MEMORY_KEYS}


def bytes_to_cover_latency(device: Mapping[str, Any]) -> int | None:
    """Bytes an SM must have in flight to use the whole bandwidth: latency times bandwidth.

    None where the description lacks bandwidth or clock. A model (see LATENCY_CYCLES), not a
    measurement.
    """
    if any(key not in device for key in MEMORY_KEYS):
        return None
    seconds = LATENCY_CYCLES / (device["boost_mhz"] * 1e6)
    return math.ceil(device["bandwidth_gb_s"] * 1e9 * seconds / device["sm_count"])
