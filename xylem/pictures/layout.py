"""Where the boxes of a flow lie: rows from top to bottom, so that every edge goes down (Sugiyama et al. 1981).

Lengths are inches, y grows downwards. An edge over several rows has a lane of its own, straight through all of them;
the order within rows has few crossings; x makes edges straight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.optimize import linprog

from xylem.pictures.flow import Flow

ROW_GAP, SIDE_GAP, PAD = 0.31, 0.13, 0.07  # between rows, between boxes, around what belongs to one module
LANE = 0.06  # the width of an edge that passes a row
SWEEPS = 24

# What lies in a row: a node by its number, or an edge that passes by its own, as ("node", 3) or ("edge", 5).
Item = tuple[str, int]


class Box(NamedTuple):
    """A rectangle by its middle and its size."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Plan:
    """Boxes of the nodes, the points that each edge goes through, and the size of all."""

    boxes: tuple[Box, ...]
    routes: tuple[tuple[tuple[float, float], ...], ...]
    width: float
    height: float


def plan(flow: Flow, sizes: Sequence[tuple[float, float]]) -> Plan:
    """Lay out a flow whose nodes have these widths and heights."""
    rows = rows_of(flow)
    grid = _ordered(flow, rows)
    widths = {item: sizes[item[1]][0] if item[0] == "node" else LANE for row in grid for item in row}
    xs = _across(flow, rows, grid, widths)
    left = min(xs[item] - widths[item] / 2 for item in xs)
    right = max(xs[item] + widths[item] / 2 for item in xs)
    heights = [max(sizes[number][1] for kind, number in row if kind == "node") for row in grid]
    tops = [sum(heights[:number]) + ROW_GAP * number for number in range(len(grid))]
    boxes = [
        Box(xs["node", node] - left, tops[rows[node]] + heights[rows[node]] / 2, width, height)
        for node, (width, height) in enumerate(sizes)
    ]
    routes = []
    for number, (source, target) in enumerate(flow.edges):
        start, end = boxes[source], boxes[target]
        points = [(start.x, start.y + start.height / 2)]
        if ("edge", number) in xs:
            x, first, last = xs["edge", number] - left, rows[source] + 1, rows[target] - 1
            points += [(x, tops[first]), (x, tops[last] + heights[last])]
        routes.append([*points, (end.x, end.y - end.height / 2)])
    _part_ends(flow, boxes, routes, rows)
    return Plan(tuple(boxes), tuple(map(tuple, routes)), right - left, tops[-1] + heights[-1])


def rows_of(flow: Flow) -> list[int]:
    """The row of each node: as high as can be for what the longest way begins with and all that comes of it, as low as
    its readers let it for everything else."""
    rows = [0] * len(flow.nodes)
    edges = sorted(flow.edges, key=lambda edge: edge[1])
    for source, target in edges:
        rows[target] = max(rows[target], rows[source] + 1)
    way = [rows.index(max(rows))]
    while above := [source for source, target in edges if target == way[-1] and rows[source] == rows[target] - 1]:
        way.append(above[0])
    fixed = {way[-1]}
    for source, target in edges:
        fixed |= {target} if source in fixed else set()
    for node in reversed(range(len(rows))):
        readers = [rows[target] for source, target in edges if source == node]
        if readers and node not in fixed:
            rows[node] = min(readers) - 1
    return [row - min(rows) for row in rows]


# --- order within rows ------------------------------------------------------------------------------------------------


def _ordered(flow: Flow, rows: list[int]) -> list[list[Item]]:
    """Items row by row, sorted by the mean place of their neighbours as long as that takes crossings away."""
    grid: list[list[Item]] = [[] for _ in range(max(rows) + 1)]
    links: list[dict[Item, list[Item]]] = [{} for _ in grid]  # of each row, to items of the next
    for number, (source, target) in enumerate(flow.edges):
        passed = range(rows[source] + 1, rows[target])
        for row in passed:
            grid[row].append(("edge", number))
        chain = [("node", source), *[("edge", number)] * len(passed), ("node", target)]
        for step, (above, below) in enumerate(pairwise(chain)):
            links[rows[source] + step].setdefault(above, []).append(below)
    for node, row in enumerate(rows):
        grid[row].append(("node", node))
    best, least = [list(row) for row in grid], _crossings(grid, links)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for number in range(1, len(grid)) if down else reversed(range(len(grid) - 1)):
            beside = grid[number - 1 if down else number + 1]
            near: dict[Item, list[int]] = {item: [] for item in grid[number]}
            for above, belows in links[number - 1 if down else number].items():
                for below in belows:
                    here, there = (below, above) if down else (above, below)
                    near[here].append(beside.index(there))
            grid[number].sort(key=lambda item, near=near: sum(near[item]) / len(near[item]) if near[item] else -1.0)
        if (crossings := _crossings(grid, links)) < least:
            best, least = [list(row) for row in grid], crossings
    return best


def _crossings(grid: list[list[Item]], links: list[dict[Item, list[Item]]]) -> int:
    total = 0
    for row, below, down in zip(grid, grid[1:], links, strict=False):
        ends = [(place, below.index(other)) for place, item in enumerate(row) for other in down.get(item, [])]
        total += sum(a < c and b > d for a, b in ends for c, d in ends)
    return total


# --- x ----------------------------------------------------------------------------------------------------------------


