"""What moves into a site's kernels gives the graph's own q and k; what is not proved, or is no norm of a row, stays outside."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from provenance_models import SMALL, ComplexRotary, huggingface, latent
from provenance_oracle import canonical, captured, compare, found, project, table, values_of
from torch import nn

import subquad
from subquad.ir.provenance import Norm, Origin, Part, Provenance, Rotary, Table
from subquad.kernel_emission import emit_kernels
from subquad.kernel_surroundings import surroundings_of
from subquad.kernels.surroundings import Epilogue, Prologue, finished, prepared

GROUPED = SMALL | {"num_key_value_heads": 2}
OLD = {
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 4,
    "vocab_size": 64,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MODELS = {
    "qwen3": (lambda: huggingface("Qwen3", **GROUPED, head_dim=8), Prologue("rms", 1e-6, True, rotary=8)),
    "gpt-neox": (lambda: huggingface("GPTNeoX", **SMALL, rotary_pct=0.5), Prologue(rotary=4)),
    "gpt-j": (lambda: huggingface("GPTJ", **OLD, rotary_dim=4), Prologue(rotary=4, style="interleaved")),
    "deepseek": (latent, Prologue(rotary=8, start=6, style="deinterleaved")),
    "complex": (lambda: ComplexRotary().double().eval(), Prologue(rotary=8, style="interleaved")),
}


def located(model):
    """A capture, its first site with provenance, and the value of every node."""
    given = (
        (torch.randn(2, 9, 32, dtype=torch.float64),)
        if isinstance(model, ComplexRotary)
        else {"input_ids": torch.randint(0, 64, (2, 9))}
    )
    kept = captured(model, given, "export")
    sites, origins = found(kept)
    return dataclasses.replace(sites[0], provenance=origins[0]), values_of(kept)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("qwen3", "complex") else pytest.mark.slow) for n in MODELS]
)
def test_the_prologue_of_q_gives_the_q_of_the_graph(name):
    build, wanted = MODELS[name]
    site, values = located(build())
    around, outside = surroundings_of(site, keys_too=False)
    part = around.q
    assert dataclasses.replace(part, eps=wanted.eps) == wanted
    assert around.k.empty
    assert around.o.empty
    assert any(sentence.startswith("k: ") for sentence in outside)
    origin, want = site.provenance.q, canonical(values[site.q.node], site.q.axes).double()
    row = torch.cat([p.factor * project(p.projection, values, want.shape[:2]) for p in origin.parts], -1)
    rotary, norm = origin.rotary, origin.norm
    columns = [2 * j if part.style == "interleaved" else j for j in range(part.rotary // 2)]
    tensors = {f"q_{n}": table(getattr(rotary, n), values)[:, : want.shape[1], 0, columns] for n in ("cos", "sin")}
    if norm is not None:
        tensors["q_weight"] = values[norm.weight].double() + norm.offset
    compare(prepared(row, part, "q", tensors), want, 1e-5)


def fake_site(site, q):
    return dataclasses.replace(site, provenance=Provenance(q, Origin((), "nothing"), Origin((), "nothing"), None))


def test_what_is_no_norm_of_a_row_or_no_proved_rotation_stays_outside():
    site, _ = located(MODELS["complex"][0]())
    node = site.q.node
    rms = Norm("rms", node, node, None, None, 1e-6, site.head_dim)
    width = site.head_dim
    turned = Rotary(
        "half", width, tuple(range(width)), tuple(range(width)), (1,) * width, Table(node, ("b", "t", "d"), tuple(range(width))),
        Table(node, ("b", "t", "d"), tuple(range(width))), node, ((0,), (1,), (2,), (3,)), None, why="no proof",
    )  # fmt: skip
    whole = Part(0, width)
    for part, said in (
        (dataclasses.replace(whole, norm=dataclasses.replace(rms, name="layer")), "layer norm"),
        (dataclasses.replace(whole, norm=dataclasses.replace(rms, width=4 * width)), "a head has"),
        (dataclasses.replace(whole, norm=dataclasses.replace(rms, bias=node)), "bias"),
        (dataclasses.replace(whole, norm=dataclasses.replace(rms, weight=node)), "weights per head"),
        (dataclasses.replace(whole, rotary=turned), "no proof"),
        (dataclasses.replace(whole, rotary=dataclasses.replace(turned, style="other")), "other"),
    ):
        around, outside = surroundings_of(fake_site(site, Origin((part,))), keys_too=True)
        assert around.empty
        assert said in outside[0], outside
    halves = (Part(0, width // 2, rotary=turned), Part(width // 2, width // 2, rotary=turned))
    assert "on their own" in surroundings_of(fake_site(site, Origin(halves)), True)[1][0]
    some = (Part(0, width // 2, norm=rms), Part(width // 2, width // 2))
    assert "only a part" in surroundings_of(fake_site(site, Origin(some)), True)[1][0]
    assert surroundings_of(fake_site(site, Origin((dataclasses.replace(whole, norm=rms),))), True)[0].q == Prologue(
        "rms"
    )


class Gated(nn.Module):
    """One attention whose output goes through a norm or a gate, written in the way `kind` says."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.q, self.k, self.v, self.g, self.o = (nn.Linear(32, 32) for _ in range(5))
        self.row, self.all = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.rand(32) + 0.5)

    def forward(self, x):
        heads = lambda y: y.view(*x.shape[:2], 4, 8)  # noqa: E731
        q, k, v = (heads(part(x)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        flat, g = y.reshape(x.shape), self.g(x)
        rms = lambda z: z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-5)  # noqa: E731
        match self.kind:
            case "sigmoid":
                flat = flat * torch.sigmoid(g)
            case "silu":
                flat = (F.rms_norm(y, (8,), self.row, 1e-5) * F.silu(heads(g))).reshape(x.shape)
            case "written":
                flat = (F.silu(heads(g)) * (self.row * rms(y.contiguous()))).reshape(x.shape)
            case "norm":
                flat = rms(y).reshape(x.shape)
            case "first row":
                flat = flat * torch.sigmoid(g[:, :1])
            case "all heads":
                flat = F.rms_norm(flat, (32,), self.all, 1e-5) * torch.sigmoid(g)
            case "other axis":
                flat = rms(y.transpose(2, 3)).transpose(2, 3).reshape(x.shape) * torch.sigmoid(g)
            case "itself":
                flat = flat * torch.sigmoid(self.g(flat))
            case "read twice":
                flat = flat * torch.sigmoid(g) + flat
            case "gate first":
                flat = rms(heads(flat * torch.sigmoid(g))).reshape(x.shape)
        return self.o(flat)


EPILOGUES = {
    "sigmoid": Epilogue(gate="sigmoid"), "silu": Epilogue("rms", 1e-5, True, "silu"), "written": Epilogue("rms", 1e-5, True, "silu"),
    "norm": Epilogue("rms", 1e-5), "gate first": Epilogue(gate="sigmoid"),
}  # fmt: skip
EPILOGUES |= dict.fromkeys(("first row", "all heads", "other axis", "itself", "read twice"), Epilogue())


@pytest.mark.parametrize("kind", EPILOGUES)
def test_the_epilogue_of_an_output_is_what_the_graph_does_to_it(kind):
    torch.manual_seed(0)
    model = Gated(kind).double().eval()
    kept = captured(model, (torch.randn(2, 9, 32, dtype=torch.float64),), "export")
    site = found(kept)[0][0]
    part = surroundings_of(site, keys_too=False)[0].o
    assert part == EPILOGUES[kind]
    if part.empty or kind == "gate first":
        return
    values = values_of(kept)
    row = values[site.out].transpose(1, 2)
    x = kept.example["x"]
    with torch.no_grad():
        tensors = {"o_weight": model.row, "o_gate": model.g(x).view(row.shape)}
        compare(model.o(finished(row, part, tensors).reshape(2, 9, 32)), model(x), 1e-9)


def test_emitted_kernels_end_with_the_norm_and_gate_of_the_output(tmp_path):
    fast = subquad.rewrite(Gated("silu"), passes=["fuse"], example_inputs=(torch.randn(2, 9, 32),), verify=False)
    kernels = emit_kernels(fast, tmp_path / "out")
    ends = {k.spec.part for k in kernels if "o: rms norm with weight, then times silu(gate)" in k.json()["around"]}
    assert ends == {"forward", "merge"}


def test_emitted_kernels_take_in_what_is_proved_and_say_so(tmp_path):
    model = huggingface("Qwen3", **GROUPED, head_dim=8).float()
    fast = subquad.rewrite(
        model, passes=["fuse"], example_inputs={"input_ids": torch.randint(0, 64, (2, 9))}, verify=False
    )
    kernels = emit_kernels(fast, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "kernels.json").read_text())
    assert len(told) == len(kernels)
    taken = [entry for entry in told if entry["around"]]
    assert {entry["part"] for entry in taken} == {"forward"}
    assert {"forward", "merge", "grad_queries", "grad_keys"} <= {entry["part"] for entry in told if not entry["around"]}
    for entry in taken:
        text = (tmp_path / "out" / entry["source"]).read_text()
        assert f"On load and store: {entry['around']}." in text
        assert "q_cos_ptr" in text
        assert "k_cos_ptr" not in text
        assert entry["around"].startswith("q: rms norm with weight, then rotary (half) of columns 0 to 7")
        assert "stays outside" in entry["outside"][0]
