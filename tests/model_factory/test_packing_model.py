"""The packed encoder: items do not see each other, and the options of its forward pass work."""

import copy

import pytest
import torch

from model_factory.layers import EncoderLayer
from model_factory.registry import create_model

GRIDS = torch.tensor([[1, 4, 4], [3, 2, 5], [1, 1, 7], [2, 4, 2]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("hf_llava_vit_packing_tiny_ln", rope_pairing="rotary").eval()


def rows_of(grids, seed=0):
    return torch.randn(int(grids.prod(1).sum()), 768, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", [None, "sdpa", "eager"])
@pytest.mark.parametrize("pairing", ["rotary", "legacy"])
def test_packed_equals_alone(backend, pairing):
    torch.manual_seed(0)
    model = create_model("hf_llava_vit_packing_tiny_ln", rope_pairing=pairing).eval()
    model.choose_attention(backend)
    rows = rows_of(GRIDS)
    with torch.no_grad():
        packed = model(rows, GRIDS)
        starts = [0, *GRIDS.prod(1).cumsum(0).tolist()]
        for i, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
            alone = model(rows[start:stop], GRIDS[i : i + 1])
            assert torch.allclose(
                packed.last_hidden_state[start:stop], alone.last_hidden_state, atol=1e-5
            )
            assert torch.allclose(packed.pooler_output[i], alone.pooler_output[0], atol=1e-5)


def test_permuting_items_permutes_outputs(model):
    pieces = list(rows_of(GRIDS).split(GRIDS.prod(1).tolist()))
    order = [2, 0, 3, 1]
    with torch.no_grad():
        straight = model(torch.cat(pieces), GRIDS)
        permuted = model(torch.cat([pieces[i] for i in order]), GRIDS[order])
    assert torch.allclose(straight.pooler_output[order], permuted.pooler_output, atol=1e-5)
    tokens = straight.last_hidden_state.split(GRIDS.prod(1).tolist())
    assert torch.allclose(
        torch.cat([tokens[i] for i in order]), permuted.last_hidden_state, atol=1e-5
    )


def test_pooling_is_the_loop_over_items_through_torchs_own_attention(model):
    """The head's parameters, put into torch.nn.MultiheadAttention, item by item."""
    head, width = model.head, model.config.hidden_size
    reference = torch.nn.MultiheadAttention(width, model.config.num_attention_heads)
    reference.load_state_dict(head.attention.state_dict())
    with torch.no_grad():
        out = model(rows_of(GRIDS), GRIDS)
        for i, tokens in enumerate(out.last_hidden_state.split(GRIDS.prod(1).tolist())):
            pooled, _ = reference(head.probe[0], tokens, tokens)
            want = pooled + head.mlp(head.norm(pooled))
            assert torch.allclose(out.pooler_output[i], want[0], atol=1e-5)


def test_hidden_states_are_one_more_than_layers(model):
    with torch.no_grad():
        out = model(rows_of(GRIDS), GRIDS, output_hidden_states=True)
        plain = model(rows_of(GRIDS), GRIDS)
        first, second, third = model(
            rows_of(GRIDS), GRIDS, output_hidden_states=True, return_dict=False
        )
    assert plain.hidden_states is None
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(model.layernorm_post(out.hidden_states[-1]), out.last_hidden_state)
    assert torch.equal(first, out.last_hidden_state) and torch.equal(second, out.pooler_output)
    assert torch.equal(third[0], out.hidden_states[0])


def test_the_config_can_ask_for_hidden_states():
    model = create_model("hf_llava_vit_packing_tiny_ln", output_hidden_states=True)
    assert len(model(rows_of(GRIDS), GRIDS).hidden_states) == 4


def test_without_a_head_there_is_no_pooled_output():
    model = create_model("hf_llava_vit_packing_tiny_ln", use_head=False)
    out = model(rows_of(GRIDS), GRIDS)
    assert out.pooler_output is None and out.last_hidden_state.shape == (69, 128)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradient_checkpointing_runs_blocks_again_and_changes_no_gradient(monkeypatch, reentrant):
    torch.manual_seed(0)
    plain = create_model("hf_llava_vit_packing_tiny_ln", rope_pairing="rotary").train()
    saving = copy.deepcopy(plain)
    options = None if reentrant is None else {"use_reentrant": reentrant}
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    calls, forward = [], EncoderLayer.forward
    monkeypatch.setattr(
        EncoderLayer, "forward", lambda self, *args: calls.append(self) or forward(self, *args)
    )
    runs = {}
    for name, model in (("plain", plain), ("saving", saving)):
        calls.clear()
        model(rows_of(GRIDS), GRIDS).pooler_output.square().sum().backward()
        runs[name] = len(calls)
    assert runs == {"plain": 3, "saving": 6}
    for ours, want in zip(saving.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, want.grad, atol=1e-6)
    saving.gradient_checkpointing_disable()
    calls.clear()
    saving(rows_of(GRIDS), GRIDS).pooler_output.sum().backward()
    assert len(calls) == 3


def test_half_precision_stays_near_fp32(model):
    half = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        want = model(rows_of(GRIDS), GRIDS).pooler_output
        got = half(rows_of(GRIDS), GRIDS).pooler_output
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = model(rows_of(GRIDS), GRIDS).pooler_output
    assert got.dtype == torch.bfloat16
    for result in (got, cast):
        similarity = torch.nn.functional.cosine_similarity(result.float(), want)
        assert float(similarity.min()) > 0.999