def _across(flow: Flow, rows: list[int], grid: list[list[Item]], widths: dict[Item, float]) -> dict[Item, float]:
    """x of every node and lane: a linear program.

    The sum of distances from each node to the middle of what it reads in the row above, and of what reads it in the row
    below, is least, and with a smaller weight that of every edge; neighbours in a row keep ``SIDE_GAP``. Of neighbours
    in other rows those of the same module count where there are any.
    """
    items = list(widths)
    at = {item: number for number, item in enumerate(items)}
    pulls: list[tuple[float, dict[int, float]]] = []  # weight, and a combination of x that shall be 0
    for node in range(len(flow.nodes)):
        for step, ends in ((-1, [s for s, t in flow.edges if t == node]), (1, [t for s, t in flow.edges if s == node])):
            near = [end for end in ends if rows[end] == rows[node] + step]
            own = [end for end in near if flow.nodes[end].owner == flow.nodes[node].owner]
            if near := own or near:
                middle = {at["node", end]: -1.0 / len(near) for end in near}
                pulls.append((2.0 if own else 1.0, {at["node", node]: 1.0} | middle))
    for number, (source, target) in enumerate(flow.edges):
        if ("edge", number) in at:
            pulls += [(0.4, {at["node", end]: 1.0, at["edge", number]: -1.0}) for end in (source, target)]
        else:
            pulls.append((0.2, {at["node", source]: 1.0, at["node", target]: -1.0}))
    apart = [(at[a], at[b], (widths[a] + widths[b]) / 2 + SIDE_GAP) for row in grid for a, b in pairwise(row)]
    grounds, edges = _grounds(flow, grid, widths, at, len(items))
    for limits in ([*apart, *grounds], apart):  # grounds that cannot lie apart may overlap
        if (found := _least(pulls, limits, len(items) + edges)) is not None:
            return dict(zip(items, found, strict=False))
    raise ValueError(f"{flow.name}: two edges would have to cross in straight lanes")


def _grounds(
    flow: Flow, grid: list[list[Item]], widths: dict[Item, float], at: dict[Item, int], first: int
) -> tuple[list[tuple[int, int, float]], int]:
    """What keeps others off the ground of a module, whose left and right edges are variables from ``first`` on."""
    limits, number = [], first
    for owner in sorted({node.owner for node in flow.nodes if node.owner}):
        mine = {("node", place) for place, node in enumerate(flow.nodes) if node.owner == owner}
        inner = {("edge", place) for place, (a, b) in enumerate(flow.edges) if {("node", a), ("node", b)} <= mine}
        inside = sorted(mine | inner)
        limits += [(number, at[item], widths[item] / 2 + PAD) for item in inside if item in at]
        limits += [(at[item], number + 1, widths[item] / 2 + PAD) for item in inside if item in at]
        for row in grid:
            places = [place for place, item in enumerate(row) if item in inside]
            for place, item in enumerate(row) if places else ():
                if place > max(places):
                    limits.append((number + 1, at[item], widths[item] / 2 + PAD))
                elif place < min(places):
                    limits.append((at[item], number, widths[item] / 2 + PAD))
        number += 2
    return limits, number - first


def _least(
    pulls: list[tuple[float, dict[int, float]]], apart: list[tuple[int, int, float]], count: int
) -> list[float] | None:
    """The non-negative variables for which the weighted sum of the absolute ``pulls`` is least, where each
    (a, b, gap) keeps b at least ``gap`` above a; None where that cannot be."""
    matrix, bounds = np.zeros((2 * len(pulls) + len(apart), count + len(pulls))), np.zeros(2 * len(pulls) + len(apart))
    for number, (_, parts) in enumerate(pulls):  # |sum| <= one more variable each
        matrix[2 * number, list(parts)] = list(parts.values())
        matrix[2 * number + 1] = -matrix[2 * number]
        matrix[2 * number : 2 * number + 2, count + number] = -1.0
    for number, (a, b, gap) in enumerate(apart, 2 * len(pulls)):
        matrix[number, [a, b]] = 1.0, -1.0
        bounds[number] = -gap
    found = linprog([0.0] * count + [weight for weight, _ in pulls], A_ub=matrix, b_ub=bounds)
    return None if found.x is None else found.x.tolist()


def _part_ends(flow: Flow, boxes: list[Box], routes: list[list[tuple[float, float]]], rows: list[int]) -> None:
    """Set the ends of edges that go into one box side by side, in the order in which they come; a lane goes into a
    sum from its side, where nothing is in the way."""
    for node, box in enumerate(boxes):
        into = [number for number, (_, target) in enumerate(flow.edges) if target == node]
        for number in list(into):
            x = routes[number][-2][0]
            row = [one for other, one in enumerate(boxes) if rows[other] == rows[node] and other != node]
            clear = all(not min(x, box.x) < one.x < max(x, box.x) for one in row)
            if box.width == box.height and len(routes[number]) > 2 and clear and abs(x - box.x) > box.width:
                side = box.width / 2 if x > box.x else -box.width / 2
                routes[number][-2:] = [(x, box.y), (box.x + side, box.y)]
                into.remove(number)
        into.sort(key=lambda number: routes[number][-2][0])
        gap = min(0.2, 0.7 * box.width / max(1, len(into) - 1)) if len(into) > 1 else 0.0
        for place, number in enumerate(into):
            routes[number][-1] = (box.x + gap * (place - (len(into) - 1) / 2), routes[number][-1][1])
