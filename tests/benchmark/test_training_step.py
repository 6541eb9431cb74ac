"""`bench.training_step`: losses that disagree, processes that fail, what counts as batch norm."""

from __future__ import annotations

import csv
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_cases  # noqa: F401, which finds bench/
import pytest
import torch
from conftest import HAS_GPU

from bench import training_step
from bench.training_step import FAILED, INACCURATE, NOT_RUN, OK, Job

ANSWERS = 'import json, os, sys, time\nsay = lambda **m: print("@" + json.dumps(m), flush=True)\n'
ANSWERS += "dtype, layout, *variants = sys.argv[1:]\n"
JOB = Job("bf16", "nhwc", ("torch", "ours"), limit=60, least=1)


def row(variant: str, loss: str = "6.90000", **values: Any) -> dict[str, Any]:
    known = {"dtype": "bf16", "layout": "nhwc", "variant": variant, "status": OK, "device": "GPU 1"}
    return known | {"loss_first": "7.00000", "loss": loss, "ms": "50.000"} | values


def run(
    tmp_path: Path, code: str, jobs: tuple[Job, ...] = (JOB,), seconds: float = 60
) -> tuple[int, list[dict[str, str]]]:
    worker = [sys.executable, "-c", ANSWERS + code]
    status = training_step.run(jobs, worker, tmp_path, seconds)
    with (tmp_path / "training.csv").open() as file:
        return status, list(csv.DictReader(file))


def answers(*rows: dict[str, Any]) -> str:
    return "".join(f"say(row=json.loads({json.dumps(r)!r}))\n" for r in rows)


