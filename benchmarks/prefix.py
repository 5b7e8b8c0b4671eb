"""Batches with a shared prefix: Hugging Face generate, our decoder without sharing, and with keys stored and computed once."""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable

import machine
import torch
from few_shot import few_shot

import subquad
from subquad.compilation import native_forms
from subquad.incremental import Decoder, decoder
from subquad.ir.draft import DraftTree
from subquad.runtime.key_tree import separate
from subquad.runtime.prefix_tree import find_sharing
from subquad.runtime.sharing_plan import SharingPlan, plan_sharing
from subquad.runtime.tree_stepper import TreeStepper

OWN = 16


def main() -> None:
    """Print the rows asked for, each as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefixes", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--new", type=int, default=64, help="new tokens of a row")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of prompts timed for each row")
    parser.add_argument("--only", nargs="+", choices=[*ROWS], default=[*ROWS])
    parser.add_argument(
        "--peer-tokens", type=int, default=140_000, help="prompt tokens up to which Hugging Face is timed"
    )
    parser.add_argument("--plain-tokens", type=int, default=140_000, help="the same for our decoder without sharing")
    parser.add_argument("--longest", type=int, default=7168, help="longest prefix of the row on its length")
    parser.add_argument(
        "--scaled", type=int, default=0, metavar="ROWS",
        help="time the prompts of both peers on so many rows and scale them to the batch (marked ≈); steps are timed whole",
    )  # fmt: skip
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--quick", action="store_true", help="small sizes, within five minutes")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.prefixes, arguments.batches, arguments.new = [512], [4, 16], 16
        arguments.rounds, arguments.longest, arguments.no_compile = 1, 2048, True
    torch.manual_seed(0)
    print(machine.line())
    bench = Bench(arguments)
    for name in arguments.only:
        print(f"\n### {name}\n", flush=True)
        ROWS[name](bench)
        gc.collect()


class Bench:
    """The models and what was asked for."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM

        self.asked = arguments
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
        self.peer = AutoModelForCausalLM.from_pretrained(subquad.demo_weights(), dtype=dtype).eval()
        model = AutoModelForCausalLM.from_pretrained(subquad.demo_weights(), dtype=dtype).eval()
        self.made: Decoder = decoder(subquad.rewrite(model, passes="fuse", verify=False))
        native_forms(build=True)
        if not arguments.no_compile:
            self.made.compile()
        self.generator = torch.Generator().manual_seed(1)

    def prompts(self, batch: int, prefix: int, own: int = OWN) -> torch.Tensor:
        """Random ids [B, prefix + own] whose first `prefix` columns are equal."""
        draw = lambda *shape: torch.randint(100, 49000, shape, generator=self.generator)  # noqa: E731
        return torch.cat([draw(1, prefix).expand(batch, -1), draw(batch, own)], 1)

    def run(self, ids: torch.Tensor, new: int, share: bool, mask: torch.Tensor | None = None) -> Run:
        """Prefill and greedy steps, as `generate` runs them."""
        rows = self.asked.scaled if not share and mask is None else 0
        if 0 < rows < ids.shape[0]:
            return self._scaled(ids, new, rows)
        seen: list[SharingPlan] = []
        stepper = TreeStepper(self.made.engine, ids.shape[1] + new, share, seen.append)
        start = time.perf_counter()
        tokens = stepper.prefill(ids, mask).argmax(-1)
        prefill = time.perf_counter() - start
        return self._steps(stepper, tokens, new, prefill, seen[0])

    def _scaled(self, ids: torch.Tensor, new: int, rows: int) -> Run:
        """Without sharing, the prompt timed on a few rows; the steps start from shared keys that every row got a copy of."""
        few = TreeStepper(self.made.engine, ids.shape[1] + 1, False)
        start = time.perf_counter()
        few.prefill(ids[:rows], None)
        prefill = (time.perf_counter() - start) * ids.shape[0] / rows
        del few
        seen: list[SharingPlan] = []
        stepper = TreeStepper(self.made.engine, ids.shape[1] + new, True, seen.append)
        tokens = stepper.prefill(ids, None).argmax(-1)
        assert stepper.state is not None
        stepper.state = separate(self.made.engine.layout, stepper.state, new)
        return self._steps(stepper, tokens, new, prefill, seen[0], scaled=True)

    def _steps(
        self,
        stepper: TreeStepper,
        tokens: torch.Tensor,
        new: int,
        prefill: float,
        plan: SharingPlan,
        scaled: bool = False,
    ) -> Run:
        found, steps = [tokens], []
        for _ in range(new - 1):
            start = time.perf_counter()
            logits = stepper.verify([DraftTree((token,), (-1,)) for token in tokens.tolist()])
            tokens = torch.stack([row[-1] for row in logits]).argmax(-1)
            stepper.commit([(0,)] * len(tokens))
            steps.append(time.perf_counter() - start)
            found.append(tokens)
        assert stepper.state is not None
        return Run(prefill, steps, torch.stack(found, 1), stepper.state.bytes(), plan, scaled)

    def theirs(self, ids: torch.Tensor, new: int) -> Run:
        """Hugging Face's batched generate; prefill and steps by a streamer's clock."""
        from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

        times: list[float] = []

        class Clock(StoppingCriteria):  # type: ignore[misc]
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **more: object) -> torch.Tensor:
                times.append(time.perf_counter())
                return torch.zeros(input_ids.shape[0], dtype=torch.bool)

        rows, given = self.asked.scaled, {}
        scaled = 0 < rows < ids.shape[0]
        start = time.perf_counter()
        if scaled:
            with torch.inference_mode():
                self.peer.generate(
                    ids[:rows], attention_mask=torch.ones_like(ids[:rows]), max_new_tokens=1, pad_token_id=0
                )
                prompt = (time.perf_counter() - start) * ids.shape[0] / rows
                cache = self.peer(ids[:1, : ids.shape[1] - OWN], use_cache=True, logits_to_keep=1).past_key_values
                cache.batch_repeat_interleave(ids.shape[0])
                given = {"past_key_values": cache}
        with torch.inference_mode():
            out = self.peer.generate(
                ids, **given, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                eos_token_id=None, pad_token_id=0, stopping_criteria=StoppingCriteriaList([Clock()]),
            )  # fmt: skip
        steps = [b - a for a, b in itertools.pairwise(times)]
        held = ids.numel() + ids.shape[0] * (new - 1)
        prefill = prompt if scaled else times[0] - start
        return Run(prefill, steps, out[:, ids.shape[1] :], held * self.made.engine.layout.token_bytes, None, scaled)


