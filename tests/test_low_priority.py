"""A process that gave way while it loaded takes its priority back, but not that of threads which lowered themselves."""

import subprocess
import sys

import pytest

from headrace.low_priority import _may_return_to

PROGRAM = """
import os, threading
from headrace.low_priority import give_way
restore = give_way()
low, over = threading.Event(), threading.Event()
def work():
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    low.set()
    over.wait()
thread = threading.Thread(target=work)
thread.start()
low.wait()
before = os.getpriority(os.PRIO_PROCESS, 0)
restore()
print(before, os.getpriority(os.PRIO_PROCESS, 0), os.getpriority(os.PRIO_PROCESS, thread.native_id))
over.set()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux")
@pytest.mark.parametrize(("niceness", "lower"), [(0, 5), (16, 3)])
def test_who_lowered_itself_further_stays_there(niceness: int, lower: int) -> None:
    if not _may_return_to(0):
        pytest.skip("priorities can't be raised here")
    said = subprocess.run(["nice", "-n", str(niceness), sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    before, after, thread = map(int, said.split())
    assert before == after + lower
    assert thread == (19 if niceness + 5 < 19 else after)
