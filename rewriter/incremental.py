"""The incremental decoder of a model: derived from its stateless graph, compiled in the background, run token by token."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from subquad.application import rewritten
from subquad.blocks import cut
from subquad.capture import Capture
from subquad.compilation import CompilationError, Order, compile_orders, order
from subquad.derivation import derive
from subquad.ir.errors import GenerationError
from subquad.one_token_graph import one_token_graph
from subquad.packing import fuse_projections, pack, projection_groups
from subquad.runtime.decode_engine import DecodeEngine, Executor, executor
from subquad.runtime.generation import generate
from subquad.runtime.schedule import Program, Runner, Schedule
from subquad.runtime.state import DecoderState
from subquad.runtime.step_graph import StepGraph

Report = Callable[[int, int], None]


def decoder(model: torch.nn.Module | Capture) -> Decoder:
    """The incremental decoder of a rewritten module (or of a capture whose sites are operators).

    The model's parameters are moved into one storage (same objects, same values).  Nothing is compiled until `compile`.
    Raises NotIncremental (a SubquadError) when the graph mixes tokens outside attention, naming node, path and source line,
    and GenerationError for a module that was not rewritten.
    """
    if isinstance(model, Capture):
        capture = model
    else:
        record = rewritten(model)
        if record is None:
            raise GenerationError(f"{type(model).__name__} was not rewritten; call subquad.rewrite first.")
        capture = record.applied
    graph = derive(capture.graph)
    return Decoder(graph, attributes(capture.graph))


def attributes(module: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by dotted name, tied ones under each of their names."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


class Decoder:
    """Prefill, step, rollback and generation of one model.  States belong to calls, so threads may share a decoder."""

    def __init__(self, graph: StepGraph, weights: Mapping[str, Tensor]) -> None:
        """graph: what `derive` returned.  weights: the tensors its graphs read, by name."""
        if len(graph.inputs) > 2:
            taken = ", ".join(graph.inputs)
            raise GenerationError(f"the model takes {taken}; a decoder gives token ids and a padding mask only.")
        self.source = graph
        self.names = sorted(
            {str(n.target) for g in (graph.step, graph.first) for n in g.graph.nodes if n.op == "get_attr"}
        )
        tensors = dict(weights)
        groups = projection_groups(graph.step.graph, tensors)
        step, first = _copied(graph.step), _copied(graph.first)
        for module in (step, first):
            fuse_projections(module, groups)
        reading = [str(n.target) for n in graph.step.graph.nodes if n.op == "get_attr"]
        self.weights = pack(tensors, _by_use(graph.step.graph, reading), groups)
        self._one = cut(one_token_graph(step), graph.shared)
        device = next((t.device for t in tensors.values()), torch.device("cpu"))
        executors = [executor(cut(module, graph.shared), self.weights) for module in (step, first)]
        self.engine = DecodeEngine(graph, executors[0], executors[1], device)
        self.failure: str | None = None
        self._worker: threading.Thread | None = None

    @property
    def ready(self) -> bool:
        """True when the one-token program is compiled and in use."""
        return self.engine.one is not None

    def prefill(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, last_only: bool = True, capacity: int = 0
    ) -> tuple[Tensor, DecoderState]:
        """Logits [B, 1 or T, vocabulary] of ids [B, T] and the state behind them; room for `capacity` tokens from the start."""
        state = self.engine.start(ids.shape[0], max(capacity, ids.shape[1]))
        return self.engine.run(state, ids, attention_mask, last_only), state

    def step(self, ids: Tensor, state: DecoderState, *, last_only: bool = False) -> Tensor:
        """Logits [B, w or 1, vocabulary] of w more tokens ids [B, w]; the state moves on."""
        return self.engine.run(state, ids, None, last_only)

    def rollback(self, state: DecoderState, n: int) -> None:
        """Take back the last n tokens of every row."""
        self.engine.rollback(state, n)

    def generate(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int = 128,
        eos_token_ids: Collection[int] = (), temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[list[int | None]]:  # fmt: skip
        """Yield the new token of every row, step by step; see subquad.runtime.generation.generate."""
        return generate(
            self.engine, ids, attention_mask, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids,
            temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        )  # fmt: skip

    def compile(self, *, wait: bool = True, report: Report = lambda done, total: None) -> None:
        """Compile the one-token programs, or load them from the cache; uncompiled ones serve until all are ready.

        wait: False works in a thread beside generation.  report: called with (programs ready, programs in all).
        With wait, raises CompilationError when the compiler fails; without, `failure` then holds the sentence.
        """
        if self.ready or self.engine.device.type != "cpu":
            return
        if wait:
            self.engine.one = self._compiled(report)
            return
        if self._worker is None or not self._worker.is_alive():
            self._worker = threading.Thread(
                target=self._in_background, args=(report,), name="subquad-compile", daemon=True
            )
            self._worker.start()

    def _in_background(self, report: Report) -> None:
        try:
            self.engine.one = self._compiled(report)
        except CompilationError as error:
            self.failure = str(error)

    def _compiled(self, report: Report) -> Executor:
        wanted = _orders(self._one, self.weights, self.engine)
        return executor(self._one, self.weights, compile_orders(wanted, report))


def _copied(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    mapping: dict[torch.fx.Node, torch.fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, mapping))
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    return torch.fx.GraphModule(module, graph)


def _by_use(graph: torch.fx.Graph, names: list[str]) -> list[str]:
    """Weight names in the order in which the graph first reads them."""
    order = {node: n for n, node in enumerate(graph.nodes)}
    first: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            first[str(node.target)] = min((order[u] for u in node.users), default=0)
    return sorted(dict.fromkeys(names), key=lambda name: first[name])


def _orders(schedule: Schedule, weights: Mapping[str, Tensor], engine: DecodeEngine) -> list[Order]:
    """Example inputs of every program as fake tensors, from two runs that differ in length and capacity."""
    runs = []
    plain = {name: tensor.detach() for name, tensor in weights.items()}
    longest = (engine.graph.limit or 64) - 1
    for length, capacity in ((longest // 2, 256), (longest, 512)):
        seen: dict[str, list[Tensor]] = {}
        with FakeTensorMode() as mode, torch.no_grad():
            fake = {name: mode.from_tensor(tensor, static_shapes=True) for name, tensor in plain.items()}
            recording = executor(schedule, fake, {p.key: _recording(p, seen) for p in schedule.programs()})
            engine.probe(recording, engine.start(1, capacity), torch.zeros(1, 1, dtype=torch.int64), length)
        runs.append(seen)
    return [order(p, runs[0][p.key], runs[1][p.key]) for p in schedule.programs()]


def _recording(program: Program, seen: dict[str, list[Tensor]]) -> Runner:
    run = program.eager()

    def runner(inputs: list[Tensor]) -> list[Tensor]:
        seen.setdefault(program.key, list(inputs))
        return run(inputs)

    return runner
