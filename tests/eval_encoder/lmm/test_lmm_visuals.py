"""What a tower is shown of pictures, clips, packed clips and mosaics; tiles of one picture."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from lmm_parts import PATCH, SIDE, lmm_of, model_of, native, ours
from PIL import Image

from data_pipeline.__main__ import main as data_pipeline
from data_pipeline.embedded.clips import write_clip
from data_pipeline.embedded.motion_shapes import render_clip
from data_pipeline.errors import DataPipelineError, RejectedInput
from data_pipeline.shards.manifest import load_manifest
from eval_encoder.lmm.data.conversation import Visual
from eval_encoder.lmm.data.dataset import Collator, Example, collate_visuals, visual_tokens
from eval_encoder.lmm.data.visuals import VisualReader, pad_to_square
from eval_encoder.lmm.generate import visual_config
from eval_encoder.lmm.model.cross_tokens import TextCrossTokens
from eval_encoder.lmm.trainer import check_one_size
from model_factory.packing import CLIP_MEAN, patchify


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """clip.mp4, wide.png, shards/ and mosaics/ of the clip at patch 8."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "clips").mkdir()
    write_clip(folder / "clips" / "clip.mp4", render_clip(4, 0, 0, "easy", 64))
    noise = np.random.default_rng(0).integers(0, 255, (41, 70, 3)).astype(np.uint8)
    Image.fromarray(noise).save(folder / "wide.png")
    pack = ["pack", folder / "clips", "--output", folder / "shards", "--size", "64"]
    pack += ["--patch-size", "8", "--budget", "128", "--gop", "64"]
    data_pipeline([str(part) for part in pack])
    mosaics = ["export", folder / "shards", "--output", folder / "mosaics"]
    data_pipeline([str(part) for part in mosaics])
    return folder


def reader(tower, folder, **options):
    lmm = lmm_of(tower)
    return VisualReader(replace(visual_config(lmm), **options), lmm.image_processor, folder)


@pytest.mark.parametrize("shape", [(41, 70), (70, 41), (40, 71), (5, 5)])
def test_padding_is_that_of_transformers_and_keeps_the_picture_in_the_middle(shape):
    picture = np.random.default_rng(1).integers(0, 255, (*shape, 3)).astype(np.uint8)
    square = pad_to_square(picture, CLIP_MEAN)
    side, (top, left) = max(shape), ((max(shape) - n) // 2 for n in shape)
    assert square.shape == (side, side, 3)
    assert np.array_equal(square[top : top + shape[0], left : left + shape[1]], picture)
    outside = np.ones((side, side), bool)
    outside[top : top + shape[0], left : left + shape[1]] = False
    assert (square[outside] == (122, 116, 104)).all()
    assert pad_to_square(square, CLIP_MEAN) is square
    sizes = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    clip = transformers.CLIPImageProcessor(**sizes)
    llava = transformers.LlavaImageProcessor(**sizes, do_pad=True)
    ours_, theirs = (p(images=Image.fromarray(x), return_tensors="pt")["pixel_values"]
                     for p, x in ((clip, square), (llava, picture)))  # fmt: skip
    assert torch.equal(ours_, theirs)


def test_a_grid_of_a_padded_picture_crops_back_to_its_content(media):
    item = reader(ours(), media)(Visual("image", "wide.png"))
    assert item.grids == ((1, 4, 4),) and item.rows.shape == (16, 3 * PATCH**2)
    bands = item.rows.view(4, 4, 3, PATCH, PATCH).permute(2, 0, 3, 1, 4).reshape(3, SIDE, SIDE)
    content = round(SIDE * 41 / 70)
    top = (SIDE - content) // 2
    assert bands[:, : top - 1].abs().max() < 0.05, "the mean colour is zero once normalised"
    assert bands[:, top + 2 : top + content - 2].abs().max() > 0.5


def test_frames_and_codec_patches_of_a_clip_have_their_positions(media):
    visual = Visual("video", "clips/clip.mp4")
    frames = reader(ours(), media, video_size=64, num_frames=4)(visual)
    assert frames.grids == ((4, 8, 8),) and len(frames.rows) == 256
    assert sorted(set(frames.positions[:, 0].tolist())) == [7, 23, 39, 55]
    codec = {"video_size": 64, "video_view": "codec", "num_tokens": 128}
    sparse = reader(ours(), media, **codec)(visual)
    assert sparse.grids == (None,) and len(sparse.rows) == 128
    assert len(set(sparse.positions[:, 0].tolist())) > 8
    pictures = reader(native("clip"), media, num_frames=4)(visual)
    assert pictures.pictures.shape == (4, 3, SIDE, SIDE)
    assert visual_tokens(pictures, lambda grid, patches: patches) == 4 * 16
    same = reader(ours(), media, video_size=SIDE, num_frames=4)(visual)
    torch.testing.assert_close(patchify(pictures.pictures, PATCH).flatten(0, 1), same.rows)
    with pytest.raises(ValueError, match="codec patches need an encoder of ours"):
        reader(native("clip"), media, **codec)


def test_a_clip_that_decord_cannot_copy_is_read_all_the_same(media):
    """It fails on widths of 16 and 48 pixels."""
    write_clip(media / "narrow.mp4", render_clip(0, 1, 0, "easy", 48))
    item = reader(ours(), media, num_frames=2)(Visual("video", "narrow.mp4"))
    assert item.grids == ((2, 4, 4),)


def test_packed_clips_and_mosaics_are_the_same_patches(media):
    read = reader(ours(), media)
    manifest = load_manifest(media / "shards")
    key = manifest.locate(0)[1]["key"]
    packed = read(Visual("video", f"shards#{key}"))
    mosaics = read(Visual("video", f"mosaics/assets/{key}"))
    order = sorted(range(len(packed.positions)), key=lambda i: packed.positions[i].tolist())
    assert torch.equal(packed.positions[order], mosaics.positions)
    torch.testing.assert_close(packed.rows[order], mosaics.rows)
    with pytest.raises(DataPipelineError, match="no clip with the key 'x'"):
        read(Visual("video", "shards#x"))
    with pytest.raises(ValueError, match="need an encoder of ours"):
        reader(native("clip"), media)(Visual("video", f"shards#{key}"))
    (media / "broken.png").write_bytes(b"\x89PNG no")
    with pytest.raises(RejectedInput, match="broken.png"):
        read(Visual("image", "broken.png"))


def test_pictures_and_clips_meet_in_one_batch_in_order(media):
    read = reader(ours(), media, video_size=64, num_frames=2)
    items = [read(Visual("image", "wide.png")), read(Visual("video", "clips/clip.mp4"))]
    visuals = collate_visuals([[items[0]], [], [items[1], items[0]]])
    assert visuals.samples.tolist() == [0, 2, 2]
    assert visuals.inputs.lengths.tolist() == [16, 128, 16]
    assert visuals.inputs.grids.tolist() == [[1, 4, 4], [2, 8, 8], [1, 4, 4]]
    assert collate_visuals([[], []]) is None
    read = reader(native("clip"), media, video_size=64)
    items = [read(Visual("image", "wide.png")), read(Visual("video", "clips/clip.mp4"))]
    with pytest.raises(ValueError, match="set --video_size"):
        collate_visuals([items])


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_neither_seen_nor_learned(left):
    examples = [Example([5, 6, 7], [-100, 6, 7], []), Example([8], [8], [])]
    batch = Collator(pad_token_id=3, left=left)(examples)
    short = {"input_ids": [8, 3, 3], "attention_mask": [1, 0, 0], "labels": [8, -100, -100]}
    whole = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, 6, 7]}
    for name, rows in batch.items():
        wanted = short[name][::-1] if left else short[name]
        assert rows.tolist() == [whole[name], wanted]