class Run:
    """One timed generation: seconds of the prompt and of each step, tokens [B, new], bytes of keys and values at the end."""

    def __init__(
        self, prefill: float, steps: list[float], tokens: torch.Tensor, held: int, plan: SharingPlan | None,
        scaled: bool = False,
    ) -> None:  # fmt: skip
        """scaled: seconds of the prompt were measured on fewer rows."""
        self.scaled = scaled
        self.prefill, self.steps, self.tokens, self.bytes, self.plan = prefill, steps, tokens, held, plan

    @property
    def total(self) -> float:
        """Seconds end to end."""
        return self.prefill + sum(self.steps)

    @property
    def step(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.steps)


def identity(bench: Bench) -> None:
    """Tokens of all three, and logits of every row against rows run alone, judged in float64."""
    from transformers import AutoModelForCausalLM

    ids, new = bench.prompts(8, min(bench.asked.prefixes[0], 512)), 32
    shared, plain, peer = bench.run(ids, new, True), bench.run(ids, new, False), bench.theirs(ids, new)
    print(f"greedy tokens, 8 rows × {new}: shared = unshared {torch.equal(shared.tokens, plain.tokens)}, "
          f"shared = Hugging Face {torch.equal(shared.tokens, peer.tokens)}")  # fmt: skip
    judge = AutoModelForCausalLM.from_pretrained(subquad.demo_weights(), dtype=torch.float64).eval()
    few = ids[:3]
    with torch.inference_mode():
        want = torch.stack([judge(row[None]).logits[0, -1] for row in few])
        theirs = torch.stack([bench.peer(row[None]).logits[0, -1].double() for row in few])
    stepper = TreeStepper(bench.made.engine, few.shape[1] + 1)
    ours = stepper.prefill(few, None).double()
    errors = [float((x - want).square().mean().sqrt()) for x in (ours, theirs)]
    print(f"logits, RMS error against float64: shared {errors[0]:.2e}, original on rows alone {errors[1]:.2e}, "
          f"ratio {errors[0] / errors[1]:.2f} (EXACT allows 2)")  # fmt: skip


