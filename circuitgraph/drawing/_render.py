"""DOT to SVG, HTML, PDF and PNG: with the Graphviz in pygraphviz's wheels, else with the `dot` on the PATH.

Graphviz runs in a process of its own: it writes warnings to the terminal, is not safe in threads, and a crash of it is not ours.
"""

from __future__ import annotations

import html
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from circuitgraph._circuit import Circuit
from circuitgraph._errors import CircuitGraphError, FileError
from circuitgraph.drawing._dot import to_dot
from circuitgraph.drawing._joint import joint_dot
from circuitgraph.files import write_bytes

if TYPE_CHECKING:
    from circuitgraph.drawing._plan import Detail

FORMATS = ("svg", "html", "pdf", "png", "dot", "gv")

_TIMEOUT = 120
_PROGRAM = """
import sys, pygraphviz
dot, suffix, dpi = sys.stdin.buffer.read().decode(), sys.argv[1], sys.argv[2]
graph = pygraphviz.AGraph(string=dot)
if suffix == "png":
    graph.graph_attr["dpi"] = dpi
sys.stdout.buffer.write(graph.draw(format=suffix, prog="dot"))
"""


def render(
    circuit: Circuit,
    path: str | Path,
    *,
    title: str | None = None,
    detail: Detail = "auto",
    dpi: int = 200,
    labels: Mapping[str, str] | None = None,
) -> Path:
    """Draw a circuit into a file, whose suffix says the format; see `Circuit.render`. Raises `FileError`."""
    return write_picture(path, lambda: to_dot(circuit, title=title, detail=detail, labels=labels), dpi=dpi)


def render_joint(circuits: Mapping[str, Circuit], path: str | Path, *, title: str | None = None, detail: Detail = "auto") -> Path:
    """Draw several circuits of one graph into one picture, a line's colour saying who has it. Raises `FileError`."""
    return write_picture(path, lambda: joint_dot(circuits, title=title, detail=detail))


def write_picture(path: str | Path, source: Callable[[], str], *, dpi: int = 200) -> Path:
    """DOT text into a file, whose suffix says the format; a wrong one is refused before anything is laid out. Raises `FileError`."""
    path = Path(path)
    suffix = path.suffix.lower().lstrip(".")
    if suffix not in FORMATS:
        raise FileError(f"cannot draw into {path}: expected a name that ends in one of {', '.join('.' + name for name in FORMATS)}")
    if suffix == "html":
        return write_bytes(path, _page(render_dot(source(), "svg"), path.stem))
    return write_bytes(path, source().encode() if suffix in ("dot", "gv") else render_dot(source(), suffix, dpi=dpi))


def _page(svg: bytes, title: str) -> bytes:
    """A page of HTML with the picture in it and nothing to load; tooltips are the picture's own."""
    picture = svg[svg.index(b"<svg") :]
    head = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
    return head.encode() + b"<style>body{margin:0;text-align:center}svg{max-width:100%;height:auto}</style>\n" + picture + b"</html>\n"


def render_dot(source: str, suffix: str, *, dpi: int = 200) -> bytes:
    """DOT text as SVG, PDF or PNG. Prints nothing. Raises `CircuitGraphError` that says how to get a Graphviz."""
    reason = "none found"
    for command in _commands(suffix, dpi):
        try:
            done = subprocess.run(command, input=source.encode(), capture_output=True, timeout=_TIMEOUT, check=False, env=_environment())
        except subprocess.TimeoutExpired as error:
            raise CircuitGraphError(
                f"Graphviz found no layout in {_TIMEOUT} s; draw fewer edges, for example circuit.top(100), or with detail='layers'"
            ) from error
        except OSError as error:
            reason = f"{command[0]}: {error.strerror}"
            continue
        if done.returncode == 0 and done.stdout:
            return done.stdout
        reason = (done.stderr.decode(errors="replace").strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
    raise CircuitGraphError(
        f"no working Graphviz to draw with ({reason}); `pip install 'pygraphviz>=2'`, whose wheels carry one, or put `dot` on the PATH, "
        "or draw into a .dot file"
    )


def _commands(suffix: str, dpi: int) -> list[list[str]]:
    """The ways to run Graphviz here, best first."""
    commands = []
    if importlib.util.find_spec("pygraphviz") is not None and sys.executable:
        commands.append([sys.executable, "-P", "-c", _PROGRAM, suffix, str(dpi)])
    if found := shutil.which("dot"):
        commands.append([found, f"-T{suffix}", *([f"-Gdpi={dpi}"] if suffix == "png" else [])])
    return commands


def _environment() -> dict[str, str]:
    """The child imports from where we do."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
