"""Brief events: only the event tells the class, and its truth is where the pixels are."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from data_pipeline.embedded.brief_events import (
    CLASSES,
    DARK,
    DIRECTIONS,
    DURATIONS,
    FIRST,
    MARGIN,
    NUM_FRAMES,
    RADII,
    SCENES,
    SECOND,
    Event,
    EventFrame,
    decidable,
    draw_event,
    event_colour,
    load_events,
    patch_tokens,
    render_clip,
    write_brief_events,
)
from data_pipeline.embedded.clips import VAL_INDEX
from data_pipeline.embedded.drawing import COLOURS
from model_factory.files import DamagedFile

INDICES = range(0, 400, 8)


def events_of(name: str, indices=INDICES) -> list[Event]:
    return [draw_event(CLASSES.index(name), seed=0, index=index) for index in indices]


def lit(event: Event) -> list[EventFrame]:
    return [frame for frame in event.frames if frame.phase != DARK]


@pytest.mark.parametrize(
    "label, index, scene, digest",
    [
        (0, 8, "still", "c5075e512c49d63e"),
        (5, 3, "busy", "565737d0a0460504"),
        (7, 1 << 24, "pan", "8e3f784daa4743ae"),
    ],
)
def test_clips_are_those_of_the_first_version_to_the_last_bit(label, index, scene, digest):
    clip = render_clip(label, seed=0, index=index, scene=scene, size=64)
    assert clip.shape == (NUM_FRAMES, 64, 64, 3) and clip.dtype == np.uint8
    assert hashlib.sha256(clip.tobytes()).hexdigest()[:16] == digest


def test_an_index_shows_the_same_under_every_label_but_for_its_event():
    for index, scene in ((5, "still"), (VAL_INDEX + 9, "busy"), (17, "pan")):
        events = [draw_event(label, 3, index, scene=scene, size=64) for label in range(8)]
        factors = {(e.duration, e.radius, e.scene, e.start, e.colour) for e in events}
        assert len(factors) == 1
        clips = [render_clip(label, 3, index, scene=scene, size=64) for label in range(8)]
        first, duration = events[0].start, events[0].duration
        outside = np.r_[0:first, first + duration : NUM_FRAMES]
        assert 0 < first and first + duration < NUM_FRAMES
        for clip in clips[1:]:
            assert np.array_equal(clip[outside], clips[0][outside])
        assert len({clip.tobytes() for clip in clips}) == 8


def test_a_scene_of_choice_changes_nothing_of_the_event():
    for index in (0, 8, 16):
        events = {scene: draw_event(2, 0, index, scene=scene) for scene in ("mixed", *SCENES)}
        assert [events[scene].scene for scene in SCENES] == list(SCENES)
        assert len({event.frames for event in events.values()}) == 1


def test_the_disc_is_where_the_truth_has_it_and_nowhere_in_the_dark():
    for label in range(8):
        for index in (8 * label, 8 * label + 161):
            event = draw_event(label, seed=1, index=index, scene="still")
            clip = render_clip(label, seed=1, index=index, scene="still").astype(int)
            for frame in event.frames:
                here = clip[frame.t, round(frame.y), round(frame.x)]
                if frame.phase != DARK:
                    wanted = 255 * np.array(COLOURS[event_colour(event, frame)])
                    assert np.abs(here - wanted).max() < 12
            # the camera shakes by parts of a pixel, so a dark frame is near the frames around it
            dark = [frame for frame in event.frames if frame.phase == DARK]
            if not dark:
                continue
            others = render_clip(0, seed=1, index=index, scene="still").astype(int)
            for frame in dark:
                y, x = round(frame.y), round(frame.x)
                before = others[event.start - 1, y, x]
                assert np.abs(clip[frame.t, y, x] - before).max() < 60


def test_factors_cover_their_ranges_and_every_class_meets_each_equally_often():
    events = [draw_event(index % 8, seed=0, index=index) for index in range(960)]
    for factor in ("duration", "scene"):
        tables = [Counter(getattr(e, factor) for e in events if e.label == n) for n in range(8)]
        assert all(table == tables[0] for table in tables)
    assert {event.duration for event in events} == set(DURATIONS)
    assert {event.scene for event in events} == set(SCENES)
    radii = np.array([event.radius for event in events])
    assert RADII[0] <= radii.min() < 2.1 and 7.8 < radii.max() <= RADII[1]
    assert 0.4 < (radii < 4).mean() < 0.6


def test_discs_lie_whole_inside_the_picture():
    for size in (48, 112):
        for name in CLASSES:
            for index in range(60):
                event = draw_event(CLASSES.index(name), seed=2, index=index, size=size)
                for frame in event.frames:
                    assert MARGIN - 0.01 <= min(frame.x, frame.y)
                    assert max(frame.x, frame.y) <= size - MARGIN + 0.01


def test_every_class_is_well_defined_at_every_duration():
    seen = Counter()
    for name in CLASSES:
        for event in events_of(name, range(0, 800, 8)):
            seen[name, event.duration] += 1
            times = [frame.t for frame in event.frames]
            assert times == list(range(event.start, event.start + event.duration))
            phases = [frame.phase for frame in event.frames]
            places = [(frame.x, frame.y) for frame in lit(event)]
            halves = Counter(phases)
            if name in DIRECTIONS:
                along = np.array(DIRECTIONS[name])
                steps = np.diff(places, axis=0)
                assert np.all(steps @ along > 0) and np.allclose(steps @ along[::-1], 0)
                assert len(places) == event.duration
            elif name in ("red_then_blue", "blue_then_red"):
                assert halves[FIRST] == halves[SECOND] > 0 and halves[DARK] == event.duration % 2
                assert len(set(places)) <= 2
                colours = [event_colour(event, frame) for frame in lit(event)]
                first, _, second = name.split("_")
                assert colours == [first] * halves[FIRST] + [second] * halves[SECOND]
            else:
                assert len(set(places)) == 1
                assert phases[0] == FIRST and phases[-1] == SECOND
                gaps = halves[DARK]
                if name == "one_blink":
                    assert gaps == 0
                else:
                    assert gaps >= 1 and halves[FIRST] == halves[SECOND] > 0
                    assert phases == sorted(phases, key=[FIRST, DARK, SECOND].index)
    assert set(seen) == {(name, duration) for name in CLASSES for duration in DURATIONS}


def test_all_classes_show_discs_at_the_same_places_in_the_same_colours():
    """Over the frames of events, positions and colours have one distribution. Opposite darts and
    orders even show the same frames, in another order of time."""
    for one, other in (("dart_left", "dart_right"), ("dart_up", "dart_down")):
        for a, b in zip(events_of(one), events_of(other), strict=True):
            assert {(f.x, f.y) for f in a.frames} == {(f.x, f.y) for f in b.frames}
    quantiles = {}
    for name in CLASSES:
        events = events_of(name, range(2400))
        # one lit frame of each clip: frames of one clip are not independent
        any_frame = [lit(event)[i % len(lit(event))] for i, event in enumerate(events)]
        x = np.array([frame.x for frame in any_frame])
        y = np.array([frame.y for frame in any_frame])
        red = np.mean([event_colour(e, f) == "red" for e, f in zip(events, any_frame, strict=True)])
        levels = (0.05, 0.25, 0.5, 0.75, 0.95)
        quantiles[name] = [*np.quantile(x, levels), *np.quantile(y, levels)]
        assert abs(red - 0.5) < 0.03, name
    spread = np.ptp(list(quantiles.values()), axis=0)
    assert spread.max() < 5, spread  # of 112 pixels


def test_no_single_frame_of_an_event_tells_the_class():
    """A nearest neighbour on single lit frames stays near chance (12.5 %)."""
    frames, labels = [], []
    for index in range(160):
        label = index % 8
        event = draw_event(label, seed=0, index=index, scene="still", size=48)
        clip = render_clip(label, seed=0, index=index, scene="still", size=48)
        own = lit(event)
        frames.append(clip[own[index % len(own)].t].astype(np.float32).ravel())
        labels.append(label)
    frames, labels = np.stack(frames), np.array(labels)
    distances = ((frames[:, None] - frames[None]) ** 2).sum(-1)
    np.fill_diagonal(distances, np.inf)
    assert (labels[distances.argmin(1)] == labels).mean() < 0.22


def event(name: str, *frames: tuple[int, float, float, int]) -> Event:
    return Event(
        label=CLASSES.index(name),
        duration=len(frames),
        radius=3.0,
        scene="still",
        start=frames[0][0],
        colour="red",
        frames=tuple(EventFrame(*frame) for frame in frames),
    )


def token(t: int, left: float, top: float, side: float = 16) -> list[float]:
    return [t, left, top, left + side, top + side]


def test_what_tokens_must_show_of_a_dart():
    dart = event("dart_right", (5, 10.0, 20.0, FIRST), (6, 20, 20, FIRST), (7, 30, 20, SECOND))
    assert decidable(dart, [token(5, 0, 16), token(7, 16, 16)])
    assert not decidable(dart, [token(5, 0, 16)])
    assert not decidable(dart, [token(5, 0, 16), token(5, 8, 16)])  # one frame, twice
    assert not decidable(dart, [token(5, 0, 16), token(6, 0, 16)])  # the disc has left this place
    assert not decidable(dart, [token(5, 0, 16), token(4, 16, 16)])  # a frame without the event
    assert not decidable(dart, np.zeros((0, 5)))


def test_a_box_holds_its_left_and_top_border_alone():
    dart = event("dart_right", (5, 16.0, 32.0, FIRST), (6, 31.99, 47.99, SECOND))
    assert decidable(dart, [token(5, 16, 32), token(6, 16, 32)])
    assert not decidable(dart, [token(5, 0, 32), token(6, 16, 32)])
    assert not decidable(dart, [token(5, 16, 16), token(6, 16, 32)])


def test_what_tokens_must_show_of_flashes_and_blinks():
    first, dark, second = token(5, 0, 0), token(6, 0, 0), token(7, 0, 0)
    order = event("red_then_blue", (5, 8, 8, FIRST), (6, 8, 8, DARK), (7, 40, 40, SECOND))
    assert decidable(order, [first, token(7, 32, 32)])
    assert not decidable(order, [first, dark, second])
    one = event("one_blink", (5, 8, 8, FIRST), (6, 8, 8, FIRST), (7, 8, 8, SECOND))
    assert decidable(one, [dark, second]) and not decidable(one, [first, dark])
    two = event("two_blinks", (5, 8, 8, FIRST), (6, 8, 8, DARK), (7, 8, 8, SECOND))
    assert decidable(two, [first, dark, second])
    assert not decidable(two, [first, second]) and not decidable(two, [first, dark])


def test_all_patches_decide_every_clip_and_none_of_other_frames_any():
    grid = np.stack(np.meshgrid(range(64), range(7), range(7), indexing="ij"), -1).reshape(-1, 3)
    for index in range(80):
        drawn = draw_event(index % 8, seed=0, index=index)
        inside = (drawn.start <= grid[:, 0]) & (grid[:, 0] < drawn.start + drawn.duration)
        assert decidable(drawn, patch_tokens(grid, side=16))
        assert not decidable(drawn, patch_tokens(grid[~inside], side=16))


def test_a_written_set_has_its_truth_and_is_completed_not_rewritten(tmp_path):
    write_brief_events(tmp_path, num_train=8, num_val=8, size=64, workers=1)
    events = load_events(tmp_path)
    for split, first in (("train", 0), ("val", VAL_INDEX)):
        lines = (tmp_path / f"{split}.csv").read_text().splitlines()
        assert len(lines) == 8
        for i, line in enumerate(lines):
            name, label = line.split(",")
            assert events[name] == draw_event(int(label), seed=0, index=first + i, size=64)
    assert len(events) == 16
    kept, lost = (tmp_path / "clips" / f"train_0000{i}.mp4" for i in (1, 2))
    before, content = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    write_brief_events(tmp_path, num_train=8, num_val=8, size=64, workers=1)
    assert kept.stat().st_mtime_ns == before and lost.read_bytes() == content
    with pytest.raises(ValueError, match="holds clips of other settings .*scene"):
        write_brief_events(tmp_path, num_train=8, num_val=8, size=64, scene="pan")
    path = tmp_path / "events.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"radius": 2', b'"radius": 3'))
    with pytest.raises(DamagedFile, match="events.jsonl line .* changed since it was written"):
        load_events(tmp_path)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"scene": "dark"}, "scene is 'dark'; choose one of mixed, still, busy, pan"),
        ({"size": 63}, "size is 63; it must be even"),
        ({"size": 32}, "size is 32; it must be even and at least 48"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_written(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        write_brief_events(tmp_path / "set", num_train=8, num_val=8, **wrong)
    assert not (tmp_path / "set").exists()
