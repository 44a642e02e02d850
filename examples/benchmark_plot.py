"""Draws the throughput of ``benchmark.py``: samples/s of each sender, for each case. Needs matplotlib."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import torch

# The senders to draw from the table of throughput. All others of the table of others are drawn.
SENDERS = ("sink", "client", "stock", "raw")
TITLES = {
    "null": "to a peer that only reads and acks",
    "real": "to a real server that is drained",
    "others": "beside other ways to another process",
}
COLOURS = {"sink": "#d1495b", "client": "#edae49", "raw": "#8d99ae"}
OTHER_COLOUR = "#2f6690"
TEXT = "#333333"
# Characters of the title that fit into an inch.
CHARACTERS = 13
# In inches: height of a line, of the head of a case, of a panel's title and axis, and of the title; width of a panel.
LINE, HEAD, FRAME, TITLE, WIDTH = 0.2, 0.36, 0.9, 0.75, 4.6


class Line(NamedTuple):
    """The samples per second of one sender."""

    case: str
    sender: str
    rate: float


def panels(results: dict[str, list[dict[str, Any]]]) -> dict[str, list[Line]]:
    """Return the lines to draw, by panel title."""
    found: dict[str, list[Line]] = {}
    for row in [*results.get("throughput", []), *results.get("others", [])]:
        peer = row.get("peer", "others")
        if peer == "others" or row["sender"] in SENDERS:
            sample = re.sub(r"^(\d+)(K?B)", r"\1 \2", row["case"])
            line = Line(f"{sample}, B = {row['B']}", row["sender"], row["samples_s"])
            found.setdefault(TITLES[peer], []).append(line)
    return found


def conditions() -> list[str]:
    """Say in a few lines what is drawn and what the figures depend on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    command = shlex.join(["python", f"examples/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    echo = importlib.metadata.version("id-echo")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, id-echo {echo}"
    return ["Samples per second: median of the rounds, log scale", f"{cores} CPUs, {versions}", command]


def short(rate: float) -> str:
    """Format a rate with three digits and a unit."""
    for unit, name in ((1e6, " M"), (1e3, " k")):
        if rate >= unit:
            return f"{rate / unit:.3g}{name}"
    return f"{rate:.3g}"


def draw_panel(axes: Any, title: str, lines: list[Line]) -> float:
    """Draw one panel and return its height in inches."""
    depth, ticks, last = 0.0, [], None
    for line in lines:
        if line.case != last:
            depth += HEAD if last else HEAD - LINE / 2
            axes.text(
                0, depth - LINE, line.case, weight="bold", size=9, va="center", transform=axes.get_yaxis_transform()
            )
            last = line.case
        colour = COLOURS.get(line.sender, OTHER_COLOUR)
        axes.axhline(depth, color="#eeeeee", linewidth=0.8, zorder=0)
        axes.plot(line.rate, depth, "o", color=colour, markersize=7 if line.sender == "sink" else 5)
        axes.annotate(
            short(line.rate), (line.rate, depth), (7, 0), textcoords="offset points", va="center", size=8, color=TEXT
        )
        ticks.append(depth)
        depth += LINE
    axes.set_yticks(ticks, [line.sender for line in lines], size=9)
    axes.set_ylim(depth, -HEAD / 2)
    axes.set_title(title, size=10, loc="left")
    axes.set_xlabel("samples/s", size=9)
    axes.set_xscale("log")
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.tick_params(length=0, labelsize=9)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    return depth


def draw(path: str, results: dict[str, list[dict[str, Any]]]) -> None:
    from matplotlib.figure import Figure

    drawn = panels(results)
    rates = [line.rate for lines in drawn.values() for line in lines]
    figure = Figure(layout="constrained")
    columns = figure.subplots(1, len(drawn), squeeze=False)[0]
    heights = [draw_panel(axes, title, lines) for axes, (title, lines) in zip(columns, drawn.items(), strict=True)]
    for axes in columns:
        axes.set_ylim(max(heights), -HEAD / 2)
        axes.set_xlim(min(rates) / 1.5, max(rates) * 6)  # leaves room for the last figure
    width = WIDTH * len(drawn)
    figure.set_size_inches(width, max(heights) + FRAME + TITLE)
    title = [line for words in conditions() for line in textwrap.wrap(words, round(CHARACTERS * width))]
    figure.suptitle("\n".join(title), x=0.01, ha="left", size=9)
    figure.savefig(path, format="png", dpi=150)
