"""How a provider looks, alike in every plot: a colour and a marker, so that colour is not needed.

The colours are Okabe and Ito's, which the colour-blind tell apart, without their yellow: all of
them stand out from white and from near-black.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    label: str
    colour: str
    marker: str  # of matplotlib
    filled: bool = True


LOOKS = {
    "ours": Look("ours", "#0072B2", "o"),
    "ours:counted": Look("ours, counted", "#0072B2", "o", filled=False),
    "ours:two_pass": Look("ours, two passes forced", "#56B4E9", "s", filled=False),
    "ours:team": Look("ours, team forced", "#56B4E9", "^", filled=False),
    "cudnn": Look("cuDNN", "#009E73", "D"),
    "native": Look("PyTorch native", "#D55E00", "X"),
    "compile": Look("torch.compile", "#CC79A7", "P"),
    "apex": Look("apex groupbn", "#999999", "v"),
    "inplace_abn": Look("InPlace-ABN", "#E69F00", "*"),
    "copy": Look("copy", "#888888", "|"),
}
