"""Multimodal models on tiny parts: splicing, any tower with any projector, what learns, files."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from lmm_parts import (
    PATCH,
    SIDE,
    TOWERS,
    convnext,
    grown_convnext,
    lmm_of,
    model_of,
    native,
    ours,
    pictures,
    token_ids,
    tokenizer,
)

from eval_encoder.lmm.model import lmm as lmm_model
from eval_encoder.lmm.model.cross_tokens import TextCrossTokens
from eval_encoder.lmm.model.lmm import LmmForConditionalGeneration, Visuals, _share
from eval_encoder.lmm.model.open import open_lmm, open_tower, set_resolution
from eval_encoder.lmm.model.projector_file import (
    load_projector,
    projector_from_transformers,
    projector_to_transformers,
    save_projector,
)
from model_factory.llava.convnext import ConvNextVisionModel, grow_stage
from model_factory.llava.towers import VisualInputs, tower_of

GRID, PATCHES = (1, 4, 4), 16


def spliced_logits(model, ids, mask, visuals):
    """The original's way: features between embedded pieces of text, rows padded again."""
    images = iter(model.encode(visuals)["image"].pooler_output) if visuals else iter(())
    embed, rows = model.get_input_embeddings(), []
    for row, kept in zip(ids, mask.bool(), strict=True):
        pieces, place, words = [], 0, row[kept]
        while place < len(words):
            if words[place] == model.config.image_token_id:
                image = next(images)
                pieces.append(image)
                place += len(image)
            else:
                pieces.append(embed(words[place : place + 1]))
                place += 1
        rows.append(torch.cat(pieces))
    return [model(inputs_embeds=row[None], attention_mask=torch.ones(1, len(row)))[0][0]
            for row in rows]  # fmt: skip


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("images", [(0, 0), (1, 1), (2, 0), (1, 2)])
def test_placeholders_and_splicing_give_the_same_logits(images, padding):
    model = model_of(ours())
    ids, mask = token_ids(model, [PATCHES * n for n in images])
    if padding == "left":
        empty = (mask == 0).sum(dim=1).tolist()
        ids, mask = (
            torch.stack([row.roll(n) for row, n in zip(x, empty, strict=True)]) for x in (ids, mask)
        )
    samples = torch.tensor([i for i, n in enumerate(images) for _ in range(n)])
    visuals = replace(pictures(len(samples)), samples=samples) if len(samples) else None
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, visuals=visuals).logits
        spliced = spliced_logits(model, ids, mask, visuals)
        for row, kept, wanted in zip(out, mask.bool(), spliced, strict=True):
            torch.testing.assert_close(row[kept], wanted, rtol=0, atol=1e-5)
        never = (mask == 0) | (ids == model.config.image_token_id) | (ids == 1)  # BOS: no target
        labels = ids.masked_fill(never, -100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, visuals=visuals).loss
        targets = torch.cat([row[kept][1:] for row, kept in zip(labels, mask.bool(), strict=True)])
        by_hand = torch.cat([row[:-1] for row in spliced])
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(by_hand, targets))


def test_a_wrong_number_of_placeholders_is_an_error():
    model = model_of(ours())
    ids, mask = token_ids(model, [PATCHES - 1])
    with pytest.raises(ValueError, match="do not match"):
        model(input_ids=ids, attention_mask=mask, visuals=pictures(1))


COMBINATIONS = [(tower, kind) for tower in TOWERS for kind in
                ("linear", "mlp2x_gelu", "identity", "spatial_merge", "vitsplit")]  # fmt: skip