def ends(bench: Bench) -> None:
    """End to end, decoding alone and memory, over prefixes and batches."""
    print("| prefix | batch | HF s | unshared s | shared s | HF / shared | unshared / shared | unshared step ms | shared step ms "
          "| ratio | KV MB theirs | KV MB shared | tokens identical |\n" + "|---" * 13 + "|")  # fmt: skip
    for prefix in bench.asked.prefixes:
        for batch in bench.asked.batches:
            ids = bench.prompts(batch, prefix)
            shared = bench.run(ids, bench.asked.new, True)
            few = bench.asked.scaled > 0
            plain = bench.run(ids, bench.asked.new, False) if few or ids.numel() <= bench.asked.plain_tokens else None
            gc.collect()
            peer = bench.theirs(ids, bench.asked.new) if few or ids.numel() <= bench.asked.peer_tokens else None
            held = (ids.numel() + batch * (bench.asked.new - 1)) * bench.made.engine.layout.token_bytes
            same = [torch.equal(one.tokens, shared.tokens) for one in (plain, peer) if one is not None]
            print(
                f"| {prefix} | {batch} | {_seconds(peer)} | {_seconds(plain)} | {shared.total:.1f} | {_ratio(peer, shared)} | "
                f"{_ratio(plain, shared)} | {_step(plain)} | {shared.step * 1e3:.1f} | "
                f"{'' if plain is None else f'{plain.step / shared.step:.2f}×'} | {held / 1e6:.0f} | "
                f"{shared.bytes / 1e6:.0f}{'' if shared.plan and shared.plan.once else ' (copied)'} | {same} |",
                flush=True,
            )


def _seconds(run: Run | None) -> str:
    return "" if run is None else f"{'≈ ' if run.scaled else ''}{run.total:.1f}"


def _step(run: Run | None) -> str:
    return "" if run is None else f"{run.step * 1e3:.1f}"


def _ratio(run: Run | None, ours: Run) -> str:
    return "" if run is None else f"{'≈ ' if run.scaled else ''}{run.total / ours.total:.2f}×"


def prefill(bench: Bench) -> None:
    """The prompt alone: rows that share a prefix, alternating with and without sharing."""
    batch, prefix = (32, 1024) if not bench.asked.quick else (16, 256)
    pairs = []
    for _ in range(bench.asked.rounds):
        ids = bench.prompts(batch, prefix)
        pairs.append((bench.run(ids, 1, False).prefill, bench.run(ids, 1, True).prefill))
    slow, fast = (statistics.median(side) for side in zip(*pairs, strict=True))
    bound = batch * (prefix + OWN) / (prefix + batch * OWN)
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{batch} × {prefix} shared + {OWN} own: {slow:.2f} s unshared, {fast:.2f} s shared, {ratio:.1f}× "
          f"(bound by tokens {bound:.1f}×)")  # fmt: skip


def length(bench: Bench) -> None:
    """Time of a step at batch 32 as the prefix grows, and the rate of the operations that it adds."""
    batch = 32 if not bench.asked.quick else 16
    config = bench.peer.config
    work = 4 * batch * config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    work *= config.num_hidden_layers
    first: tuple[int, float] | None = None
    print("| prefix | step ms | added ms | added GFLOP | GFLOP/s |\n|---|---|---|---|---|")
    for prefix in [n for n in (1024, 2048, 4096, 7168) if n <= bench.asked.longest]:
        step = bench.run(bench.prompts(batch, prefix), 12, True).step
        if first is None:
            first = prefix, step
            print(f"| {prefix} | {step * 1e3:.1f} | | | |", flush=True)
            continue
        flops, more = work * (prefix - first[0]), step - first[1]
        print(
            f"| {prefix} | {step * 1e3:.1f} | {more * 1e3:.1f} | {flops / 1e9:.2f} | {flops / more / 1e9:.0f} |",
            flush=True,
        )


def alone(bench: Bench) -> None:
    """A batch that shares nothing: with and without looking for it."""
    pairs = []
    ids = torch.randint(100, 49000, (8, 64 if bench.asked.quick else 256), generator=bench.generator)
    for n in range(max(8, 2 * bench.asked.rounds)):
        sides = [bench.run(ids, 8, share).total for share in ((True, False) if n % 2 else (False, True))]
        pairs.append(sides[0] / sides[1] if n % 2 else sides[1] / sides[0])
    print(
        f"8 rows × 256, nothing shared: {100 * (statistics.median(pairs) - 1):+.2f}% with sharing on (median of pairs)"
    )


