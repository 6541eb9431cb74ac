"""Plants faults in copies of the kernels' sources, each behind a switch, for one compilation.

A fault is a piece of text and what it is changed into. `text` becomes

    if (planted == 3) { replacement } else { text }        where it is a statement,
    (planted == 3 ? replacement : text)                    where it is an expression,

on the same lines, so that a report's line is one of the real source. A text that is not found as
often as the fault says is an error: the source has changed, and the fault must be stated anew.
"""

import re
from dataclasses import dataclass

BARRIER = re.compile(r"\b(?:__syncthreads|cluster_barrier)\(\);")
FUNCTION = re.compile(r"__device__ __forceinline__ [^;{}()]*?(\w+)\(")


class SourceChangedError(Exception):
    pass


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    text: str
    replacement: str  # "" removes a statement
    count: int = 1  # how often `text` stands in the file; all are changed
    occurrence: int | None = None  # this one of them only

    def spans(self, source):
        found = [(m.start(), m.end()) for m in re.finditer(re.escape(self.text), source)]
        if len(found) != self.count:
            raise SourceChangedError(
                f"{self.file} has changed: fault '{self.name}' is planted in {self.text!r}, which "
                f"should be there {self.count} times but is {len(found)} times"
            )
        return found if self.occurrence is None else [found[self.occurrence]]


def barrier_faults(file, source):
    """The removal of each barrier of a file, named after file, function and place in it."""
    faults = []
    in_function = {}
    texts = [match.group() for match in BARRIER.finditer(source)]
    for i, match in enumerate(BARRIER.finditer(source)):
        function = FUNCTION.findall(source[: match.start()])[-1]
        place = in_function[function] = in_function.get(function, 0) + 1
        text = match.group()
        faults.append(
            Fault(
                name=f"{file}:{function}:barrier {place}",
                file=file,
                text=text,
                replacement="",
                count=texts.count(text),
                occurrence=texts[:i].count(text),
            )
        )
    return faults


def switched(text, alternatives, planted="::simt_exchange::planted"):
    """`text`, with each (number, replacement) of `alternatives` behind its switch."""
    if text.endswith((";", "}")):
        for number, replacement in alternatives:
            text = f"if ({planted} == {number}) {{ {replacement} }} else {{ {text} }}"
        return "{ " + text + " }"
    for number, replacement in alternatives:
        text = f"({planted} == {number} ? ({replacement}) : ({text}))"
    return text


def plant(file, source, numbered_faults):
    """The source with those of the (number, fault) that are in this file."""
    alternatives = {}
    for number, fault in numbered_faults:
        if fault.file != file:
            continue
        for span in fault.spans(source):
            alternatives.setdefault(span, []).append((number, fault.replacement))
    end = len(source)
    for span in sorted(alternatives, reverse=True):
        assert span[1] <= end, f"{file}: faults overlap at {source[span[0] : span[1]]!r}"
        end = span[0]
        new = switched(source[span[0] : span[1]], alternatives[span])
        source = source[: span[0]] + new + source[span[1] :]
    return source
