"""Rows of text in columns, for results that are printed."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """One line a row, every column as wide as its widest cell.

    >>> print(aligned([("edge", "score"), ("m1->logits", "2.19")]))
    edge        score
    m1->logits  2.19
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
