"""Results as lines of text, in the wording of guided-diffusion's evaluator where the features are Inception's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cm.io.terminal import printable
from evaluations.metrics.base import COMPUTED

WORST = 5                                                   # classes that are named


def report(result: Mapping[str, Any]) -> str:
    """The lines that evaluator.py and th_evaluator.py print, from the content of their JSON file."""
    lines = [f"reference: {result['reference']}", f"samples: {result['samples']}"]
    if result["extractor"]:
        lines.append("extractor: {name} ({id}), resize: {resize}".format(**result["extractor"]))
    for fields in result["metrics"].values():
        lines += [f"{fields['label']}: {_number(fields)}  [{_provenance(fields)}]", *_worst(fields)]
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


def _worst(fields: Mapping[str, Any]) -> list[str]:
    """The classes with the least values; no line where there are not several classes."""
    by_class = fields.get("by_class") or {}
    if len(by_class) < 2:
        return []
    worst = sorted(by_class.items(), key=lambda item: item[1]["value"])[:WORST]
    shown = ", ".join(f"{printable(name)} {share['value']:.1%} of {share['count']}" for name, share in worst)
    return [f"  worst of {len(by_class)} classes: {shown}"]


def _provenance(fields: Mapping[str, Any]) -> str:
    parts = [side("samples", fields["sample_count"], fields["sample_source"])]
    if fields["reference_source"]:
        parts.append(side("reference", fields["reference_count"], fields["reference_source"]))
    extractor = fields["extractor"] or "extractor not recorded"
    return "; ".join([*parts, f"{extractor}, resize {fields['resize']}" if fields["resize"] else extractor])
