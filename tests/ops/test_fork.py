"""Forked processes can run kernels and torch operators after the parent's threads have run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap

import pytest

CODE = """
    import multiprocessing, torch
    from fastkd import losses

    student, teacher = (torch.randn(2, 32, 24, 24, generator=torch.Generator().manual_seed(i)) for i in range(2))
    matrix = torch.rand(512, 512)

    def work(_=None):
        leaf = student.clone().requires_grad_()
        loss = losses.channel_kd(leaf, teacher) + losses.channel_distribution_kd(leaf, teacher)
        loss.backward()
        return loss.item(), leaf.grad.abs().sum().item(), (matrix @ matrix).softmax(0).sum().item()

    class Samples(torch.utils.data.Dataset):
        __len__ = lambda self: 2
        __getitem__ = lambda self, index: torch.tensor(work())

    torch.set_num_threads(3)
    want = torch.tensor(work())
    with multiprocessing.get_context("fork").Pool(1) as pool:
        got = [torch.tensor(x) for x in pool.map(work, range(2))]
    got += torch.utils.data.DataLoader(Samples(), batch_size=None, num_workers=1, multiprocessing_context="fork")
    got.append(torch.tensor(work()))  # the parent continues
    for values in got:
        torch.testing.assert_close(values, want)
    print(len(got))
"""


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
def test_children_compute_after_the_parents_threads_ran():
    command = [sys.executable, "-c", textwrap.dedent(CODE)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        output, errors = process.communicate(timeout=90)
    finally:
        if process.poll() is None:  # a hanging child would outlive its parent
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, output) == (0, "5\n"), errors
