"""One job at a time in a folder of checkpoints."""

import subprocess
import sys

import pytest

from cm.checkpoints import lock
from cm.errors import UserError
from cm.logging import logger
from support.mpi import clean_environment, program
from support.warm import mpi_program, python

HOLDER = """
    import sys, time
    from cm.checkpoints import lock

    lock.take(sys.argv[1])
    print("locked", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def test_a_second_job_is_refused_until_the_first_is_gone(tmp_path):
    path = program(tmp_path, HOLDER)
    first = subprocess.Popen([sys.executable, str(path), str(tmp_path / "run"), "60"], stdout=subprocess.PIPE,
                             env=clean_environment())
    try:
        assert first.stdout.readline() == b"locked\n"
        job = f"""
            import sys
            from cm.distributed import setup as dist
            from cm.checkpoints import lock

            def main():
                dist.setup_dist()
                dist.on_main(lock.take, {str(tmp_path / "run")!r})

            dist.run(main)
        """
        refused = mpi_program(tmp_path, 2, job)
        assert refused.rc == 2 and refused.stderr.count("error:") == 1, refused
        assert f"is in use by process {first.pid} on " in refused.stderr and "another --log_dir" in refused.stderr
    finally:
        first.kill()                                        # -9: no time to tidy up
        first.wait()
    taken = python([path, tmp_path / "run", "0"])
    assert taken.rc == 0 and taken.stdout == "locked\n", taken


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    from cm.checkpoints import lock

    def unknown(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", unknown)
    monkeypatch.setattr(lock, "_held", {})
    with logger.scoped_configure(str(tmp_path / "log"), format_strs=["log"]):
        lock.take(str(tmp_path / "run"))
    assert "cannot be locked" in (tmp_path / "log" / "log.txt").read_text()


def test_a_lock_that_is_a_link_leaves_alone_what_it_leads_to(tmp_path):
    (tmp_path / "victim").write_text("a month of work")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / lock.NAME).symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match=r"\.lock is a symbolic link, which is not followed: remove it"):
        lock.take(str(tmp_path / "run"))
    assert (tmp_path / "victim").read_text() == "a month of work"
