"""Cases 42-71 of the reliability list: whatever ends a run, the next start goes on from a whole
checkpoint, bitwise, and exit.json says what happened.

Runs use synthetic patches and named fault points (tests/faulty.py).
"""

import fcntl
import json
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import faulty
import pytest
from conftest import (
    NUM_THREADS,
    PATIENCE_S,
    kill_group,
    last_step,
    run,
    wait_until,
)
from forked import (
    forked,
    forked_ranks,
    forked_torchrun,
    rank_processes,
    start_forked,
    start_forked_ranks,
)

from training.checkpoint.folder import verify_checkpoint

STEPS, BATCH = 40, 8  # samples of a step, on one rank or on two


def command(output: Path, *extra) -> tuple:
    """Forty small steps, a checkpoint every ten."""
    return (
        *("tests/faulty.py", "-m", "training.train_univit", "--preset", "debug"),
        *("--output", output, "--list_batch_size", BATCH // 2),
        *("--num_sampled_data", STEPS * BATCH, *extra),
    )


def one_rank(output: Path, *extra, check: bool = True, fault: str = ""):
    """The same steps in one process, without a launcher."""
    return forked(*command(output, "--list_batch_size", BATCH, *extra), check=check, FAULT=fault)


def exit_record(output: Path) -> dict:
    return json.loads((output / "exit.json").read_text())


def records(output: Path) -> str:
    return (output / "metrics.jsonl").read_text()


def commits(output: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (output / "checkpoints").glob("step_*"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """An uninterrupted run of one process."""
    output = tmp_path_factory.mktemp("straight")
    one_rank(output)
    return output


@pytest.fixture(scope="module")
def straight_of_two(tmp_path_factory) -> Path:
    """An uninterrupted run of two ranks."""
    output = tmp_path_factory.mktemp("straight_of_two")
    forked_ranks(2, *command(output))
    return output


@pytest.mark.e2e
def test_a_kill_at_any_point_of_a_save_leaves_a_whole_checkpoint(straight, tmp_path):
    """SIGKILL at every stage of the writer, one start after the other in one folder."""
    kills = {
        "checkpoint.stage@10": [],
        "checkpoint.write@10": [],
        "checkpoint.manifest@20": [10],
        "checkpoint.rename@20": [10],
        "checkpoint.renamed@20": [10, 20],
        "step.end@35": [10, 20, 30],
        "checkpoint.prune@10": [20, 30, 40],
    }
    # saves that the loop waits for: in a thread, that of step 30 may outlast the steps to the 35th
    in_turn = ("--set", "checkpoint.background=false")
    for point, expected in kills.items():
        flags = in_turn if point.startswith("step") else ()
        done = one_rank(tmp_path, *flags, check=False, fault=f"{point}:kill")
        assert done.returncode == -signal.SIGKILL, point
        assert commits(tmp_path) == expected, point
        for step in expected:
            assert verify_checkpoint(tmp_path / "checkpoints" / f"step_{step:08d}") == []
        assert not (tmp_path / "exit.json").exists()
    one_rank(tmp_path)
    assert records(tmp_path) == records(straight) and exit_record(tmp_path)["code"] == 0
    assert not list((tmp_path / "checkpoints").glob(".*")), "leftovers of killed saves"
    assert json.loads((tmp_path / "run.json").read_text())["starts"] == len(kills) + 1


@pytest.mark.e2e
@pytest.mark.dist
def test_one_rank_asked_to_stop_ends_all_after_a_save(straight_of_two, tmp_path):
    env = {"FAULT": "step.begin@13#1:term"}
    done = forked_ranks(2, *command(tmp_path), check=False, **env)
    assert exit_record(tmp_path)["code"] == 3, done.stderr
    (step,) = set(commits(tmp_path)) - {10}
    assert 13 <= step <= 14 and f"saved at step {step}" in exit_record(tmp_path)["message"]
    forked_ranks(2, *command(tmp_path))
    assert records(tmp_path) == records(straight_of_two)


@pytest.mark.e2e
def test_a_stop_before_the_first_step_ends_at_once(tmp_path):
    flags = ("tests/faulty.py", "-m", "training.train_univit", "--preset", "demo")
    flags += ("--output", tmp_path)
    done = forked(*flags, check=False, FAULT="prepare:term")
    assert done.returncode == 3 and exit_record(tmp_path)["outcome"] == "stopped"


@pytest.mark.e2e
def test_a_second_signal_ends_a_run_that_does_not_come_to_a_stop(tmp_path):
    arguments = command(tmp_path, "--list_batch_size", BATCH)
    process = start_forked(*arguments, FAULT="step.backward@15:sleep=3600")
    # from here on, step 15 cannot end: its samples are drawn, its backward pass sleeps
    wait_until(lambda: last_step(tmp_path / "consumed-00000.jsonl") == 15, process, "step 15")
    process.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert process.poll() is None, "the first signal waits for the step"
    wait_until(lambda: process.send_signal(signal.SIGTERM) or process.poll() is not None)
    assert process.wait() == 128 + signal.SIGTERM
    assert verify_checkpoint(tmp_path / "checkpoints" / "step_00000010") == []


def signalled_to_its_end(process) -> bool:
    """Send one more SIGTERM; whether the process is gone."""
    import psutil

    try:
        process.send_signal(signal.SIGTERM)
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.e2e
@pytest.mark.dist
def test_a_second_signal_ends_a_rank_that_hangs_in_a_collective(tmp_path):
    process = start_forked_ranks(2, *command(tmp_path), FAULT="step.backward@15#1:sleep=3600")
    try:
        # from here on, rank 0 waits for rank 1 in step 15, or is about to
        wait_until(lambda: last_step(tmp_path / "consumed-00000.jsonl") == 15, process, "step 15")
        first = rank_processes(process)[0]
        first.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        assert first.is_running()
        wait_until(lambda: signalled_to_its_end(first))
    finally:
        kill_group(process)


@pytest.mark.e2e
@pytest.mark.dist
def test_ranks_whose_launcher_is_killed_end_without_a_save_and_free_the_folder(tmp_path):
    """One rank sleeps in a step, the other waits for it in a collective: nothing else ends them."""
    flags = ("--set", f"collective_timeout_s={10 * PATIENCE_S}")
    fault = {"FAULT": "step.backward@15#1:sleep=3600"}
    process = start_forked_ranks(2, *command(tmp_path, *flags), **fault)
    ranks = []
    try:
        wait_until(lambda: last_step(tmp_path / "consumed-00000.jsonl") == 15, process, "step 15")
        wait_until(lambda: commits(tmp_path) == [10], process, "the save of step 10")
        ranks = rank_processes(process)
        process.kill()  # the launcher alone
        process.wait()
        wait_until(lambda: not any(rank.is_running() for rank in ranks), what="the ranks' end")
        record = exit_record(tmp_path)
        assert record["code"] == 11 and "the launcher was killed" in record["message"]
        assert commits(tmp_path) == [10]
        with open(tmp_path / "run.lock", "a") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else BlockingIOError
    finally:
        for rank in ranks:
            if rank.is_running():
                rank.kill()


@pytest.mark.e2e
def test_a_last_save_that_fails_is_tried_again_and_never_called_saved(tmp_path):
    fault = "step.begin@13:term,checkpoint.write:disk_full"
    done = one_rank(tmp_path, check=False, fault=fault)
    assert done.returncode == 8 and commits(tmp_path) == []
    assert "could not be saved" in exit_record(tmp_path)["message"]
    assert done.stderr.count("trying once more") == 1


@pytest.mark.e2e
@pytest.mark.dist
def test_a_restart_of_a_run_that_began_anew_goes_on_and_keeps_what_was_set_aside(tmp_path):
    one_rank(tmp_path, "--num_sampled_data", 10 * BATCH)  # an older run's commit
    flags = command(tmp_path, "--resume", "never")
    restarts = ("--max_restarts", "1", "--standalone", "--nproc_per_node", "2")
    # in the second start too; the save of step 20 waited for that of step 10, however slow the disk
    fault = {"FAULT": "step.begin@25#1:kill"}
    done = forked_torchrun(*restarts, *flags, check=False, **fault)
    assert "was for the first start" in done.stderr
    assert re.search("resuming after step (10|20)", done.stderr)
    kept = [path.name for path in (tmp_path / "checkpoints").glob("superseded_*")]
    assert kept == ["superseded_step_00000010"] and commits(tmp_path)[:1] == [10]


@pytest.mark.e2e
@pytest.mark.dist
def test_an_end_that_would_repeat_itself_is_not_started_again(tmp_path):
    restarts = ("--max_restarts", "2", "--standalone", "--nproc_per_node", "2")
    fault = {"FAULT": "step.backward@5:nan"}
    done = forked_torchrun(*restarts, *command(tmp_path), check=False, **fault)
    assert exit_record(tmp_path)["code"] == 5 and "not started again" in done.stderr
    assert json.loads((tmp_path / "run.json").read_text())["starts"] == 1


@pytest.mark.e2e
def test_foreign_names_beside_checkpoints_are_left_alone(straight, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(straight, output)
    shutil.rmtree(output / "checkpoints" / "step_00000040")
    shutil.copytree(output / "checkpoints/step_00000020", output / "checkpoints/step_00000020.bak")
    (output / "checkpoints" / "step_old").mkdir()
    with open(output / "speed.jsonl", "a") as speed:
        speed.write('{"step": 35, "ste')
    one_rank(output)
    assert records(output) == records(straight)
    names = {path.name for path in (output / "checkpoints").iterdir()}
    assert {"step_00000020.bak", "step_old", "step_00000040"} <= names
    assert (output / "report.md").is_file()


@pytest.mark.e2e
def test_a_save_that_fails_is_told_and_the_training_goes_on(straight, tmp_path):
    done = one_rank(tmp_path, fault="checkpoint.write@20:disk_full")
    assert "CHECKPOINT OF STEP 20 FAILED" in done.stderr and "No space left" in done.stderr
    assert commits(tmp_path) == [10, 30, 40] and records(tmp_path) == records(straight)


@pytest.mark.e2e
def test_a_disk_that_stays_full_ends_the_run_with_the_last_commit_whole(tmp_path):
    """The real thing: the system refuses files above a size, from the first checkpoint on."""
    small_files = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))\n"
        "from training.train_univit import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    flags = command(tmp_path, "--list_batch_size", BATCH)[3:]
    done = forked("-c", small_files, *flags, check=False)
    assert done.returncode == 8, done.stderr
    assert done.stderr.count("FAILED, the training goes on") == 3
    assert "3 checkpoints in a row" in exit_record(tmp_path)["message"]
    assert commits(tmp_path) == [] and not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("output", ["/proc/univit", "/dev/null/run"])
def test_an_output_that_cannot_be_written_to_is_refused_before_anything(output):
    done = forked(*command(Path(output)), check=False)
    assert done.returncode == 8 and "cannot be written to by rank 0" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.e2e
def test_two_runs_in_one_folder_are_one_too_many(tmp_path):
    process = start_forked_ranks(1, *command(tmp_path, "--num_sampled_data", 10**7))
    try:
        wait_until((tmp_path / "metrics.jsonl").exists, process, "the first run's record")
        done = one_rank(tmp_path, check=False)
        assert done.returncode == 1
        assert "is in use by process" in done.stderr and socket.gethostname() in done.stderr
        assert process.poll() is None
    finally:
        kill_group(process)
    one_rank(tmp_path, "--resume", "never")  # the lock went with its process


@pytest.mark.e2e
@pytest.mark.dist
def test_numbers_that_are_not_finite_stop_all_ranks_before_any_weight(tmp_path):
    done = forked_ranks(2, *command(tmp_path), check=False, FAULT="step.backward@15#1:nan")
    assert done.returncode and exit_record(tmp_path)["code"] == 5
    message = exit_record(tmp_path)["message"]
    assert "step 15" in message and "patch_embed" in message and "No weight was changed" in message
    assert commits(tmp_path) == [10]


@pytest.mark.e2e
def test_some_steps_may_be_left_out_and_are_counted_over_restarts(tmp_path):
    """The kill comes after the save of step 30 began, which waits for the one of step 20: however
    slow the disk, the restart begins at step 20 or later, with the first skipped step counted."""
    flags = ("--max_skipped_steps", 2)
    one_rank(tmp_path, *flags, check=False, fault="step.backward@15:nan,step.end@32:kill")
    done = one_rank(tmp_path, *flags, fault="step.backward@35:nan")
    assert "step skipped, 2 of at most 2" in done.stderr
    speeds = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert speeds[-1]["skipped_steps"] == 2
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000040")
    fault = "step.backward@35:nan,step.backward@37:nan"
    done = one_rank(tmp_path, *flags, check=False, fault=fault)
    assert done.returncode == 5, "one more than was allowed"


@pytest.mark.e2e
@pytest.mark.dist
def test_a_slow_rank_is_named(tmp_path):
    done = forked_ranks(2, *command(tmp_path), FAULT="step.begin#1:sleep=0.15")
    named = [done.stderr.count(f"rank {rank} is slow") for rank in (0, 1)]
    assert named[1] > named[0], "a busy machine may hold up the other one once or twice"


@pytest.mark.e2e
@pytest.mark.dist
def test_a_killed_rank_is_noticed_before_a_time_out_and_the_launcher_goes_on(
    straight_of_two, tmp_path
):
    """With --max_restarts torchrun starts all ranks again; the fault strikes the first time only,
    as the second start begins after it."""
    fault = {"FAULT": "step.optimizer@15#1:kill"}
    # far beyond what `run` waits for: only the loss itself can end the other rank in time
    flags = ("--set", f"collective_timeout_s={10 * PATIENCE_S}")
    done = forked_ranks(2, *command(tmp_path, *flags), check=False, **fault)
    assert done.returncode
    assert exit_record(tmp_path)["outcome"] == "peer lost"
    restarts = ("--max_restarts", "1", "--standalone", "--nproc_per_node", "2")
    fault = {"FAULT": "step.optimizer@25#0:kill"}
    script = tmp_path / "once.py"
    script.write_text(
        "import os, sys\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] != '0':\n"
        "    os.environ.pop('FAULT')\n"
        "from training.train_univit import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    forked_torchrun(*restarts, "tests/faulty.py", script, *command(tmp_path)[3:], **fault)
    assert records(tmp_path) == records(straight_of_two)
    assert exit_record(tmp_path)["code"] == 0


@pytest.mark.e2e
def test_what_may_differ_from_the_checkpoint_must_be_named(straight, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(straight, output)
    shutil.rmtree(output / "checkpoints" / "step_00000040")
    done = one_rank(output, "--lr", "5e-4", check=False)
    assert done.returncode == 7
    assert "optimizer.lr: checkpoint 0.001, now 0.0005" in exit_record(output)["message"]
    done = one_rank(output, "--lr", "5e-4", "--resume_allow", "optimizer.lrr", check=False)
    assert done.returncode == 1 and "nearest: optimizer.lr" in exit_record(output)["message"]
    done = one_rank(output, "--lr", "5e-4", "--resume_allow", "optimizer.lr")
    assert "resuming all the same, optimizer.lr" in done.stderr
    assert "resuming after step 30" in done.stderr


@pytest.mark.e2e
def test_a_resume_on_other_arithmetic_names_every_difference_and_goes_on(straight, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(straight, output)
    shutil.rmtree(output / "checkpoints" / "step_00000040")
    other, oldest = str(int(NUM_THREADS) + 1), "default"
    environment = {"UNIVIT_NUM_THREADS": other, "ATEN_CPU_CAPABILITY": oldest}
    done = run(*command(output, "--list_batch_size", BATCH), **environment)
    (line,) = [line for line in done.stderr.splitlines() if "last bits may differ" in line]
    assert f"threads: checkpoint {NUM_THREADS}, now {other}" in line
    assert f"now {oldest!r}" in line and "ATEN_CPU_CAPABILITY: checkpoint" in line
    found = [json.loads(text) for text in records(output).splitlines()]
    wanted = [json.loads(text) for text in records(straight).splitlines()]
    assert len(found) == len(wanted) == STEPS
    for one, two in zip(found, wanted, strict=True):
        assert one["loss/synthetic"] == pytest.approx(two["loss/synthetic"], abs=1e-3)
    launched = json.loads((output / "run.json").read_text())["arithmetic"]
    state = json.loads((output / "checkpoints/step_00000040/state.json").read_text())
    assert launched["threads"] == int(other) and launched["processor"]
    assert launched.items() <= state["may_differ"].items()
    # of the same arithmetic in all that is asked; a new process for that would take ten seconds
    alike = (
        "import os, sys, torch\n"
        f"os.environ['ATEN_CPU_CAPABILITY'] = {oldest!r}\n"
        f"torch.backends.cpu.get_cpu_capability = lambda: {launched['cpu_capability']!r}\n"
        "from training.train_univit import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    flags = command(output, "--list_batch_size", BATCH)[3:]
    again = forked("-c", alike, *flags, UNIVIT_NUM_THREADS=other)
    assert "last bits" not in again.stderr, "nothing has changed since"


@pytest.mark.e2e
@pytest.mark.dist
def test_a_rank_that_hangs_is_given_up_after_the_time_out(tmp_path):
    fault = {"FAULT": f"step.begin@15#1:sleep={10 * PATIENCE_S}"}  # `run` gives up before
    flags = ("--set", "collective_timeout_s=10")
    process = start_forked_ranks(2, *command(tmp_path, *flags), **fault)
    try:
        wait_until((tmp_path / "exit.json").exists, process, "the record")
    finally:
        kill_group(process)  # the launcher would wait half a minute for the rank that hangs
    assert exit_record(tmp_path)["outcome"] == "peer lost"
    assert verify_checkpoint(tmp_path / "checkpoints" / "step_00000010") == []


@pytest.mark.e2e
@pytest.mark.dali
def test_other_labels_are_taken_from_the_next_epoch_on_when_asked(packed, tmp_path):
    import numpy as np

    from data_pipeline.clustering.labels import save_labels
    from data_pipeline.shards.manifest import load_manifest

    data, output = tmp_path / "data" / "train", tmp_path / "run"
    shutil.copytree(packed / "train", data)
    flags = ("-m", "training.train_univit", "--preset", "demo", "--list_datasets", data)
    flags += ("--list_batch_size", 8, "--num_sampled_data", 8 * 8, "--output", output)
    forked(*flags, "--ckpt_interval", 4)  # three batches are an epoch: step 4 is in the second
    shutil.rmtree(output / "checkpoints" / "step_00000008")
    manifest = load_manifest(data)
    save_labels(data, np.load(data / "labels.npy")[::-1], manifest, 8, {})
    done = forked(*flags, check=False)
    assert done.returncode == 7 and "resume_data=new-epoch" in done.stderr
    done = forked(*flags, "--set", "resume_data=new-epoch")
    assert "resuming all the same, data of" in done.stderr
    lines = [json.loads(t) for t in (output / "consumed-00000.jsonl").read_text().splitlines()]
    assert [(line["step"], line["epoch"]) for line in lines[3:5]] == [(4, 1), (5, 2)]


@pytest.mark.e2e
@pytest.mark.dist
def test_a_meeting_point_that_is_taken_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "2"}
        done = forked(*command(tmp_path), check=False, **place)
    assert done.returncode == 9 and f"127.0.0.1:{port}" in done.stderr
    assert "port is free" in done.stderr and "Traceback" not in done.stderr


def test_want_of_memory_is_an_outcome_with_advice():
    import torch

    from training.run_folder import outcome_of

    for error in (
        MemoryError("no room"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ):
        outcome, message = outcome_of(error)
        assert outcome == "out of memory" and "--gradient_checkpoint" in message
    assert outcome_of(KeyError("a fault of ours"))[0] is None


def test_a_stop_that_comes_while_a_lost_peer_is_handled_is_a_lost_peer():
    """The launcher stops the ranks that are left as soon as it sees one die."""
    from training.errors import Preempted
    from training.run_folder import outcome_of

    try:
        try:
            raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
        finally:
            raise Preempted("stopped by SIGTERM")
    except Preempted as error:
        assert outcome_of(error)[0] == "peer lost"
    assert outcome_of(Preempted("stopped by SIGTERM"))[0] == "stopped"


def test_no_flipped_bit_of_a_checkpoint_goes_unseen(straight, tmp_path):
    shutil.copytree(straight / "checkpoints" / "step_00000040", tmp_path / "c")
    for file in sorted((tmp_path / "c").iterdir()):
        whole = file.read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 20)):
            spoilt = bytearray(whole)
            spoilt[place] ^= 1 << place % 8
            file.write_bytes(spoilt)
            if file.name != "manifest.json":
                assert verify_checkpoint(tmp_path / "c"), f"{file.name}, byte {place}"
        file.write_bytes(whole)
    assert verify_checkpoint(tmp_path / "c") == []
    (tmp_path / "c" / "state.json").unlink()
    assert verify_checkpoint(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_text('{"files": {"../x": {"size": 1, "sha256": ""}}}')
    assert verify_checkpoint(tmp_path / "c") == ["manifest.json does not describe a checkpoint"]


@pytest.mark.parametrize("text", ["step:kill", "step.begin:explode", "step.begin@x:kill"])
def test_a_fault_that_means_nothing_is_refused(text):
    with pytest.raises(ValueError):
        faulty.parse(text)