@pytest.mark.parametrize(("tower", "kind"), COMBINATIONS)
def test_every_projector_works_on_every_tower(tower, kind):
    if kind == "identity" and tower in ("ours", "convnext"):
        with pytest.raises(ValueError, match="identity cannot lead"):
            model_of(TOWERS[tower](), projector_type=kind)
        return
    if tower == "convnext" and kind == "vitsplit":
        with pytest.raises(ValueError, match="no hidden state"):
            model_of(TOWERS[tower](), projector_type=kind)
        return
    else:
        model = model_of(TOWERS[tower](), projector_type=kind)
    side = 128 if tower == "convnext" else SIDE
    grid = model.tower.grid_of(side, side)
    count = model.tokens_for(grid, grid[1] * grid[2])
    assert count == grid[1] * grid[2] // (4 if kind == "spatial_merge" else 1)
    model.train_parts(language_model=kind == "identity")
    model.train()
    ids, mask = token_ids(model, [count, count])
    visuals = pictures(2, side)
    states = model.tower(visuals.inputs, model.needed_layers)
    assert all(not state.requires_grad for state in states.states.values()), "no graph is kept"
    model(input_ids=ids, attention_mask=mask, labels=ids, visuals=visuals).loss.backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    with_gradient -= {n for n in with_gradient if "language_model" in n or "lm_head" in n}
    projector = {n for n, _ in model.named_parameters() if "multi_modal_projector" in n}
    unused = {n for n in projector if n.endswith(("k_proj.bias", "key.bias", "mask_token"))}
    assert with_gradient | unused == projector


def test_a_copied_block_of_any_tower_starts_at_the_pretrained_function():
    for name in set(TOWERS) - {"convnext"}:
        model = model_of(
            TOWERS[name](), projector_type="vitsplit", frozen_layers=[], tuned_layers=1
        )
        layers = [*model.needed_layers, model.tower.num_layers - 1]
        with torch.no_grad():
            states = model.tower(pictures(2).inputs, layers)
            task = model.projector._task(states)
            wanted = states.patches(states.states[layers[1]])
        torch.testing.assert_close(task, wanted, rtol=1e-4, atol=1e-5)


def test_tower_states_are_those_that_transformers_exports():
    tower, visuals = native("clip"), pictures(2)
    pixels = visuals.inputs.pixel_values
    with torch.no_grad():
        wanted = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
        found = tower_of(tower)(visuals.inputs, range(5))
    assert found.extra == 1 and found.grids == [GRID] * 2
    for index, state in enumerate(wanted):
        torch.testing.assert_close(found.states[index], state)
    packed = tower_of(ours())
    with torch.no_grad():
        wanted = packed.model(pixels).hidden_states
        found = packed(visuals.inputs, range(5))
    for index, state in enumerate(wanted):
        torch.testing.assert_close(found.states[index], state.flatten(0, 1))


def test_pictures_and_clips_of_any_size_share_a_pack_with_vitsplit():
    model = model_of(ours(), projector_type="vitsplit")
    grids = [(1, 4, 4), (2, 3, 5), (1, 4, 4)]
    lengths = [t * h * w for t, h, w in grids]
    positions = torch.cat([torch.cartesian_prod(*map(torch.arange, grid)) for grid in grids])
    rows = torch.randn(sum(lengths), 3 * PATCH**2)
    pack = VisualInputs(None, rows, positions, torch.tensor(lengths), torch.tensor(grids))
    with torch.no_grad():
        together = model.encode(Visuals(pack, torch.arange(3)))["image"].pooler_output
    assert [len(item) for item in together] == lengths
    for number, start in enumerate((0, 16, 46)):
        part = slice(start, start + lengths[number])
        alone = VisualInputs(None, rows[part], positions[part], pack.lengths[number : number + 1],
                             pack.grids[number : number + 1])  # fmt: skip
        with torch.no_grad():
            (item,) = model.encode(Visuals(alone, torch.zeros(1).long()))["image"].pooler_output
        torch.testing.assert_close(item, together[number], rtol=1e-4, atol=1e-5)
    sparse = replace(pack, grids=torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="fill no grid"):
        model.encode(Visuals(sparse, torch.arange(3)))
    linear = model_of(ours(), projector_type="vitsplit", frozen_layers=[], tuned_layers=1)
    assert len(linear.encode(Visuals(sparse, torch.arange(3)))["image"].pooler_output) == 3


def changed_after_a_step(model, visuals, ids, mask):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    model(input_ids=ids, attention_mask=mask, labels=ids, visuals=visuals).loss.backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    torch.optim.AdamW(learning, 1e-2, weight_decay=0.0).step()
    return {name for name, p in model.named_parameters() if not p.equal(before[name])}


