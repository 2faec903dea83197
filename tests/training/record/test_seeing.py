"""What a run shows: speed, MFU, pictures, a trace, a report; what the doctor sees; exports."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from forked import forked, forked_ranks

DEBUG = ("-m", "training.train_univit", "--preset", "debug")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Output of a short run of two ranks, with a trace of two steps."""
    output = tmp_path_factory.mktemp("finished")
    forked_ranks(2, *DEBUG, "--output", output, "--profile", 2)
    return output


@pytest.mark.e2e
@pytest.mark.dist
def test_a_run_leaves_a_report_with_pictures_and_its_facts(finished):
    report = (finished / "report.md").read_text()
    for text in (
        r"llava\_vit\_tiny\_ln",
        "loss/synthetic, first and last tenth",
        "MFU",
        "ranks: 2",
    ):
        assert text in report, text
    for name in ("loss", "throughput", "data_wait"):
        assert f"](report/{name}.png)" in report
        assert (finished / "report" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.e2e
@pytest.mark.dist
def test_tensorboard_holds_speed_settings_and_a_pack_as_picture(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    wanted = "loss/synthetic lr grad_norm tokens_per_s samples_per_s model_flops_per_s data_wait "
    wanted += "memory_gb bad_samples skipped_steps "
    wanted += "slowest_rank_own_s time/forward_s time/backward_s"
    assert set(wanted.split()) <= set(tags["scalars"])
    assert tags["images"] == ["pack/synthetic"]
    assert any("configuration" in tag for tag in tags["tensors"])
    speeds = [json.loads(line) for line in (finished / "speed.jsonl").read_text().splitlines()]
    assert [speed["step"] for speed in speeds] == [5, 10, 15, 20]
    for speed in speeds:
        parts = sum(value for name, value in speed.items() if name.startswith("time/"))
        assert parts == pytest.approx(speed["step_s"], rel=0.05)
        assert speed["model_flops_per_s"] > 0 and speed["fill"] == 1.0
        assert speed["mfu"] is None, "a CPU has no peak that holds for longer than a moment"


@pytest.mark.parametrize(
    ("peak", "line", "warnings"),
    [(None, "MFU not known", 0), (1e30, "MFU 0%", 0), (1.0, "MFU not known", 1)],
)
def test_mfu_is_a_share_of_a_known_peak_or_not_known(
    tmp_path, caplog, monkeypatch, peak, line, warnings
):
    from training.distributed import process_group
    from training.record.metrics import MetricLogger, StepCounts
    from training.record.speed import StepClock

    monkeypatch.setattr("training.record.metrics.peak_flops", lambda device: peak)
    caplog.set_level(logging.INFO, "t")
    with process_group() as ranks:
        clock = StepClock(ranks.device)
        metrics = MetricLogger(tmp_path, ranks, 2, 1, 0, clock, logging.getLogger("t"))
        for step in (1, 2):
            values = {"loss/a": 1.0, "lr": 1e-3, "grad_norm": 1.0}
            metrics.record(step, values, StepCounts(8, 80, 80, 10**9, 0, 0))
        metrics.close()
    assert caplog.text.count(f"| {line} |") == 2
    assert caplog.text.count("MFU is not known: ") == warnings
    speeds = [json.loads(text) for text in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [speed["mfu"] is None for speed in speeds] == [line == "MFU not known"] * 2


def test_the_peak_of_a_share_is_that_of_all_ranks(tmp_path, monkeypatch):
    from training.distributed import process_group
    from training.record.metrics import MetricLogger
    from training.record.speed import StepClock

    monkeypatch.setattr("training.record.metrics.peak_flops", lambda device: 1e9)
    with process_group() as ranks:
        four = replace(ranks, world_size=4)
        clock = StepClock(ranks.device)
        metrics = MetricLogger(tmp_path, four, 2, 1, 0, clock, logging.getLogger("t"))
        metrics.close()
    assert metrics._mfu(2e9) == 0.5


@pytest.mark.e2e
@pytest.mark.dist
def test_a_profile_is_a_chrome_trace_of_the_asked_steps(finished):
    trace = json.loads((finished / "trace.json").read_text())
    steps = {e["name"] for e in trace["traceEvents"] if e["name"].startswith("ProfilerStep")}
    assert len(steps) == 2


@pytest.mark.e2e
def test_a_dry_run_builds_everything_and_leaves_nothing(tmp_path):
    done = forked(*DEBUG, "--output", tmp_path / "run", "--dry-run")
    assert "trained one step" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.e2e
def test_a_checkpoint_is_exported_while_its_run_goes_on(finished, tmp_path):
    from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel

    done = forked("-m", "training.export", finished, "--output", tmp_path / "out")
    assert "step 20" in done.stdout
    ours, theirs = (
        LlavaViTPackingModel.from_pretrained(folder / "hf").state_dict()
        for folder in (tmp_path / "out", finished)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    sizes = [
        json.loads((f / "hf" / "config.json").read_text())["image_size"]
        for f in (tmp_path / "out", finished)
    ]
    assert sizes[0] == sizes[1]
    forked(
        "-m", "training.export", finished / "checkpoints/step_00000010", "--output", tmp_path / "b"
    )
    done = forked("-m", "training.export", tmp_path, "--output", tmp_path / "c", check=False)
    assert done.returncode == 6 and "no checkpoint" in done.stderr


@pytest.mark.dist
def test_the_doctor_measures_ranks_and_names_what_is_wrong(tmp_path):
    done = forked_ranks(2, "-m", "training.doctor", "--output", tmp_path)
    for text in ("versions", "/dev/shm", "output", "2 on 1 nodes", "summed over all ranks"):
        assert text in done.stdout
    assert "nothing needs fixing" in done.stdout and not list(tmp_path.iterdir())
    done = forked("-m", "training.doctor", "--output", "/dev/null/x", check=False)
    assert done.returncode == 1 and "FIX   output" in done.stdout
    assert "summed over all ranks" not in done.stdout, "one rank exchanges nothing"
    assert "note  exchange" in done.stdout


def test_a_pack_is_drawn_as_its_items_patch_by_patch(packed):
    from data_pipeline.datasets import resolve_dataset
    from data_pipeline.loading.samples import sequential_batches
    from training.record.pack_picture import pack_picture

    manifest = resolve_dataset(str(packed / "train")).load().manifest
    batch = next(iter(sequential_batches(manifest, range(3), 3, "codec")))
    picture = pack_picture(batch, 16)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    first = batch.pixels[0].numpy().reshape(3, 16, 16).transpose(1, 2, 0)
    t, h, w = batch.patch_positions[0].tolist()
    assert t == 0 and np.array_equal(picture[h * 16 : h * 16 + 16, w * 16 : w * 16 + 16], first)


def test_model_flops_equal_those_that_torch_counts():
    """Forward and backward of a packed encoder, against torch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    from model_factory.registry import create_model
    from training.record.speed import encoder_flops

    model = create_model("hf_llava_vit_packing_small_ln")
    model.choose_attention("eager")
    lengths = [64, 32, 32]
    rows = torch.randn(sum(lengths), model.config.patch_dim)
    positions = torch.zeros(len(rows), 3, dtype=torch.int64)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    inputs = {"hidden_states": rows, "patch_positions": positions, "cu_seqlens": bounds}
    with FlopCounterMode(display=False) as counter:
        model(**inputs, max_seqlen=64).pooler_output.sum().backward()
    squares = sum(length**2 for length in lengths)
    ours = encoder_flops(model.config, len(rows), squares)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_a_jump_of_the_loss_is_told_once(caplog):
    from training.record.speed import SpikeWatch

    logger = logging.getLogger("spikes")
    watch = SpikeWatch(logger)
    rng = np.random.default_rng(0)
    with caplog.at_level(logging.WARNING, "spikes"):
        for step in range(300):
            value = 5 - step / 100 + 0.1 * rng.standard_normal()
            watch.look(step, "loss/a", value + 20 * (200 <= step < 210))
    assert [r.message for r in caplog.records if "jumped" in r.message][0].startswith("step 200:")
    assert len(caplog.records) == 1


def test_presets_say_command_cost_and_expectation_and_can_be_built():
    from training.config.presets import PRESETS

    for name, build in PRESETS.items():
        config = build()
        assert "torchrun" in build.__doc__, name
        assert config.to_json()
    stage2 = PRESETS["large_stage2_video"]()
    assert [head.stream.batch_size for head in stage2.heads] == [16, 8, 16]


def test_list_flags_are_laid_over_the_heads_of_a_preset():
    from training.config.cli import build_config, build_parser

    flags = [
        "--preset",
        "huge_stage2_video",
        "--list_datasets",
        "a/x",
        "b/y",
        "c/z",
        "--lr",
        "1e-5",
    ]
    config = build_config(build_parser().parse_args(flags))
    assert [head.dataset for head in config.heads] == ["a/x", "b/y", "c/z"]
    assert [head.loss_weight for head in config.heads] == [10.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="1 data sets, the preset has 3 heads"):
        build_config(build_parser().parse_args([*flags[:2], "--list_datasets", "a/x"]))
    with pytest.raises(ValueError, match="did you mean huge_stage2_video"):
        build_config(build_parser().parse_args(["--preset", "huge_stage2_vide"]))


def test_a_copy_for_wandb_needs_wandb_and_says_so(tmp_path):
    flags = ("--output", tmp_path, "--set", "wandb_project=univit")
    try:
        import wandb  # noqa: F401
    except ModuleNotFoundError:
        done = forked(*DEBUG, *flags, check=False)
        assert done.returncode == 1 and "pip install wandb" in done.stderr
        return
    forked(*DEBUG, *flags, WANDB_MODE="offline")
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_restart_from_step_0_is_another_run_of_wandb_and_a_resume_the_same(tmp_path):
    from training.record.metrics import _wandb_id

    of_folder = _wandb_id(tmp_path, step=5)  # as earlier versions named it
    first = _wandb_id(tmp_path, step=0)
    assert _wandb_id(tmp_path, step=5) == first
    assert len({of_folder, first, _wandb_id(tmp_path, step=0)}) == 3


def test_values_that_cannot_be_read_any_more_hide_no_error_and_leave_no_file_open(tmp_path, caplog):
    from training.distributed import process_group
    from training.record.metrics import MetricLogger, StepCounts
    from training.record.speed import StepClock

    class Lost(torch.Tensor):
        def item(self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with process_group() as ranks:
        clock = StepClock(ranks.device)
        metrics = MetricLogger(tmp_path, ranks, 9, 9, 0, clock, logging.getLogger("t"))
        lost = torch.zeros(()).as_subclass(Lost)
        metrics.record(1, {"loss/a": lost}, StepCounts(8, 80, 80, 10**9, 0, 0))
        metrics.close()
    assert "illegal memory access" in caplog.text
    with pytest.raises(OSError, match="Bad file descriptor"):
        metrics._record.seal()


def test_an_error_of_another_thread_is_shown_while_the_board_is_open(tmp_path, monkeypatch):
    import threading

    from training.record.metrics import Board

    seen = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: seen.append(arguments.exc_type))
    board = Board(tmp_path / "board", 0, logging.getLogger("t"))
    board.open()

    def fail():
        raise PermissionError("another thread's own")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    board.close()
    assert seen == [PermissionError]


def test_names_that_contain_a_shorter_one_have_peaks_of_their_own(monkeypatch):
    from training.record import speed

    monkeypatch.setattr(speed, "product_flops", lambda device: 1.0)
    for name, peak in (
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 1.0),
        ("NVIDIA GeForce RTX 4090", 165e12),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert speed.peak_flops(torch.device("cuda")) == peak, name


def test_under_fsdp_a_rank_waits_in_forward_too(monkeypatch):
    from training.record import speed

    quick = {"forward": 1.0, "data": 0.1, "total": 2.0}
    slow = {"forward": 0.5, "data": 0.6, "total": 2.0}
    monkeypatch.setattr(speed, "all_gather_json", lambda mine: [quick, slow])
    own = speed.compare_ranks(quick, 1, logging.getLogger("t"), strategy="fsdp")
    assert own == [0.1, 0.6]
    assert speed.compare_ranks(quick, 1, logging.getLogger("t")) == [1.1, 1.1]
