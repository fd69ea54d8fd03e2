"""What flows where in a network, read off the program that jax traces of it.

Every equation of a traced program knows which of its operands are parameters and through which functions of this
package it came. ``of_model`` gathers equations to what a reader calls a step, and asks no family anything:

- a module that calls no other (a dense layer, a norm) is one node, named by the path of the parameters that it reads;
- a function that calls no module (``attend``, ``rotate``) is one node, named as the function;
- what stands in a line of a module that calls others (a residual sum) is a node of its own;
- what only changes shape or type is no node;
- the scan over layers is one node, and the flow of one layer is a ``Flow`` of its own.

``of_function`` makes a node of every equation, and shows one step of a scan: the gates of a cell.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from xylem.models import build
from xylem.models.config import ModelConfig, Seq2SeqConfig
from xylem.models.settings import Compute
from xylem.pictures.program import (
    RESHAPING,
    SYMBOLS,
    Frame,
    assigned,
    bodies,
    callers,
    common,
    frames,
    is_call,
    operation,
    parted,
    within,
)

Kind = Literal["input", "output", "module", "function", "join", "layers"]


@dataclass(frozen=True)
class Node:
    """One step.

    Attributes:
        title: what the code calls it.
        owner: path of the module whose ``__call__`` holds it, from the model or the layer on; empty for these.
        parameters: those that it reads, path and shape; paths go from the model on, in a layer's flow from the layer.
        note: what it is made of, where its title does not say it.
    """

    kind: Kind
    title: str
    owner: str = ""
    parameters: tuple[tuple[str, tuple[int, ...]], ...] = ()
    note: str = ""

    @property
    def lines(self) -> tuple[str, ...]:
        """What is told of its parameters: a module's by their last names, or just the shape where it has but one."""
        shapes = [" × ".join(map(str, shape)) for _, shape in self.parameters]  # noqa: RUF001
        names = [path for path, _ in self.parameters]
        if self.kind == "module":
            names = [path.rpartition("/")[2] for path in names] if len(names) > 1 else [""]
        if self.kind == "join":
            return tuple(line for pair in zip(names, shapes, strict=True) for line in pair)
        return tuple(f"{name} {shape}".strip() for name, shape in zip(names, shapes, strict=False))

    @property
    def path(self) -> str:
        """The title behind the owner's path."""
        return f"{self.owner}/{self.title}" if self.owner else self.title


@dataclass(frozen=True)
class Flow:
    """Steps and what passes between them; ``edges`` are pairs of places in ``nodes``.

    Attributes:
        layers: of each scan over layers, in the order of the program, the flow of one of them.
    """

    name: str
    nodes: tuple[Node, ...]
    edges: tuple[tuple[int, int], ...]
    layers: tuple[Flow, ...] = ()

    def __str__(self) -> str:
        """All that a picture shows, a line a node: its number, what it is, and the nodes that it reads."""
        lines = [f"[{self.name}]"]
        for number, node in enumerate(self.nodes):
            reads = " ".join(str(a) for a, b in self.edges if b == number)
            parts = [f"{number} {node.kind} {node.path}", *node.lines, node.note, f"<- {reads}" * bool(reads)]
            lines.append("; ".join(part for part in parts if part))
        return "\n".join([*lines, *map(str, self.layers)])


def of_model(config: ModelConfig, name: str, tokens: int = 8) -> Flow:
    """The flow of a model of any family, traced with shapes alone: no weight is made, whatever its size."""
    module = build(config.with_compute(Compute(kernels="plain", layers="scan")))
    ids = {"tokens": jax.ShapeDtypeStruct((1, tokens), jnp.int32)}
    if isinstance(config, Seq2SeqConfig):
        ids |= {"decoder_tokens": jax.ShapeDtypeStruct((1, tokens), jnp.int32)}

    def forward(inputs: dict[str, Any]) -> dict[str, Any]:
        out: Any = module.apply({"params": inputs["params"]}, **{name: inputs[name] for name in ids})
        results = {name: getattr(out, name, None) for name in ("logits", "pair_logits")}
        return {name: value for name, value in results.items() if value is not None}

    params = jax.eval_shape(module.init, jax.random.key(0), **ids)["params"]
    # jax has no name of its own for some activations: the config's is shown.
    activation = getattr(config.decoder if isinstance(config, Seq2SeqConfig) else config, "activation", "")
    words = {"activation": activation, "gated": activation}
    return _trace(forward, {"params": params, **ids}, name, detail=False, words=words)


