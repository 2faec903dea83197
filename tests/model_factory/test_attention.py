"""Packed attention: every kernel present computes the same, nothing waits for a device, and a
compiled block needs one graph.
"""

import copy

import pytest
import torch

from model_factory.attention import BACKENDS, available_backends, varlen_attention
from model_factory.registry import create_model

PACKS = {
    "mixed": [5, 10, 5, 19, 1],
    "equal": [8, 8, 8],
    "one": [30],
    "short and long": [1, 64, 1, 2, 33, 64],
}


def bounds_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def loop_over_items(q, k, v, bounds_q, bounds_k):
    """The definition: one softmax per item."""
    outputs = []
    for item in range(len(bounds_k) - 1):
        rows_q = slice(int(bounds_q[item]), int(bounds_q[item + 1]))
        rows_k = slice(int(bounds_k[item]), int(bounds_k[item + 1]))
        scores = torch.einsum("qhd,khd->hqk", q[rows_q], k[rows_k]) / q.shape[-1] ** 0.5
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[rows_k]))
    return torch.cat(outputs)


def cases():
    """(device, dtype, back end) of every kernel that this machine can run."""
    found = []
    for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        for dtype in (torch.float32, torch.bfloat16):
            names = available_backends(torch.empty(1, 1, 32, device=device, dtype=dtype))
            found += [(device, dtype, name) for name in names]
    return found


def torch_refuses(query: torch.Tensor, longest: int) -> bool:
    """torch 2.13 chooses its fused bf16 kernel by the processor (AMX) and compiles it by the
    dispatch level (AVX-512): where ATEN_CPU_CAPABILITY alone holds the latter down, it raises from
    64 queries on. No processor has that pair by itself."""
    rows = torch.zeros(1, 1, longest, query.shape[-1], device=query.device, dtype=query.dtype)
    try:
        torch.nn.functional.scaled_dot_product_attention(rows, rows, rows)
    except RuntimeError as error:
        return "avx512" in str(error)
    return False


@pytest.mark.parametrize("pooling", [False, True])
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize(("device", "dtype", "backend"), cases())
def test_every_backend_equals_a_loop_over_items(device, dtype, backend, lengths, pooling):
    generator = torch.Generator().manual_seed(0)
    bounds = bounds_of(lengths)
    bounds_q = torch.arange(len(bounds), dtype=torch.int32) if pooling else bounds
    counts = (int(bounds_q[-1]), int(bounds[-1]), int(bounds[-1]))
    leaves = [torch.randn(n, 2, 32, generator=generator).to(device, dtype) for n in counts]
    wide = [leaf.float().requires_grad_() for leaf in leaves]
    if torch_refuses(leaves[0], 1 if pooling else max(lengths)):
        pytest.skip("torch's own kernel does not compute bf16 at this dispatch level")
    leaves = [leaf.requires_grad_() for leaf in leaves]
    want = loop_over_items(*wide, bounds_q, bounds)
    got = varlen_attention(
        *leaves,
        bounds.to(device),
        max(lengths),
        cu_seqlens_q=bounds_q.to(device) if pooling else None,
        max_seqlen_q=1 if pooling else None,
        backend=backend,
    )
    weight = torch.randn(want.shape, generator=generator).to(device)
    wanted = torch.autograd.grad(want, wide, weight)
    gained = torch.autograd.grad(got, leaves, weight.to(dtype))
    tolerance = 2e-6 if dtype == torch.float32 else 3e-2
    assert got.dtype == dtype
    for ours, reference in zip((got, *gained), (want, *wanted), strict=True):
        ours, reference = ours.detach().float(), reference.detach()
        assert (ours - reference).abs().max() < tolerance * max(1.0, reference.abs().max())


def test_the_operator_keeps_its_promises_to_the_compiler():
    from model_factory.grouped_attention import _grouped_sdpa

    bounds = bounds_of([5, 10, 5])
    q, k, v = (torch.randn(20, 2, 32, requires_grad=True) for _ in range(3))
    torch.library.opcheck(_grouped_sdpa, (q, k, v, bounds, bounds))


