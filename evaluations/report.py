"""Results in lines for people, in the words of guided-diffusion's evaluator where the features are Inception's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evaluations.metrics.base import COMPUTED


def report(result: Mapping[str, Any]) -> str:
    """What evaluator.py and th_evaluator.py print of what they write as JSON."""
    lines = [f"reference: {result['reference']}", f"samples: {result['samples']}"]
    if result["extractor"]:
        lines.append("extractor: {name} ({id}), resize: {resize}".format(**result["extractor"]))
    lines += [f"{fields['label']}: {_number(fields)}  [{_provenance(fields)}]" for fields in result["metrics"].values()]
    lines += [f"{name}: left out, {reason}" for name, reason in result["skipped"].items()]
    lines += [f"warning: {text}" for text in result["warnings"]]
    return "\n".join(lines)


def side(role: str, count: int | None, source: str) -> str:
    """Number and source of a side's images, in short."""
    size = "N not recorded" if count is None else f"N={count}"
    return f"{role}: {size}{'' if source == COMPUTED else f', {source}'}"


def _number(fields: Mapping[str, Any]) -> str:
    spread = "" if fields["std"] is None else f" +- {fields['std']:.2g}"
    return f"{fields['value']:.6g}{spread}"


def _provenance(fields: Mapping[str, Any]) -> str:
    parts = [side("samples", fields["sample_count"], fields["sample_source"])]
    if fields["reference_source"]:
        parts.append(side("reference", fields["reference_count"], fields["reference_source"]))
    extractor = fields["extractor"] or "extractor not recorded"
    return "; ".join([*parts, f"{extractor}, resize {fields['resize']}" if fields["resize"] else extractor])