def test_equal_losses_pass(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status, rows = run(tmp_path, answers(row("torch"), row("ours", "6.95000", ms="40.000")))
    assert status == 0 and [r["status"] for r in rows] == [OK, OK]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("training step: PASS on GPU 1: 2 ok, 0 INACCURATE")
    assert last.endswith("bf16 nhwc 40.000 ms, torch.nn 50.000 ms")


def test_the_summary_names_what_is_beside_torchs(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Each against torch.nn's that is compiled or not, as it is itself."""
    variants = ("torch", "ours", "fused", "torch+compile", "ours+compile")
    jobs = (Job("bf16", "nhwc", variants, limit=60, least=1),)
    rows = [row(name, ms=f"{50 - n}.000") for n, name in enumerate(variants)]
    status, _ = run(tmp_path, answers(*rows), jobs)
    assert status == 0
    *_, ours, fused, compiled = capsys.readouterr().out.splitlines()[-1].split("; ")
    assert ours == "bf16 nhwc 49.000 ms, torch.nn 50.000 ms"
    assert fused == "bf16 nhwc fused 48.000 ms, torch.nn 50.000 ms"
    assert compiled == "bf16 nhwc compiled 46.000 ms, torch.nn 47.000 ms"


@pytest.mark.parametrize("values", [{"loss": "6.00000"}, {"loss_first": "7.20000"}])
def test_a_loss_that_is_off_is_inaccurate(tmp_path: Path, values: dict[str, str]) -> None:
    status, rows = run(tmp_path, answers(row("torch"), row("ours", **values)))
    assert status == 1
    assert [r["status"] for r in rows] == [OK, INACCURATE]
    assert "expected" in rows[1]["note"]


def test_a_loss_that_is_no_number_is_inaccurate(tmp_path: Path) -> None:
    status, rows = run(tmp_path, answers(row("torch", "nan")))
    assert status == 1 and rows[0]["status"] == INACCURATE


def test_each_dtype_has_its_own_reference(tmp_path: Path) -> None:
    jobs = (JOB, Job("fp16", "nhwc", ("torch",), limit=60, least=1))
    code = "if dtype == 'bf16':\n    " + answers(row("torch")).strip() + "\n    "
    code += answers(row("ours")).strip() + "\nelse:\n    "
    code += answers(row("torch", "3.00000", dtype="fp16", loss_first="3.00000"))
    status, rows = run(tmp_path, code, jobs)
    assert status == 0 and [r["status"] for r in rows] == [OK] * 3


def test_what_a_process_had_found_is_kept(tmp_path: Path) -> None:
    """It dies behind the first row; of the second it had said how it trains."""
    trained = f"say(trained=json.loads({json.dumps(row('ours', peak_mib=7))!r}))\n"
    code = trained + answers(row("torch")) + "print('out of memory'); os._exit(5)"
    status, rows = run(tmp_path, code)
    assert status == 1
    assert [r["status"] for r in rows] == [OK, FAILED]
    assert rows[1]["note"] == "ended with status 5: out of memory"
    assert rows[1]["loss_first"] == "7.00000"


def test_a_process_that_hangs_ends_at_its_limit(tmp_path: Path) -> None:
    jobs = (Job("bf16", "nhwc", ("torch",), limit=1, least=0.5), JOB)
    code = "if len(variants) == 1: time.sleep(60)\n" + answers(row("torch"), row("ours"))
    status, rows = run(tmp_path, code, jobs)
    assert status == 1
    assert [r["status"] for r in rows] == [FAILED, OK, OK]
    assert rows[0]["note"].startswith("killed")


def test_what_there_is_no_time_for_is_said_and_no_failure(tmp_path: Path) -> None:
    jobs = (JOB, Job("bf16", "nhwc", ("ours+compile",), limit=60, least=1000))
    status, rows = run(tmp_path, answers(row("torch"), row("ours")), jobs)
    assert status == 0
    assert [r["status"] for r in rows] == [OK, OK, NOT_RUN]
    assert rows[2]["note"].endswith("s were left")


def test_the_essential_jobs_come_first() -> None:
    """What is cut off at a limit is what matters least."""
    pairs = [(job.dtype, job.layout, job.variants) for job in training_step.JOBS]
    variants = ("torch", "ours", "fused")
    assert pairs[:2] == [("bf16", "nhwc", variants), ("fp16", "nhwc", variants)]
    assert all(len(job.variants) == 1 for job in training_step.JOBS if "compile" in str(job))


def test_without_a_gpu_there_is_nothing_to_run_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("BATCHNORM_CUDA_EMULATE", raising=False)
    pytest.importorskip("torchvision")
    assert training_step.main(["--out", str(tmp_path)]) == 2
    assert "no GPU" in capsys.readouterr().out


# ------------------------------------------------------------------------------ the worker

step_worker = pytest.importorskip("bench.gpu.training_step_worker", exc_type=Exception)


@dataclass
class Event:
    key: str
    self_device_time_total: float  # microseconds


def test_what_counts_as_batch_norm() -> None:
    ours = "void batchnorm_cuda::team_kernel<batchnorm_cuda::AlongC<__half, int, true> >(int)"
    counted = [
        *("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float>", "void cudnn::bn_bw_1C11_singleread<1>"),
        "void at::native::batch_norm_backward_elemt_channels_last_kernel<4>(int)",
        "void cudnn::batchnorm_fwtr_nhwc_semiPersist<__half>",
        *("triton_red_fused__native_batch_norm_legit_functional_1", ours),
    ]
    others = [
        *("sm90_xmma_fprop_implicit_gemm_bf16_tn_n_bn_nhwc", "triton_poi_fused_relu_1"),
        *("void at::native::vectorized_elementwise_kernel<4>", "Memset (Device)"),
    ]
    events = [Event(name, 1000.0) for name in (*counted, *others)]
    assert step_worker.batch_norm_ms(events, steps=2) == len(counted) / 2


@pytest.mark.skipif(HAS_GPU, reason="takes the large model on a GPU")
def test_a_step_on_the_host_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours takes the kernels, trains as torch.nn's does, fused too, and no time is given."""
    assert os.environ["BATCHNORM_CUDA_EMULATE"] == "1"
    from batchnorm_cuda._build.extension import load_emulated

    model = load_emulated()._host_model
    said: list[dict[str, Any]] = []
    model.start_traffic()
    variants = ["torch", "ours", "fused"]
    step_worker.run(step_worker.Setting("bf16", "nhwc", "cpu"), variants, said.append)
    launches = model.stop_traffic()["launches"]
    rows = [message["row"] for message in said if "row" in message]
    assert [r["variant"] for r in rows] == variants
    assert {r["kind"] for r in rows} == {"host"} and not any("ms" in r for r in rows)
    assert all(abs(float(rows[0]["loss"]) - float(r["loss"])) < 0.01 for r in rows[1:])
    assert len(launches) >= 2 * 2 * 12  # forward and backward of each batch norm
    for kernels in ("FusedForward", "FusedBackward"):  # of all but the three that are added
        assert sum(kernels in name for name in launches) == 12 - 3
