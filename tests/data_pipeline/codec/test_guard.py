"""A guarded child answers the request that was asked, within its time, or the input has a reason;
and it is gone when its parent is.
"""

import contextlib
import os
import signal
import threading
import time

import psutil
import pytest
from conftest import PATIENCE_S, wait_until

from data_pipeline.codec.guard import GuardedPool, GuardedProcess
from data_pipeline.errors import RejectedInput

# answers with its request after so many seconds; may stall or answer nonsense on request
CHILD = """
import sys, time
from multiprocessing.connection import Connection
from data_pipeline.codec import guard

def prepare(settings):
    if settings.get("breaks"):
        raise SystemExit("cannot start")
    pipe = Connection(int(sys.argv[1]))

    def answer(request):
        time.sleep(request.get("seconds", 0))
        if request.get("stalls"):
            import os
            os.write(pipe.fileno(), b"\\0\\0\\0\\x40 half of a message")
            time.sleep(1000)
        if request.get("babbles"):
            pipe.send_bytes(b"no JSON")
        return {"of": request["number"]}, [bytes([request["number"]])]

    return answer

guard.serve(prepare)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Name of a module that children can import and run."""
    (tmp_path / "echo_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "echo_child"


def children():
    """Our guarded children that live."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it ended while we looked
            if "echo_child" in child.cmdline():
                found.append(child)
    return found


def test_after_an_interrupt_no_request_gets_the_answer_of_another(module):
    process = GuardedProcess(module, settings={}, wall_seconds=60)
    assert process.ask({"number": 1}, "one")[0] == {"of": 1}
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        process.ask({"number": 2, "seconds": 2}, "two")
    assert process.ask({"number": 3}, "three") == ({"of": 3}, [b"\3"])
    process.close()


def test_a_child_that_answers_nonsense_has_crashed(module):
    process = GuardedProcess(module, settings={}, wall_seconds=60)
    with pytest.raises(RejectedInput, match="crash: one killed the decoder process"):
        process.ask({"number": 1, "babbles": True}, "one")
    assert process.ask({"number": 2}, "two")[0] == {"of": 2}
    process.close()


@pytest.mark.parametrize("kind", ["seconds", "stalls"])
def test_a_child_is_bounded_also_in_the_middle_of_a_message(module, kind):
    process = GuardedProcess(module, settings={}, wall_seconds=1)
    with pytest.raises(RejectedInput, match="timeout: one took longer than 1 s"):
        process.ask({"number": 1, kind: 1000}, "one")
    assert children() == []


def test_a_child_that_does_not_start_is_no_fault_of_the_input(module):
    process = GuardedProcess(module, settings={"breaks": True}, wall_seconds=60)
    with pytest.raises(RuntimeError, match="`python -m echo_child`, .* does not start"):
        process.ask({"number": 1}, "one")
    with pytest.raises(RuntimeError, match="no_such_module"):
        GuardedProcess("no_such_module", {}, wall_seconds=60).ask({}, "one")


def test_threads_get_their_own_answers(module):
    pool = GuardedPool(module, settings={}, num_workers=2, wall_seconds=60)
    answers = {}

    def work(number):
        answers[number] = pool.ask({"number": number}, str(number))[0]["of"]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert answers == {number: number for number in range(20)}
    assert len(children()) == 2
    pool.close()
    assert children() == []


def test_closing_a_pool_ends_what_is_asked_of_it(module):
    pool = GuardedPool(module, settings={}, num_workers=1, wall_seconds=60)
    pool.ask({"number": 1}, "one")
    threading.Timer(0.3, pool.close).start()
    with pytest.raises(RejectedInput, match="crash"):
        pool.ask({"number": 2, "seconds": 1000}, "two")
    with pytest.raises(RejectedInput, match="its reader was closed"):
        pool.ask({"number": 3}, "three")
    assert children() == []


def test_a_fork_keeps_no_child_of_its_parent_alive(module):
    process = GuardedProcess(module, settings={}, wall_seconds=60)
    process.ask({"number": 1}, "one")
    (child,) = children()
    fork = os.fork()
    if fork == 0:  # as a worker of a data loader, which lives on
        try:
            time.sleep(PATIENCE_S)
        finally:
            os._exit(0)
    try:
        process.child.process.stdin.close()  # as the end of this process would
        wait_until(lambda: child.status() == psutil.STATUS_ZOMBIE, what="the end of the child")
    finally:
        os.kill(fork, signal.SIGKILL)
        os.waitpid(fork, 0)
    process.close()


def test_a_fork_asks_a_child_of_its_own(module):
    process = GuardedProcess(module, settings={}, wall_seconds=60)
    process.ask({"number": 1}, "one")
    fork = os.fork()
    if fork == 0:
        is_right = False
        try:
            is_right = process.ask({"number": 2}, "two")[0] == {"of": 2}
            process.close()
        finally:
            os._exit(0 if is_right else 1)
    assert process.ask({"number": 3}, "three")[0] == {"of": 3}
    assert os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) == 0
    process.close()