@pytest.mark.parametrize("tower", ["ours", "clip"])
def test_stage_1_changes_the_projector_and_stage_2_the_language_model_too(tower):
    for stage, parts in ((1, ("multi_modal_projector",)),
                         (2, ("multi_modal_projector", "language_model", "lm_head"))):  # fmt: skip
        model = model_of(TOWERS[tower]())
        model.train_parts(language_model=stage == 2)
        changed = changed_after_a_step(model, pictures(1), *token_ids(model, [PATCHES]))
        assert {name for name in changed if not any(part in name for part in parts)} == set()
        assert all(any(part in name for name in changed) for part in parts)
        assert all(p.grad is None for n, p in model.named_parameters() if "vision_tower" in n)


def test_convllava_trains_the_right_stages_and_gradients_reach_no_further():
    def stages(changed):
        return {int(n.split("stages.")[1][0]) + 1 for n in changed if "stages." in n}

    for tower_from, language_model, wanted in ((5, False, {5}), (3, True, {3, 4, 5}),
                                               (None, True, set())):  # fmt: skip
        model = model_of(grown_convnext())
        model.train_parts(language_model=language_model, tower_from=tower_from)
        grid = model.tower.grid_of(64, 64)
        changed = changed_after_a_step(model, pictures(1, 64), *token_ids(model, [1]))
        assert stages(changed) == wanted and grid == (1, 1, 1)
        assert not any("embeddings.patch" in name for name in changed)
        assert any("lm_head" in name for name in changed) == language_model
        touched = {n for n, p in model.named_parameters() if p.grad is not None}
        assert stages(touched) == wanted


def test_a_batch_of_text_gives_the_projector_a_gradient_of_exactly_zero():
    model = model_of(ours())
    model.train_parts(language_model=True)
    model.train()
    ids, mask = token_ids(model, [0, 0])
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    gradients = [p.grad for p in model.projector.parameters()]
    assert all(g is not None and not g.any() for g in gradients)
    assert model.lm_head.weight.grad.any()


def test_the_projector_file_has_llavas_names_and_loads_strictly(tmp_path):
    model = model_of(native("clip"))
    save_projector(model, tmp_path)
    stored = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
    assert sorted(stored) == [f"model.mm_projector.{n}" for n in
                              ("0.bias", "0.weight", "2.bias", "2.weight")]  # fmt: skip
    other = model_of(native("clip"))
    with torch.no_grad():
        other.projector[0].weight.zero_()
    load_projector(other, tmp_path / "mm_projector.bin")
    visuals = pictures(2)
    wanted, found = (torch.stack(m.encode(visuals)["image"].pooler_output) for m in (model, other))
    assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="no vitsplit of this size"):
        load_projector(model_of(ours(), projector_type="vitsplit"), tmp_path / "mm_projector.bin")
    fields = dict(vision_config=model.config.vision_config, text_config=model.config.text_config)
    llava = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        **fields, image_token_index=3, vision_feature_layer=-1)).eval()  # fmt: skip
    names = projector_to_transformers(stored)
    assert all(torch.equal(stored[n], t) for n, t in projector_from_transformers(names).items())
    llava.model.load_state_dict(names, strict=False)
    llava.model.vision_tower.load_state_dict(model.tower.model.state_dict())
    features = llava.get_image_features(visuals.inputs.pixel_values).pooler_output
    torch.testing.assert_close(torch.stack(list(features)), wanted)


CASES = {
    "ours": lambda: lmm_of(ours()),
    "vitsplit": lambda: lmm_of(native("clip"), projector_type="vitsplit"),
    "merge": lambda: lmm_of(ours(), projector_type="spatial_merge"),
    "crossget": lambda: lmm_of(ours(), reduction={"r": 2}, alignment_weight=0.1),
    "convllava": lambda: lmm_of(grown_convnext()),
    "lora": lambda: lmm_of(ours(), lora={"r": 4, "alpha": 8, "dropout": 0.0, "bias": "none"}),
}