def expanded(bench: Bench) -> None:
    """One step's attention of one layer: the repeat-KV form, SDPA on ready keys, ours."""
    print(
        "| batch | prefix | expand + cat + SDPA ms | SDPA, keys ready ms | ours ms | ratios |\n|---|---|---|---|---|---|"
    )
    for batch, prefix in ((8, 1024), (32, 1024), (32, 4096)):
        print(_attention(batch, prefix), flush=True)


def _attention(batch: int, prefix: int) -> str:
    import torch.nn.functional as F

    from subquad.kernels import SoftmaxSpec, softmax_attention
    from subquad.kernels.prefix_attention import prefix_attention_forward

    q = torch.randn(batch, 1, 9, 64)
    k, v = torch.randn(2, prefix, 3, 64)
    own = torch.randn(2, batch, 64, 3, 64)
    nodes, at = torch.tensor([[0, prefix, 0, 0, batch]]), torch.full((batch, 1), prefix + 63)
    spec = SoftmaxSpec(0.125).json()

    def ours() -> torch.Tensor:
        o, lse = softmax_attention(q, [own[0]], [own[1]], [], [], [], None, None, None, [], [], spec)
        return prefix_attention_forward(q, k, v, nodes, at, o, lse, [], [], spec)

    def joined() -> list[torch.Tensor]:
        return [torch.cat([x.expand(batch, -1, -1, -1), y], 1).transpose(1, 2) for x, y in ((k, own[0]), (v, own[1]))]

    def sdpa(pair: list[torch.Tensor]) -> torch.Tensor:
        return F.scaled_dot_product_attention(q.transpose(1, 2), *pair, enable_gqa=True).transpose(1, 2)

    ready = [x.contiguous() for x in joined()]
    torch.testing.assert_close(ours(), sdpa(ready), rtol=1e-4, atol=1e-5)
    times = [[_timed(f) for f in (lambda: sdpa(joined()), lambda: sdpa(ready), ours)] for _ in range(9)]
    a, b, c = (statistics.median(side) * 1e3 for side in zip(*times, strict=True))
    return f"| {batch} | {prefix} | {a:.2f} | {b:.2f} | {c:.2f} | {a / c:.1f}×, {b / c:.1f}× |"


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def tree(bench: Bench) -> None:
    """Few-shot prompts of GSM8K: instructions, then sets of solved problems, then questions; one level against two."""
    from transformers import AutoTokenizer

    from subquad.runtime import sharing_plan

    sets, shots, questions = (2, 2, 4) if bench.asked.quick else (4, 6, 8)
    ids, mask = few_shot(AutoTokenizer.from_pretrained(subquad.demo_weights()), sets, shots, questions)
    found, levels = {}, sharing_plan.LEVELS
    for most in (1, levels):
        sharing_plan.LEVELS = most
        found[most] = bench.run(ids, bench.asked.new, True, mask)
    sharing_plan.LEVELS = levels
    one, two = found[1], found[levels]
    print(f"{sets} sets of {shots} problems, {questions} questions each, {ids.shape[1]} tokens a row with padding: one level "
          f"{one.total:.1f} s (step {one.step * 1e3:.0f} ms), tree {two.total:.1f} s (step {two.step * 1e3:.0f} ms), "
          f"{one.total / two.total:.2f}×, tokens identical {torch.equal(one.tokens, two.tokens)}")  # fmt: skip


def detection(bench: Bench) -> None:
    """The search for shared prefixes alone."""
    draw = lambda *shape: torch.randint(100, 49000, shape, generator=bench.generator)  # noqa: E731
    for name, ids in (("one prefix", bench.prompts(64, 2000, 48)), ("nothing shared", draw(64, 2048))):
        times = sorted(_timed(lambda ids=ids: find_sharing(ids)) for _ in range(21))
        whole = sorted(_timed(lambda ids=ids: plan_sharing(ids)) for _ in range(21))
        print(f"64 × 2048, {name}: {times[10] * 1e3:.2f} ms, with the choice of levels {whole[10] * 1e3:.2f} ms")


ROWS: dict[str, Callable[[Bench], None]] = {
    "identity": identity,
    "detection": detection,
    "attention": expanded,
    "prefill": prefill,
    "no sharing": alone,
    "length": length,
    "tree": tree,
    "end to end": ends,
}

if __name__ == "__main__":
    main()