def test_several_sizes_in_one_batch_are_refused_where_processes_would_wait(media):
    read = reader(ours(), media, num_frames=2)
    items = [read(Visual("image", "wide.png")), read(Visual("video", "clips/clip.mp4"))]
    visuals = collate_visuals([items])
    check_one_size(model_of(ours()), visuals)
    check_one_size(model_of(ours(), projector_type="vitsplit"), visuals)  # sides are equal
    with pytest.raises(ValueError, match="in one batch under ZeRO-3"):
        check_one_size(model_of(ours(), reduction={"r": 2}), visuals)
    read = reader(ours(), media, num_frames=2, video_size=64)
    visuals = collate_visuals([[items[0], read(Visual("video", "clips/clip.mp4"))]])
    with pytest.raises(ValueError, match="in one batch under ZeRO-3"):
        check_one_size(model_of(ours(), projector_type="vitsplit"), visuals)


def test_a_first_token_is_that_of_the_sample_whatever_the_padding():
    model = model_of(ours(), reduction={"r": 2})
    with torch.no_grad():
        model.model.text_cross_tokens.weight.normal_()
    ids = torch.randint(10, 300, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        both = model(input_ids=ids, attention_mask=mask).logits[1, -1]
        alone = model(input_ids=ids[1:, 3:], attention_mask=mask[1:, 3:]).logits[0, -1]
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-5)
    with TextCrossTokens(model.model, mask, prefill=False) as cross, torch.no_grad():
        model.model.language_model(input_ids=ids)
    assert cross.seen == [], "nothing is replaced where there is a cache"


def test_tiles_of_one_picture_work_through_transformers_llava_next():
    """The canvas, its tiles and the tokens left after unpadding; the thumbnail comes first."""
    vision = ours()
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    config = transformers.LlavaNextConfig(
        vision_config=vision.config,
        text_config=model_of(vision).config.text_config,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_index=3,
    )
    model = transformers.LlavaNextForConditionalGeneration(config).eval()
    processor = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=pinpoints,
    )
    picture = Image.fromarray((np.random.default_rng(0).random((50, 64, 3)) * 255).astype(np.uint8))
    fed = processor(images=picture, return_tensors="pt")
    # 64 x 64 keeps 64 x 50 pixels of the picture, 64 x 32 only 41 x 32
    assert fed["pixel_values"].shape == (1, 1 + 4, 3, SIDE, SIDE)
    plain = transformers.CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False
    )
    thumbnail = plain(images=picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(fed["pixel_values"][0, 0], thumbnail[0])
    kept = int(50 * 8 / 64)  # rows of the 8 x 8 grid that hold the picture
    dropped = (8 - kept) // 2
    wanted = 16 + (8 - 2 * dropped) * (8 + 1)
    with torch.no_grad():
        (features,) = model.get_image_features(
            fed["pixel_values"], fed["image_sizes"]
        ).pooler_output
    assert len(features) == wanted