def test_saved_models_load_in_a_fresh_process_with_the_same_logits(tmp_path):
    for name, make in CASES.items():
        lmm = make()
        lmm.model.save_pretrained(tmp_path / name)
        lmm.save_processors(tmp_path / name)
        side = lmm.model.config.vision_config.image_size
        grid = lmm.model.tower.grid_of(side, side)
        ids, mask = token_ids(lmm.model, [lmm.model.tokens_for(grid, grid[1] * grid[2])])
        visuals = pictures(1, side)
        with torch.no_grad():
            logits = lmm.model(input_ids=ids, attention_mask=mask, visuals=visuals).logits
        given = {"ids": ids, "mask": mask, "pixels": visuals.inputs.pixel_values, "logits": logits}
        torch.save(given, tmp_path / f"{name}.pt")
    script = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from eval_encoder.lmm.model.lmm import Visuals\n"
        "from eval_encoder.lmm.model.open import open_lmm\n"
        "from model_factory.llava.towers import VisualInputs\n"
        "for path in sorted(Path(sys.argv[1]).glob('*.pt')):\n"
        "    v = torch.load(path, weights_only=True)\n"
        "    lmm = open_lmm(path.with_suffix(''))\n"
        "    shown = Visuals(VisualInputs(v['pixels']), torch.zeros(1).long())\n"
        "    with torch.no_grad():\n"
        "        out = lmm.model(input_ids=v['ids'], attention_mask=v['mask'], visuals=shown)\n"
        "    assert torch.equal(out.logits, v['logits']), path\n"
        "    print(path.stem, lmm.image_processor.crop_size['height'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        part for name in sorted(CASES) for part in (name, "64" if name == "convllava" else "32")
    ]


def test_weights_that_are_missing_or_left_over_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    lmm = CASES["ours"]()
    lmm.model.save_pretrained(tmp_path)
    lmm.save_processors(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["strange"] = tensors.pop("model.multi_modal_projector.0.bias")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"multi_modal_projector\.0\.bias.*strange"):
        open_lmm(tmp_path)


def test_lora_learns_its_additions_only():
    model = CASES["lora"]().model
    model.train_parts(language_model=True)
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in learning)
    assert all("lora_" in name or "multi_modal_projector" in name for name in learning)


def test_a_higher_resolution_changes_the_grid_and_no_weight():
    model = ConvNextVisionModel.from_network(convnext())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    processor = transformers.CLIPImageProcessor()
    set_resolution(model, processor, 192)
    tower = tower_of(model)
    assert tower.grid_of(192, 192) == (1, 3, 3)
    picture = (torch.rand(100, 160, 3) * 255).byte().numpy()
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
    assert tower(VisualInputs(pixels), [0]).lengths == [9]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_convnext_is_an_eye_of_transformers_llava(tmp_path):
    vision = grown_convnext()
    config = transformers.LlavaConfig(
        vision_config=vision.config,
        text_config=model_of(ours()).config.text_config,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_index=3,
    )
    assert config.vision_config.hidden_size == 128
    model = transformers.LlavaForConditionalGeneration(config).eval()
    pixels = torch.randn(1, 3, 128, 192)
    assert model.model.vision_tower(pixels).hidden_states[-1].shape == (1, 6, 128)
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(do_resize=False, do_center_crop=False),
        tokenizer(),
        patch_size=64,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
    )
    picture = (torch.rand(128, 192, 3) * 255).byte().numpy()
    fed = processor(images=picture, text="<image> hello", return_tensors="pt")
    assert int((fed["input_ids"] == 3).sum()) == 6
    ids, pixels = fed["input_ids"], fed["pixel_values"]
    with torch.no_grad():
        wanted = model(input_ids=ids, pixel_values=pixels).logits
    model.save_pretrained(tmp_path)
    kind = transformers.LlavaForConditionalGeneration
    again, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids, pixel_values=pixels).logits, wanted)


def test_a_grown_stage_misses_nothing_but_itself_and_compute_grows_with_pixels():
    four = convnext(4)
    grown = grow_stage(four, width=128, depth=1)
    inherited = set(four.state_dict()) - {"layernorm.weight", "layernorm.bias"}
    new = set(grown.state_dict()) - inherited
    assert all(name.startswith(("encoder.stages.4.", "layernorm.")) for name in new)
    from torch.utils.flop_counter import FlopCounterMode

    flops = []
    for side in (768, 1536):
        tower = tower_of(ConvNextVisionModel.from_network(grown).to("meta"))
        with FlopCounterMode(display=False) as counter:
            tower(VisualInputs(torch.empty(1, 3, side, side, device="meta")), [0])
        flops.append(counter.get_total_flops())
    assert flops[1] / flops[0] == pytest.approx(4, rel=0.01)