def of_function(function: Callable[[dict[str, Any]], dict[str, Any]], inputs: dict[str, Any], name: str) -> Flow:
    """The flow of a function of named arrays, an equation a node; ``inputs`` are arrays or their shapes."""
    return _trace(function, inputs, name, detail=True, words={})


# --- gathering --------------------------------------------------------------------------------------------------------


@dataclass
class _Group:
    """Equations that make one node, while they are gathered."""

    key: Any
    kind: Kind
    path: list[Frame]
    owner: str = ""
    title: str = ""
    note: str = ""
    reads: dict[int, None] = field(default_factory=dict)  # other groups, in the order of reading
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    operations: list[str] = field(default_factory=list)
    changes: bool = False  # more than shapes and types


class _Origin(NamedTuple):
    """Where a value came from: a group, or a parameter; ``label`` where the code names it apart."""

    group: int | None = None
    weight: str | None = None
    shape: tuple[int, ...] = ()  # of the parameter
    label: str = ""


def _trace(
    function: Callable[..., Any], inputs: dict[str, Any], name: str, detail: bool, words: dict[str, str]
) -> Flow:
    """Trace a function of named arrays, those under ``params/`` being parameters, and read the program. ``words`` tell
    what functions of some names do."""
    calling: set[str] = set()
    with nn.intercept_methods(callers(calling)):
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(inputs)
    reader = _Reader(calling, detail, words)
    for path, variable in zip(_paths(inputs), closed.jaxpr.invars, strict=True):
        if path.startswith("params/"):
            reader.origins[variable] = _Origin(weight=path.removeprefix("params/"), shape=variable.aval.shape)
        else:
            reader.origins[variable] = reader.add(_Group(None, "input", [], title=path))
    return reader.read(closed.jaxpr, name, [], _paths(shapes))


def _paths(tree: Any) -> list[str]:
    """The path of every leaf, in jax's order."""
    keys = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in keys]


