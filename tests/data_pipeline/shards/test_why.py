"""The pictures of why patches are selected: what they show is what packing selects, and by what."""

import numpy as np
import pytest
from PIL import Image

from data_pipeline.__main__ import main
from data_pipeline.codec.patches import RULES, SelectionConfig
from data_pipeline.codec.saliency import SaliencyConfig
from data_pipeline.errors import DataPipelineError, RejectedInput
from data_pipeline.shards.drawing import INTRA
from data_pipeline.shards.sample_builder import SampleConfig, build_sample
from data_pipeline.shards.schema import decode_array
from data_pipeline.shards.why import (
    CHOSEN,
    COLUMNS,
    DIMMED,
    GIF_FRAMES,
    animate_why,
    draw_why,
    explain,
    frames_shown,
    outlined,
    save_why,
    score_picture,
    why_rows,
)

PATCH = 16
STILL = np.full((112, 112, 3), 90, np.uint8)
SMALL = {"size": 112, "patch_size": PATCH, "num_frames": 32, "gop": 16, "budget": 180}
CODEC_ROWS = ["Motion as coded", "Motion of objects", "Residual"]
BEFORE_SCORE = {
    "i_frames_first": CODEC_ROWS,
    "published": CODEC_ROWS,
    "published_llava": CODEC_ROWS,
    "differences": ["Difference"],
    "i_frames_random": [],
    "random": [],
}


def config(**selection) -> SampleConfig:
    return SampleConfig(selection=SelectionConfig(**selection), **SMALL)


@pytest.fixture(scope="module")
def video(shared):
    return shared / "videos" / "h264_no_bframes.mkv"


@pytest.fixture(scope="module")
def why(video):
    return explain(video, config())


def test_what_is_drawn_is_what_packing_selects(video, why):
    members, info = build_sample(video, source="v", config=why.config)
    positions = decode_array(members["positions.npy"], member="positions.npy", name="v")
    times = why.clip.times[np.nonzero(why.selected)[0]]
    drawn = sorted(zip(times, *np.nonzero(why.selected)[1:], strict=True))
    assert [tuple(map(int, p)) for p in drawn] == sorted(map(tuple, positions.astype(int).tolist()))
    assert int(why.selected.sum()) == info.num_patches == sum(map(sum, why.counts))


