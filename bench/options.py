"""The command line of `python -m bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from batchnorm_cuda import devices

from .cases.case import DTYPE_NAMES
from .cases.shapes import SETS
from .loading import ROOT
from .models import byte_model
from .models.traffic_model import LAYOUTS
from .timing.providers import NAMES
from .traffic import parse_shape

_CHOICES = ", ".join("|".join(names) for names in (LAYOUTS, DTYPE_NAMES, byte_model.OPS))

# Its own lines, because argparse's take two screens.
HELP = f"""\
usage: python -m bench [OPTIONS]            time batch norm on this GPU; or without one, model it
       python -m bench compare A.csv B.csv  what became slower from A to B, beyond the spread
       python -m bench report RUN.csv       write Markdown, plots and HTML of a run again
       python -m bench readme [--recount]   write the README's section on performance
       python -m bench gpu-check            all there is to check on a machine with a GPU, and in
       python -m bench visit --plan P ...   parts, with more of it, on one that is lent for minutes
       python -m bench tune; python -m bench reach  time all plans; problems of all kernels
       python -m bench exchange; python -m bench build-time  cost of exchanges, of compiling
       python -m bench calibrate TUNE.csv   fit the planner's constants to the times of all plans

  --set NAME        shapes; repeatable: {", ".join(list(SETS)[:6])},
                    {", ".join(list(SETS)[6:])} (default: short)
  --shape N,C,...   a shape of your own; repeatable
  --model PATH      the batch norms of a model, such as torchvision.models.resnet50, and their sum
  --fuse; --input N,C,...   with what stands behind each; what the model takes (32,3,224,224)
  --layout, --dtype, --op   {_CHOICES}; repeatable
  --provider NAME   repeatable: {", ".join(NAMES[:7])},
                    {", ".join(NAMES[7:])} (default: all that are here)
  --seconds S       of timing for each case (default: 0.5)
  --peer-tolerance X  compare peers whose error is up to X times what the tests allow (default: 1)
  --device NAME     model this GPU rather than measure (without a GPU: h100)
                    {", ".join(devices.DEVICES)}
  --count N         elements of a cut problem whose bytes are counted; 0: none (default: 2^19)
  --out FOLDER      for CSV, JSON, Markdown, plots and HTML (default: build/bench)
"""


class _Parser(argparse.ArgumentParser):
    def format_help(self) -> str:
        return HELP

    def format_usage(self) -> str:
        return ""  # an error is one line; --help says the rest


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected an integer of 0 or more, got {text!r}")
    return int(text)


def part_parser(module: str, says: str | None, seconds: float) -> argparse.ArgumentParser:
    """Of a module that `bench visit` runs as a part: where its results go, and for how long."""
    parser = argparse.ArgumentParser(prog=f"python3 -m {module}", description=says)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seconds", type=positive, default=seconds, help="limit of the whole")
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m bench")
    parser.add_argument("--set", action="append", choices=SETS, dest="sets", default=[])
    parser.add_argument("--shape", action="append", type=parse_shape, dest="shapes", default=[])
    parser.add_argument("--model")
    parser.add_argument("--fuse", action="store_true")
    parser.add_argument("--input", type=parse_shape, default=(32, 3, 224, 224))
    parser.add_argument("--layout", action="append", choices=LAYOUTS, dest="layouts")
    parser.add_argument("--dtype", action="append", choices=DTYPE_NAMES, dest="dtypes")
    parser.add_argument("--op", action="append", choices=byte_model.OPS, dest="ops")
    parser.add_argument("--provider", action="append", choices=NAMES, dest="providers")
    parser.add_argument("--seconds", type=positive, default=0.5)
    parser.add_argument("--peer-tolerance", type=positive, default=1.0)
    parser.add_argument("--device", choices=sorted(devices.DEVICES))
    parser.add_argument("--count", type=natural, default=2**19)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench")
    options = parser.parse_args(arguments)
    if options.fuse:
        _check_fuse(parser, options)
    _fill_in(options)
    return options


def _check_fuse(parser: _Parser, options: argparse.Namespace) -> None:
    """It is about the training step of a model, by providers of its own."""
    if not options.model:
        parser.error("argument --fuse: expected --model PATH with it, got none")
    for name, given in (
        *(("--set", options.sets), ("--shape", options.shapes)),
        *(("--op", options.ops), ("--provider", options.providers)),
    ):
        if given:
            parser.error(f"argument --fuse: expected no {name} with it, got {given}")


def _fill_in(options: argparse.Namespace) -> None:
    if not (options.sets or options.shapes or options.model):
        options.sets = ["short"]
    options.layouts = options.layouts or ["nchw"]
    options.dtypes = options.dtypes or ["fp16"]
    options.ops = options.ops or list(byte_model.OPS)
    options.measure = torch.cuda.is_available() and options.device is None
    options.device = options.device or "h100"