def test_unavailable_backends_are_named():
    q = torch.zeros(4, 1, 32)
    assert available_backends(q) == ["sdpa", "eager"]
    for name in (*(set(BACKENDS) - {"sdpa", "eager"}), "nonsense"):
        with pytest.raises(ValueError, match=f"'{name}' cannot run on cpu.*sdpa, eager"):
            varlen_attention(q, q, q, torch.tensor([0, 4]), 4, backend=name)


def one_step(model, device, dtype):
    """Forward and backward of a pack described without host values."""
    rows = torch.zeros(48, 768, device=device, dtype=dtype)
    bounds = torch.arange(0, 49, 12, dtype=torch.int32, device=device)
    positions = torch.zeros(48, 3, dtype=torch.int64, device=device)
    out = model(rows, patch_positions=positions, cu_seqlens=bounds, max_seqlen=12)
    (out.pooler_output.sum() + out.last_hidden_state.sum()).backward()
    return out


def test_forward_and_backward_need_no_value_of_any_tensor():
    """Tensors on the meta device have no values: .item(), .tolist() and every shape that depends
    on data raise there.
    """
    with torch.device("meta"):
        model = create_model("hf_llava_vit_packing_tiny_ln", rope_pairing="rotary").bfloat16()
        with pytest.raises(RuntimeError, match="item"):
            torch.zeros(3).max().item()
        assert one_step(model, "meta", torch.bfloat16).pooler_output.shape == (4, 128)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_nothing_waits_for_a_gpu():
    model = create_model("hf_llava_vit_packing_tiny_ln", rope_pairing="rotary").bfloat16().cuda()
    one_step(model, "cuda", torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        one_step(model, "cuda", torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_forward_never_asks_a_tensor_for_a_python_number(monkeypatch):
    """Also not inside the operators, which a torch function mode cannot see."""
    model = create_model("hf_llava_vit_packing_tiny_ln", rope_pairing="rotary")
    rows, bounds = torch.randn(45, 768), bounds_of([5, 30, 5, 5])
    positions = torch.randint(0, 9, (45, 3))
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        monkeypatch.setattr(
            torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} in forward")
        )
    out = model(rows, patch_positions=positions, cu_seqlens=bounds, max_seqlen=30)
    out.pooler_output.sum().backward()


def test_a_pack_seen_under_inference_mode_can_be_trained_on_afterwards():
    bounds = bounds_of([6, 11, 6, 20, 2])  # lengths that no other test has grouped
    q, k, v = (torch.randn(45, 2, 32, requires_grad=True) for _ in range(3))
    with torch.inference_mode():
        varlen_attention(q, k, v, bounds, 20)
    for backend in ("sdpa", "eager"):
        varlen_attention(q, k, v, bounds, 20, backend=backend).sum().backward()


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def test_compiled_blocks_share_one_graph_over_changing_packs(fresh_compiler):
    torch.manual_seed(0)
    plain = create_model("hf_llava_vit_packing_tiny_ln", rope_pairing="rotary")
    compiled = copy.deepcopy(plain)
    compiled.compile_blocks(backend="aot_eager")
    rows, positions = torch.randn(64, 768), torch.randint(0, 9, (64, 3))
    for lengths in ([64], [32, 32], [10, 20, 34], [1, 1, 2, 60], [8] * 8, [2, 62]):
        outputs = []
        for model in (plain, compiled):
            model.zero_grad()
            out = model(
                rows,
                patch_positions=positions,
                cu_seqlens=bounds_of(lengths),
                max_seqlen=max(lengths),
            )
            out.pooler_output.square().sum().backward()
            grads = [parameter.grad for parameter in model.parameters()]
            outputs.append([out.pooler_output, out.last_hidden_state, *grads])
        for ours, want in zip(*outputs, strict=True):
            assert torch.allclose(ours, want, atol=1e-4, rtol=1e-4)
    assert fresh_compiler["stats"]["unique_graphs"] == 1
    assert list(compiled.state_dict()) == list(plain.state_dict())
