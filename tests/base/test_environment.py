"""The CPUs and the memory that a process may use. A container's share of CPUs is joblib's to find."""

import os
import subprocess
import sys

import pytest

from lgd.base import environment

COUNT = "from lgd.base.environment import count_cpus; print(count_cpus())"


def test_cpus_that_a_process_is_not_bound_to_do_not_count():
    bound = {min(os.sched_getaffinity(0))}
    done = subprocess.run(
        [sys.executable, "-c", COUNT],
        preexec_fn=lambda: os.sched_setaffinity(0, bound),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "1\n"


@pytest.mark.parametrize(
    ("text", "bytes_left"), [("1073741824\n", 2**30), ("max\n", None), ("9223372036854771712", None)]
)
def test_the_limit_of_a_container_counts_as_memory(tmp_path, monkeypatch, text, bytes_left):
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (tmp_path / "memory.max").write_text(text)
    monkeypatch.setattr(environment, "_MEMORY_LIMITS", (tmp_path / "none", tmp_path / "memory.max"))
    assert environment.measure_memory() == (bytes_left or whole)