def test_selected_patches_are_outlined_where_they_are(why):
    frame = int(np.argmax([num_inter for _, num_inter in why.counts]))
    source = why.clip.frames[frame]
    drawn = outlined(why, frame)
    rows, columns = np.nonzero(why.selected[frame])
    assert 0 < len(rows) < why.selected[frame].size
    for row, column in np.ndindex(why.selected[frame].shape):
        box = np.s_[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
        middle = np.s_[PATCH // 2, PATCH // 2]
        if not why.selected[frame, row, column]:
            assert np.array_equal(drawn[box], (source[box] * DIMMED).astype(np.uint8))
            continue
        assert np.array_equal(drawn[box][middle], source[box][middle])
        # an edge is drawn where the neighbour above is not selected
        above = row > 0 and why.selected[frame, row - 1, column]
        assert (drawn[box][0, PATCH // 2] == CHOSEN).all() == (not above)
    assert (outlined(why, 0)[0] == INTRA).all()  # an I-frame, whole


def test_heat_is_ordered_as_the_scores(why):
    frame = int(np.argmax([num_inter for _, num_inter in why.counts]))
    heat = score_picture(why, frame)[::PATCH, ::PATCH].astype(int)
    brightness = heat.sum(axis=-1).ravel()  # inferno's colours grow from black to pale yellow
    by_score = brightness[np.argsort(why.scores[frame].ravel(), kind="stable")]
    assert np.diff(by_score).min() >= -3  # rounding of its three channels
    assert by_score[-1] > by_score[0] + 100
    assert (score_picture(why, 0) == INTRA).all()


def test_rows_have_titles_times_and_units(why):
    shown = frames_shown(why, COLUMNS)
    rows = why_rows(why, shown)
    frame, motion, objects, residual, score, selected = rows
    assert [row.title for row in rows] == ["Frame", *CODEC_ROWS, "Score", "Selected patches"]
    assert frame.cells[1].caption == f"{why.clip.seconds[shown[1]]:.2f} s, P"
    assert motion.notes[-1].endswith("px per frame") and motion.cells[1].caption.endswith(" px")
    assert "median" in " ".join(objects.notes)
    assert residual.notes[-1].endswith("luma steps")
    lowest = why.scores[why.selected & ~why.clip.is_i_frame[:, None, None]].min()
    assert score.notes[-1] == f"lowest selected: {lowest:.3g}"
    assert selected.cells[0].caption == "49 I" and motion.cells[0].caption == "none"
    numbers = [num_inter for _, num_inter in why.counts]
    assert shown[0] == 0 and len(shown) == COLUMNS and max(numbers) in [numbers[t] for t in shown]
    assert frames_shown(why, 99) == list(range(32))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_draws_what_it_ranks_by(video, rule):
    why = explain(video, config(rule=rule))
    titles = [row.title for row in why_rows(why, [0, 9])]
    assert titles == ["Frame", *BEFORE_SCORE[rule], "Score", "Selected patches"]
    sheet = draw_why(why)
    first, second = animate_why(why, [0, 9])
    assert sheet.width > COLUMNS * 112 and first.size == second.size
    assert sum(map(sum, why.counts)) == 180
    taken_first = sum(num_intra for num_intra, _ in why.counts)
    whole = {"published": 0, "random": 0, "published_llava": 49}.get(rule, 98)
    assert taken_first == whole


def test_a_score_without_motion_has_no_motion_rows(video):
    for saliency in (SaliencyConfig(score="bits"), SaliencyConfig(motion_weight=0)):
        rows = why_rows(explain(video, config(saliency=saliency)), [0, 9])
        assert [row.title for row in rows] == ["Frame", "Residual", "Score", "Selected patches"]


def test_a_static_clip_says_that_scores_are_not_used(tmp_path):
    import av

    with av.open(str(tmp_path / "still.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 112
        stream.pix_fmt = "yuv420p"
        for _ in range(32):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(STILL, format="rgb24")))
        container.mux(stream.encode(None))
    why = explain(tmp_path / "still.mp4", config())
    score, selected = why_rows(why, [0, 9])[-2:]
    assert why.is_static and score.notes[-1] == "not used: a static clip"
    assert {num_inter for _, num_inter in why.counts} <= {0, 49, 180 - 98 - 49}
    assert selected.cells[0].caption == "49 I" and draw_why(why).height > 6 * 112


def test_padding_is_never_selected_nor_moves(video):
    why = explain(video, SampleConfig(**{**SMALL, "fit": "pad"}))
    padded = ~why.clip.whole_patches(PATCH)
    p_frames = ~why.clip.is_i_frame
    assert padded.any() and not why.selected[p_frames][:, padded].any()
    assert not why.compensated[:, 0].any()  # a wide picture: its first row of cells is padding


def test_animations_have_a_frame_per_frame_shown(video, tmp_path):
    save_why(video, config(), output=tmp_path / "why.gif")
    save_why(video, config(), output=tmp_path / "why.webp")
    with Image.open(tmp_path / "why.gif") as gif, Image.open(tmp_path / "why.webp") as webp:
        assert gif.n_frames == GIF_FRAMES and webp.n_frames == 32
        assert gif.size == webp.size
    assert max(path.stat().st_size for path in tmp_path.iterdir()) < 1.5e6


def test_errors_name_what_is_wrong(shared, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    out = tmp_path / "out.png"
    with pytest.raises(DataPipelineError, match=r"a\.png is a picture"):
        explain(tmp_path / "a.png", config())
    with pytest.raises(RejectedInput, match=r"missing: .*none\.mp4"):
        explain(tmp_path / "none.mp4", config())
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(RejectedInput, match=r"text\.mp4"):
        explain(tmp_path / "text.mp4", config())
    with pytest.raises(RejectedInput, match="no_motion_vectors"):
        explain(shared / "videos" / "av1.mkv", config(vectors="native"))
    with pytest.raises(ValueError, match=r"must end in \.png"):
        save_why(tmp_path / "none.mp4", config(), output=tmp_path / "out.bmp")
    assert not out.exists()


def test_the_command_draws_and_refuses_what_does_not_fit(video, tmp_path, capsys):
    flags = ["--size", "112", "--num-frames", "16", "--budget", "60", "--score", "mean"]
    out = tmp_path / "why.png"
    assert main(["view", "--why", str(video), "--output", str(out), *flags]) == 0
    with Image.open(out) as sheet:
        assert sheet.format == "PNG"
    for arguments, message in (
        ([], "give one of the two"),
        (["DIR", "--why", str(video)], "give one of the two"),
        (["--why", str(video), "--samples", "1"], "--samples are of a packed folder"),
        (["DIR", "--rule", "random"], "selected already"),
        (["--why", str(tmp_path / "no.mp4")], "missing"),
    ):
        assert main(["view", "--output", str(tmp_path / "x.png"), *arguments]) == 1
        assert message in capsys.readouterr().err
