"""A rank ends when its launcher is killed, whatever it does, and only then."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, wait_until

# a launcher, and its rank that leaves its last words in a file
LAUNCHER = "import subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[1:]]).wait()"
RANK = """
import os, sys, time
from model_factory.command_line.launcher_watch import watched_launcher

with watched_launcher() as watch:
    watch.last_words = lambda: open("words", "w").write("gone")
    open("started", "w").write(str(os.getpid()))
    time.sleep(3600)
"""


def start(folder, **environment) -> tuple[subprocess.Popen, int]:
    """(launcher, process id of its rank), which sleeps."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", LAUNCHER, "-c", RANK]
    process = subprocess.Popen(command, cwd=folder, env=env)
    started = folder / "started"
    wait_until(lambda: started.exists() and started.read_text(), process, "the rank")
    return process, int(started.read_text())


def is_running(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("name", ["TORCHELASTIC_RUN_ID", "CROSS_RANK"])
def test_a_rank_whose_launcher_is_killed_says_its_last_words_and_ends(tmp_path, name):
    process, rank = start(tmp_path, **{name: "1"})
    process.kill()
    process.wait()
    wait_until(lambda: not is_running(rank), what="the rank's end")
    assert (tmp_path / "words").read_text() == "gone"


def test_a_process_that_no_launcher_started_outlives_the_one_that_did(tmp_path):
    """As a run does whose terminal was closed."""
    from model_factory.command_line.launcher_watch import POLL_S

    process, rank = start(tmp_path)
    process.kill()
    process.wait()
    with pytest.raises(subprocess.TimeoutExpired):  # some looks long
        subprocess.run(["tail", f"--pid={rank}", "-f", "/dev/null"], timeout=3 * POLL_S)
    assert is_running(rank) and not (tmp_path / "words").exists()
    os.kill(rank, signal.SIGKILL)