def test_a_tower_that_is_saved_alone_sees_the_same(tmp_path):
    towers = {"ours": ours, "clip": lambda: native("clip"), "conv": grown_convnext}
    for name, make in towers.items():
        lmm = lmm_of(make())
        lmm.model.tower.model.save_pretrained(tmp_path / name)
        lmm.image_processor.save_pretrained(tmp_path / name)
        tower, processor = open_tower(tmp_path / name)
        assert processor.crop_size == lmm.image_processor.crop_size
        visuals = pictures(1, lmm.model.config.vision_config.image_size).inputs
        layers = lmm.model.needed_layers
        with torch.no_grad():
            wanted, found = lmm.model.tower(visuals, layers), tower_of(tower)(visuals, layers)
        assert all(torch.equal(found.states[i], wanted.states[i]) for i in layers)


def test_text_cross_tokens_of_zero_change_nothing():
    plain, reduced = model_of(ours()), model_of(ours(), reduction={"r": 0})
    ids = torch.randint(10, 300, (2, 7))
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, reduced(input_ids=ids).logits)


def test_every_text_cross_token_learns():
    model = model_of(ours(), reduction={"r": 2}, alignment_weight=0.1)
    model.train_parts(language_model=True)
    ids, mask = token_ids(model, [model.tokens_for(GRID, PATCHES)] * 2)
    model(input_ids=ids, attention_mask=mask, labels=ids, visuals=pictures(2)).loss.backward()
    assert (model.model.text_cross_tokens.weight.grad.abs().sum(dim=-1) > 0).all()
    assert (model.tower.cross_tokens.weight.grad[0].abs().sum(dim=-1) > 0).all()
    with pytest.raises(ValueError, match="CrossGET"):
        model_of(ours(), reduction={"r": 2}, projector_type="spatial_merge")


def test_every_picture_is_aligned_with_the_text_of_its_own_sample(monkeypatch):
    """Two pictures of the second sample, one of the first."""
    model = model_of(ours(), reduction={"r": 2}, alignment_weight=0.1).train()
    with torch.no_grad():  # at zero, the text's cross tokens are the same for all samples
        model.get_input_embeddings().weight[1].normal_()
    aligned, entered = [], []
    monkeypatch.setattr(
        lmm_model,
        "alignment_loss",
        lambda image, text_tokens, direction: (
            aligned.append((image, text_tokens)) or image.sum() * 0
        ),
    )
    original = TextCrossTokens.__exit__
    monkeypatch.setattr(
        TextCrossTokens,
        "__exit__",
        lambda cross, *error: entered.append(cross.seen) or original(cross, *error),
    )
    tokens = model.tokens_for(GRID, PATCHES)
    ids, mask = token_ids(model, [tokens, 2 * tokens])
    ids[1, 0] = 7  # samples that begin alike would have the same token
    visuals = replace(pictures(3), samples=torch.tensor([0, 1, 1]))
    model(input_ids=ids, attention_mask=mask, labels=ids, visuals=visuals)
    (image, text), seen = aligned[0], torch.stack(entered[0])
    assert image.shape[1] == text.shape[1] == 3 and not torch.equal(seen[0, 0], seen[0, 1])
    assert torch.equal(text, seen[:, [0, 1, 1]].float())


def test_the_share_of_a_batch_counts_the_tokens_that_have_a_loss():
    """A first token is predicted by nothing, whatever its label."""
    labels = torch.tensor([[5, 6, -100, -100], [-100, 7, 8, 9]])
    assert _share(labels, num_items=torch.tensor(8)) == 4 / 8
    assert _share(labels, num_items=None) == 1


def test_models_are_built_on_the_meta_device():
    for fields in ({}, {"projector_type": "vitsplit"}, {"reduction": {"r": 2}}):
        config = model_of(native("clip"), **fields).config
        with torch.device("meta"):
            model = LmmForConditionalGeneration(config)
        assert all(p.is_meta for p in model.parameters())