class _Reader:
    """Reads one program, equation by equation."""

    def __init__(self, calling: set[str], detail: bool, words: dict[str, str]):
        self.calling, self.detail, self.words = calling, detail, words
        self.groups: list[_Group] = []
        self.same: list[int] = []  # the group that each has become part of
        self.origins: dict[Any, _Origin] = {}
        self.flows: list[Flow] = []
        self.results: dict[Any, int] = {}  # by statement and variable, the last operation of it so far

    def add(self, group: _Group) -> _Origin:
        """Begin a group; returns what comes from it."""
        self.groups.append(group)
        self.same.append(len(self.same))
        return _Origin(group=len(self.groups) - 1)

    def begin(self, key: Any, kind: Kind, equation: Any, path: list[Frame]) -> int:
        """The number of a new group that an equation is the first of."""
        self.add(_Group(key, kind, path, self.owner(equation, path)))
        return len(self.groups) - 1

    def find(self, group: int) -> int:
        """The group that a group has become."""
        while self.same[group] != group:
            group = self.same[group]
        return group

    def read(self, program: Any, name: str, outside: list[Frame], results: list[str]) -> Flow:
        """The flow of a program; ``outside`` are the frames that led to all of it, ``results`` names of its outputs."""
        for equation in program.eqns:
            self.take(equation, within(frames(equation), outside))
        for result, variable in zip(results, program.outvars, strict=True):
            origin = self.origins.get(variable, _Origin())
            if result and origin.group is not None:
                self.add(_Group(None, "output", [], title=result, reads={origin.group: None}))
        return self.finish(name)

    def take(self, equation: Any, path: list[Frame]) -> None:
        """Add an equation to the node that it is part of."""
        primitive = equation.primitive.name
        known = [self.origins[v] for v in equation.invars if not hasattr(v, "val") and v in self.origins]
        if primitive == "scan" and path and path[-1].function in self.calling:
            return self.scan(equation, path)
        if primitive == "scan" and self.detail:
            return self.step(equation)
        unit = self.unit(path)
        if unit is None and known and (primitive in RESHAPING or operation(equation) == "+ 0"):
            return self.hand_on(known[0], equation, path)
        if unit is None and not known:
            return  # a constant
        key = (id(equation),) if self.detail else unit or tuple(frame[:2] for frame in path)
        groups = [self.find(origin.group) for origin in known if origin.group is not None]
        mine = [group for group in groups if self.groups[group].key == key]
        here = mine[0] if mine else self.begin(key, unit[0] if unit else "join", equation, path)
        for other in mine[1:]:
            if other != here:
                self.join(here, other)
        self.note(here, equation, path, known)
        for variable in equation.outvars:
            self.origins[variable] = _Origin(group=here)

    def hand_on(self, origin: _Origin, equation: Any, path: list[Frame]) -> None:
        """Let what an equation only reshapes be what it was; parts of it may have names."""
        labels = parted(path[-1]) if equation.primitive.name == "split" and path else []
        for place, variable in enumerate(equation.outvars):
            if len(variable.aval.shape) < len(origin.shape):  # the one set of weights that all layers share
                origin = origin._replace(shape=variable.aval.shape)
            self.origins[variable] = origin._replace(label=labels[place]) if labels else origin

    def unit(self, path: list[Frame]) -> tuple | None:
        """What an equation is part of: the outermost module or public function that calls no module."""
        for place, frame in enumerate(path if not self.detail else ()):
            public = is_call(frame) or not frame.function.rpartition(".")[2].startswith("_")
            if frame.function not in self.calling and public:
                calls = sum(map(is_call, path[:place]))  # sets apart a function's calls from different modules
                return ("module" if is_call(frame) else "function", frame.function, calls)
        return None

    def owner(self, equation: Any, path: list[Frame]) -> str:
        """The path of the module that holds an equation, without the module that the equation is all of."""
        classes = {frame.function.partition(".")[0] for frame in path if is_call(frame)}
        parts = re.split(r"/", str(equation.source_info.name_stack))
        parts = [part for part in parts if re.fullmatch(r"[A-Za-z_]\w*", part) and part not in classes]
        unit = self.unit(path)
        return "/".join(parts[:-1] if unit and unit[0] == "module" else parts)

    def join(self, one: int, other: int) -> None:
        """Make two groups one: they turned out to belong to the same step."""
        kept, lost = self.groups[one], self.groups[other]
        kept.reads |= lost.reads
        kept.weights |= lost.weights
        kept.operations += lost.operations
        kept.changes |= lost.changes
        kept.path = common(kept.path, lost.path)
        self.same[other] = one

    def note(self, here: int, equation: Any, path: list[Frame], known: list[_Origin]) -> None:
        """Write down what an equation adds to its node."""
        group = self.groups[here]
        group.path = common(group.path, path)
        for origin in known:
            if origin.weight is not None:
                group.weights[origin.weight] = origin.shape
            elif origin.group is not None:
                group.reads[origin.group] = None
        group.operations.append(operation(equation))
        group.changes |= equation.primitive.name not in RESHAPING
        if self.detail:
            group.note = ", ".join(origin.label for origin in known if origin.label)
            if path and (name := assigned(path[-1])):
                self.name_last(here, path[-1], name)

    def name_last(self, here: int, frame: Frame, name: str) -> None:
        """Give the name of a variable to the last of the operations whose result it is."""
        before = self.results.get((frame[:2], name))
        if before is not None and self.groups[before].note == name:
            self.groups[before].note = ""
        self.results[frame[:2], name] = here
        self.groups[here].note = self.groups[here].note or name

    def step(self, equation: Any) -> None:
        """Read the body of a scan in place of the scan: one step of it."""
        (body,) = bodies(equation)
        for outer, own in zip(equation.invars, body.invars, strict=True):
            if not hasattr(outer, "val") and outer in self.origins:
                self.origins[own] = self.origins[outer]
        for inner in body.eqns:
            self.take(inner, frames(inner))
        for outer, own in zip(equation.outvars, body.outvars, strict=True):
            if own in self.origins:
                self.origins[outer] = self.origins[own]

    def scan(self, equation: Any, path: list[Frame]) -> None:
        """Make a node of the scan over layers, and a flow of its body."""
        (body,) = bodies(equation)
        # Consts and the carry are as large outside as inside; versions of jax tell their numbers differently.
        same = lambda outer, own: outer.aval.shape == own.aval.shape  # noqa: E731
        carried = sum(map(same, equation.outvars, body.outvars))
        consts = sum(map(same, equation.invars, body.invars)) - carried
        inner = _Reader(self.calling, self.detail, self.words)
        group = _Group((id(equation),), "layers", path, self.owner(equation, path))
        stacked: set[int] = set()
        inputs: dict[Any, _Origin] = {}
        for place, (outer, own) in enumerate(zip(equation.invars, body.invars, strict=True)):
            origin = _Origin() if hasattr(outer, "val") else self.origins.get(outer, _Origin())
            if origin.weight is not None:
                run, _, rest = origin.weight.partition("layers/")
                inner.origins[own] = _Origin(weight=rest, shape=own.aval.shape)
                group.title, group.owner = "layers", run.rstrip("/")
                stacked.add(outer.aval.shape[0])
            elif origin.group is not None:
                group.reads[origin.group] = None
                source = self.find(origin.group)
                title = "h" if consts <= place < consts + carried else self.node(source).path
                if (source, title) not in inputs:
                    inputs[source, title] = inner.add(_Group(None, "input", [], title=title))
                inner.origins[own] = inputs[source, title]
            elif place >= consts + carried:
                inner.origins[own] = inner.add(_Group(None, "input", [], title="number of the layer"))
        length = equation.params["length"]
        group.note = f"{length} layers" if stacked == {length} else f"{length} layers, one set of weights"
        results = ["h"] * carried + [""] * (len(body.outvars) - carried)
        where = f"{group.owner}/layers" if group.owner else "layers"
        flow = inner.read(body, f"one of {where}", frames(equation), results)
        self.flows.append(flow)
        here = self.add(group)
        for variable in equation.outvars[:carried]:
            self.origins[variable] = here

    def title(self, place: int) -> str:
        """What a node is called."""
        group = self.groups[place]
        if group.title:
            return group.title
        if group.kind == "module" and group.weights:
            return _parent(group.weights).rpartition("/")[2]
        if group.kind in ("module", "function"):
            return group.path[-1].function.rpartition(".")[2].removesuffix("_plain")
        alone = len(group.reads) < 2 and group.operations[0] in SYMBOLS.values()  # such as distances, x[:, None] - x
        if len(group.operations) == 1 and (self.detail or not alone):
            return group.operations[0]
        return assigned(group.path[-1]) or " ".join(group.operations)

    def finish(self, name: str) -> Flow:
        """Nodes that something comes of, in the order of the program; inputs where they are first read."""
        reads = {
            place: {self.find(other) for other in group.reads} - {place}
            for place, group in enumerate(self.groups)
            if self.same[place] == place
        }
        for place in list(reads):
            group = self.groups[place]
            if group.kind == "function" and not group.weights and not group.changes:
                through = reads.pop(place)
                reads = {one: (of - {place}) | through if place in of else of for one, of in reads.items()}
        wanted = {place for place in reads if self.groups[place].kind == "output"}
        while more := {other for place in wanted for other in reads[place]} - wanted:
            wanted |= more
        first = {other: place for place in sorted(wanted, reverse=True) for other in reads[place]}
        before = {place for place in wanted if self.groups[place].kind == "input"}
        left = sorted(wanted, key=lambda place: first[place] - 0.5 if place in before else place)
        places: list[int] = []
        while left:  # what a node reads stands in front of it
            places.append(next(place for place in left if reads[place].isdisjoint(left)))
            left.remove(places[-1])
        numbers = {place: number for number, place in enumerate(places)}
        nodes = tuple(self.node(place) for place in places)
        edges = tuple((numbers[other], numbers[place]) for place in places for other in sorted(reads[place]))
        return Flow(name, nodes, edges, tuple(self.flows))

    def node(self, place: int) -> Node:
        """A group as it is shown."""
        group, title = self.groups[place], self.title(place)
        owner, note = group.owner, group.note
        if group.kind == "module" and group.weights:
            owner = _parent(group.weights).rpartition("/")[0]
        if group.kind == "function":
            named = [one[1:] for one in group.operations if one.startswith("=")]
            scales = [one for one in group.operations if one.startswith("× ") and "@" in group.operations]  # noqa: RUF001
            note = self.words.get(title) or " ".join(named if title in self.words else scales)
        return Node(group.kind, title.removeprefix("="), owner, tuple(group.weights.items()), note)


def _parent(weights: dict[str, tuple[int, ...]]) -> str:
    """The path of the module that all of some parameters belong to; empty where they are of several."""
    paths = [path.split("/")[:-1] for path in weights]
    return "/".join(paths[0] if all(path == paths[0] for path in paths) else [])
