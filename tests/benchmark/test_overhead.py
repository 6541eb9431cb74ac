"""The overhead bench runs; how long things take is no matter for a test."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import Backend

from batchnorm_cuda import batch_norm
from bench import overhead


@pytest.mark.parametrize(
    "limits, status", [(("inf", "inf"), 0), (("0", "inf"), 1), (("inf", "0"), 1)]
)
def test_rows_and_exit_status(
    kernels: Backend,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    limits: tuple[str, str],
    status: int,
) -> None:
    monkeypatch.setenv("BATCHNORM_CUDA_EMULATE", "1")
    given = [f"--limit={limits[0]}", f"--fused-limit={limits[1]}"]
    monkeypatch.setattr(sys, "argv", ["overhead", "--rounds=1", "--calls=1", *given])
    threads = torch.get_num_threads()
    assert overhead.main() == status
    torch.set_num_threads(threads)
    read = capsys.readouterr().out
    rows = [line.replace("3 calls", "3-calls").split() for line in read.splitlines()[2:]]
    assert [row[:2] for row in rows if row[0] != "composite"] == [
        [name, mode]
        for mode in ("training", "eval")
        for name in ("torch.nn", "kernels", "3-calls", "fused")
    ]

    x = torch.randn(4, 3, 5, device=kernels.device)
    output = batch_norm(x, None, None, training=True)  # launches run again
    torch.testing.assert_close(output.mean((0, 2)), torch.zeros(3, device=x.device))
