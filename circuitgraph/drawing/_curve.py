"""The faithfulness curve as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitgraph._errors import FileError
from circuitgraph.files import check_place, write_bytes

if TYPE_CHECKING:
    from circuitgraph.evaluation import FaithfulnessCurve, Point

FORMATS = ("svg", "pdf", "png")
_INK = {"signed": "#0072b2", "absolute": "#d55e00"}  # told apart with any colour vision


def plot_format(path: str | Path) -> str:
    """The format that a name asks for, if a file can be written there. Raises `FileError`."""
    suffix = Path(path).suffix.lower().lstrip(".")
    if suffix not in FORMATS:
        raise FileError(f"cannot plot into {path}: expected a name that ends in one of {', '.join('.' + name for name in FORMATS)}")
    check_place(path)
    return suffix


def plot_curve(curve: FaithfulnessCurve, path: str | Path, *, title: str = "", dpi: int = 200) -> Path:
    """Draw faithfulness against size, on a linear and on a log axis, with both areas; SVG, PDF or PNG by the suffix. Raises `FileError`.

    The same picture for the same curve: no date, no random ids.
    """
    suffix = plot_format(path)
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "circuitgraph", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        linear, log = figure.subplots(1, 2, sharey=True)
        _draw(linear, curve, "linear", f"CPR {curve.cpr.value:.3f} (signed), CMD {curve.cmd.value:.3f} (absolute)")
        _draw(log, curve, "log", f"CPR {curve.cpr_log.value:.3f} (signed), CMD {curve.cmd_log.value:.3f} (absolute)")
        linear.set_ylabel("faithfulness (1 is the model)")
        linear.legend(frameon=False)
        figure.suptitle(title)
        content = io.BytesIO()
        stamp = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[suffix]
        figure.savefig(content, format=suffix, dpi=dpi, metadata=stamp)
    return write_bytes(path, content.getvalue())


def _draw(axes: Any, curve: FaithfulnessCurve, scale: str, title: str) -> None:
    for name, points in (("signed", curve.signed), ("absolute", curve.absolute)):
        shown = [point for point in points if scale == "linear" or point.fraction > 0]
        x, f = [point.fraction for point in shown], [point.faithfulness.value for point in shown]
        axes.plot(x, f, color=_INK[name], marker="o", markersize=3, label=f"{name} ranking")
        axes.fill_between(x, *_band(shown), color=_INK[name], alpha=0.15, linewidth=0)
    axes.axhline(1.0, color="#888888", linewidth=0.8, linestyle="--")
    axes.axhline(0.0, color="#888888", linewidth=0.8)
    axes.set_xscale(scale)
    axes.set_xlabel("fraction of the edges" + (", log axis" if scale == "log" else ""))
    axes.set_title(title, fontsize="medium")


def _band(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """The ends of the intervals; the values themselves where there is none."""
    intervals = [point.faithfulness.interval or (point.faithfulness.value,) * 2 for point in points]
    return [low for low, _ in intervals], [high for _, high in intervals]
