"""Where the boxes of a flow lie: rows from top to bottom, so that every edge goes down (Sugiyama et al. 1981).

Lengths are inches, y grows downwards. A node lies one row below the lowest that it reads; an edge over several rows gets
a place in each; the order within rows has few crossings; x is where edges are short and straight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from xylem.pictures.flow import Flow

ROW_GAP, SIDE_GAP, LANE = 0.30, 0.16, 0.10  # between rows, between boxes, the width of an edge that passes a row
SWEEPS = 24


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


class _Place(NamedTuple):
    """What holds a place in a row: a node, or an edge that passes it."""

    node: int | None
    edge: int | None


def plan(flow: Flow, sizes: Sequence[tuple[float, float]]) -> Plan:
    """Lay out a flow whose nodes have these widths and heights."""
    rows = _rows(flow)
    grid: list[list[_Place]] = [[] for _ in range(max(rows) + 1)]
    links: dict[_Place, dict[_Place, int]] = {}
    chains: list[list[_Place]] = []
    for number, (source, target) in enumerate(flow.edges):
        passing = [_Place(None, number) for _ in range(rows[source] + 1, rows[target])]
        # One object a row: equal by value, they are told apart by the row that they lie in.
        chains.append([_Place(source, None), *passing, _Place(target, None)])
    keyed = [[(rows[source] + step, place) for step, place in enumerate(chain)] for (source, _), chain in
             zip(flow.edges, chains, strict=True)]  # fmt: skip
    order = _order(flow, rows, grid, keyed, links)
    widths = {place: sizes[place[1].node][0] if place[1].node is not None else LANE for row in order for place in row}
    xs = _across(order, keyed, widths)
    heights = [max((sizes[p.node][1] for _, p in row if p.node is not None), default=0.0) for row in order]
    tops = [sum(heights[:number]) + ROW_GAP * number for number in range(len(order))]
    left = min(xs[place] - widths[place] / 2 for place in xs)
    right = max(xs[place] + widths[place] / 2 for place in xs)
    boxes = []
    for node, (width, height) in enumerate(sizes):
        row = rows[node]
        boxes.append(Box(xs[row, _Place(node, None)] - left, tops[row] + heights[row] / 2, width, height))
    routes = [_route(chain, xs, tops, heights, boxes, left) for chain in keyed]
    return Plan(tuple(boxes), tuple(_ports(flow, boxes, routes)), right - left, tops[-1] + heights[-1])


def _rows(flow: Flow) -> list[int]:
    """The row of each node: as high as can be, but what reads nothing just above what reads it."""
    rows = [0] * len(flow.nodes)
    for source, target in sorted(flow.edges, key=lambda edge: edge[1]):
        rows[target] = max(rows[target], rows[source] + 1)
    for node in reversed(range(len(rows))):
        if not any(target == node for _, target in flow.edges):
            rows[node] = max(0, min(rows[target] for source, target in flow.edges if source == node) - 1)
    return rows


def _order(flow, rows, grid, keyed, links):
    """Places row by row, reordered by the mean place of their neighbours while that takes crossings away."""
    for chain in keyed:
        for place in chain[1:-1]:
            grid[place[0]].append(place)
    for node, row in enumerate(rows):
        grid[row].append((row, _Place(node, None)))
    for chain in keyed:
        for above, below in zip(chain, chain[1:], strict=False):
            links.setdefault(above, {})[below] = 1
            links.setdefault(below, {})[above] = 1
    best, least = [list(row) for row in grid], _crossings(grid, links)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for number in range(len(grid)) if down else reversed(range(len(grid))):
            beside = number - 1 if down else number + 1
            if not 0 <= beside < len(grid):
                continue
            at = {place: index for index, place in enumerate(grid[beside])}

            def middle(place, at=at):
                near = [at[other] for other in links.get(place, {}) if other in at]
                return sum(near) / len(near) if near else -1.0

            grid[number].sort(key=middle)
        if (crossings := _crossings(grid, links)) < least:
            best, least = [list(row) for row in grid], crossings
    return best


def _crossings(grid, links) -> int:
    total = 0
    for row, below in zip(grid, grid[1:], strict=False):
        at = {place: index for index, place in enumerate(below)}
        ends = [sorted(at[other] for other in links.get(place, {}) if other in at) for place in row]
        flat = [(index, end) for index, one in enumerate(ends) for end in one]
        total += sum(a < c and b > d for a, b in flat for c, d in flat)
    return total


def _across(order, keyed, widths) -> dict:
    """x of every place: each is drawn to its neighbours, edges that pass rows most, and none overlap."""
    pulls: dict = {place: {} for row in order for place in row}
    for chain in keyed:
        for above, below in zip(chain, chain[1:], strict=False):
            weight = 1 + 3 * (above[1].node is None) * (below[1].node is None) + (above[1].node is None)
            pulls[above][below] = pulls[below][above] = weight
    xs = {}
    for row in order:
        x = -sum(widths[place] + SIDE_GAP for place in row) / 2
        for place in row:
            xs[place] = x + (widths[place] + SIDE_GAP) / 2
            x += widths[place] + SIDE_GAP
    for sweep in range(60):
        for row in order if sweep % 2 == 0 else order[::-1]:
            wanted = []
            for place in row:
                near = pulls[place]
                total = sum(near.values())
                wanted.append(sum(xs[other] * weight for other, weight in near.items()) / total if total else xs[place])
            for place, x in zip(row, apart(wanted, [widths[place] for place in row]), strict=True):
                xs[place] = x
    return xs


def apart(wanted: Sequence[float], widths: Sequence[float]) -> list[float]:
    """The places nearest to the wanted ones, in this order, at which boxes of these widths keep ``SIDE_GAP``.

    Least squares: after the widths are taken off it is isotonic regression, solved by pooling neighbours.
    """
    offsets, x = [], 0.0
    for number, width in enumerate(widths):
        x += width / 2 + (widths[number - 1] / 2 + SIDE_GAP if number else 0.0)
        offsets.append(x)
    pools: list[list[float]] = []  # sum, count
    for place, offset in zip(wanted, offsets, strict=True):
        pools.append([place - offset, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            last = pools.pop()
            pools[-1] = [pools[-1][0] + last[0], pools[-1][1] + last[1]]
    means = [total / count for total, count in pools for _ in range(int(count))]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]


def _route(chain, xs, tops, heights, boxes, left) -> list[tuple[float, float]]:
    """An edge's points: out of its source, straight through every row that it passes, to its target."""
    source, target = boxes[chain[0][1].node], boxes[chain[-1][1].node]
    points = [(source.x, source.y + source.height / 2)]
    for row, place in chain[1:-1]:
        x = xs[row, place] - left
        points += [(x, tops[row]), (x, tops[row] + heights[row])]
    return [*points, (target.x, target.y - target.height / 2)]


def _ports(flow: Flow, boxes: list[Box], routes: list[list[tuple[float, float]]]):
    """Ends of edges that go into one box, set side by side in the order in which they come."""
    for node, box in enumerate(boxes):
        into = [number for number, (_, target) in enumerate(flow.edges) if target == node]
        into.sort(key=lambda number: routes[number][-2][0])
        gap = min(0.2, 0.6 * box.width / max(1, len(into) - 1)) if len(into) > 1 else 0.0
        for place, number in enumerate(into):
            routes[number][-1] = (box.x + gap * (place - (len(into) - 1) / 2), routes[number][-1][1])
    return [tuple(points) for points in routes]
