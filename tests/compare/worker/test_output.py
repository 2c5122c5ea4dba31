"""What a run prints, in a file of bounded size."""

import pytest

from stiefel.compare.worker import output
from stiefel.compare.worker.output import HEAD, TAIL, Output


@pytest.mark.parametrize("chunk", [1000, 65_536, 3_000_000])
def test_the_beginning_and_the_end_are_kept_also_while_it_runs(tmp_path, chunk, monkeypatch):
    monkeypatch.setattr(output, "_PAUSE", 0.0)
    path, data = tmp_path / "output.txt", b"".join(b"%07d\n" % i for i in range(500_000))
    written = Output(path)
    for start in range(0, len(data), chunk):
        written.feed(data[start : start + chunk])
        if start % (50 * chunk) == 0:
            written.flush()
            assert path.stat().st_size <= 1_000_000
            assert path.read_bytes()[-8:] == data[: start + chunk][-8:]
    written.close()
    kept = path.read_bytes()
    assert len(kept) <= 1_000_000
    assert kept[:HEAD] == data[:HEAD]
    assert kept[-TAIL:] == data[-TAIL:]
    assert f"[{len(data) - HEAD - TAIL:,} bytes of output are left out here]".encode() in kept


def test_little_is_kept_whole(tmp_path):
    written = Output(tmp_path / "output.txt")
    written.feed(b"one ")
    assert (tmp_path / "output.txt").read_bytes() == b"one ", "at once"
    written.feed(b"two")
    written.close()
    assert (tmp_path / "output.txt").read_bytes() == b"one two"
    exact = Output(tmp_path / "exact.txt")
    exact.feed(b"x" * HEAD)
    exact.feed(b"y" * TAIL)
    exact.close()
    assert (tmp_path / "exact.txt").read_bytes() == b"x" * HEAD + b"y" * TAIL


def test_a_disk_that_takes_nothing_stops_no_run(tmp_path):
    for path in ("/dev/full", tmp_path / "no" / "output.txt"):
        written = Output(path)
        written.feed(b"x" * (HEAD + 10))
        written.flush()
        written.close()
