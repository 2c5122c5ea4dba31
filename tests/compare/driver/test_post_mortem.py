"""What is said of a run that has left no record."""

import signal

import pytest

from stiefel.compare.driver import post_mortem

GB = 10**9


@pytest.mark.parametrize(
    ("outcome", "memory", "oom", "status"),
    [
        ({"exit": -signal.SIGKILL, "peak": GB}, None, False, "killed"),
        ({"exit": -signal.SIGKILL, "peak": GB}, None, True, "out of memory"),
        ({"exit": -signal.SIGKILL, "peak": GB}, 4 * GB, False, "killed"),
        ({"exit": -signal.SIGKILL, "peak": 3.9 * GB}, 4 * GB, False, "out of memory"),
        ({"exit": -signal.SIGKILL}, 4 * GB, False, "killed"),
        ({"exit": -signal.SIGTERM, "peak": GB}, None, True, "killed"),
        ({"exit": -signal.SIGSEGV}, None, True, "crashed"),
        ({"exit": -40}, None, False, "crashed"),
        ({"exit": 0}, None, False, "crashed"),
        ({"exit": 74}, None, False, "crashed"),
        ({"exit": -signal.SIGKILL, "late": True}, None, False, "timeout"),
    ],
)
def test_a_kill_is_for_want_of_memory_only_where_that_is_evident(tmp_path, outcome, memory, oom, status):
    found = post_mortem.examine(outcome, tmp_path / "none", 5.0, memory, oom)
    assert found["status"] == status, found
    assert found["reason"]


def test_the_stack_of_the_thread_that_crashed_is_kept(tmp_path):
    (tmp_path / "output.txt").write_text(
        "before\nFatal Python error: Segmentation fault\n\nThread 0x01 (most recent call first):\n  other\n"
        "Current thread 0x02 (most recent call first):\n  the one\n"
    )
    found = post_mortem.examine({"exit": -11}, tmp_path / "output.txt", 5.0, None, False)
    assert found["traceback"] == ["Current thread 0x02 (most recent call first):", "  the one"]
    assert "SIGSEGV" in found["reason"]


def test_a_dump_at_the_timeout_is_a_timeout(tmp_path):
    (tmp_path / "output.txt").write_text("Timeout (0:00:05)!\nThread 0x01 (most recent call first):\n  loop\n")
    found = post_mortem.examine({"exit": 1}, tmp_path / "output.txt", 5.0, None, False)
    assert found["status"] == "timeout"
    assert "5 s" in found["reason"]


def test_kills_for_want_of_memory_are_read_where_the_kernel_counts_them(tmp_path, monkeypatch):
    two, one = tmp_path / "memory.events", tmp_path / "memory.oom_control"
    monkeypatch.setattr(post_mortem, "_counters", lambda: [tmp_path / "none", two, one])
    assert post_mortem.oom_kills() == 0
    one.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    assert post_mortem.oom_kills() == 3
    two.write_text("low 0\noom 7\noom_kill 5\noom_group_kill 0\n")
    assert post_mortem.oom_kills() == 5
