"""What many tests are run for: every dtype, case or layout of `cases`, and both modes."""

from __future__ import annotations

import pytest
from cases import CASES, DTYPE_IDS, DTYPES, FEW_CASES, LAYOUTS, channels_last, contiguous

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
few_cases = pytest.mark.parametrize("case", FEW_CASES, ids=lambda case: case.id)
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
both_layouts = pytest.mark.parametrize(
    "layout", [contiguous, channels_last], ids=lambda layout: layout.__name__
)
