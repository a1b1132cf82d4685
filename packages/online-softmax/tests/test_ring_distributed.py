"""The ring over torch.distributed, in processes that talk over gloo, or over NCCL where there are
GPUs: judged as any kernel is, and what happens when a rank fails or what started it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_reference import Problem
from attn_reference.inputs import Attention, Gradients
from attnproof.inputs.make import make_inputs, make_keep_mask
from attnproof.judge.judging import judge
from attnproof.plan import CallResult
from attnproof.verdict import Status
from online_softmax import ring_processes
from online_softmax.attnproof_backend import ring_gloo
from online_softmax.placement import positions
from online_softmax.ring_distributed import ring_attention
from online_softmax.ring_processes import RankError, Team

GPUS = torch.cuda.device_count()
EXAMPLE = Path(__file__).parents[3] / "examples" / "ring_attention.py"
pytestmark = pytest.mark.skipif(
    ring_gloo.availability("cpu") is not None, reason=str(ring_gloo.availability("cpu"))
)

DENSE = Problem(batch=2, heads_q=4, heads_kv=2, seqlen_q=50, seqlen_k=75, head_dim=8, seed=3)
PROBLEMS = [
    DENSE.replace(causal="bottom-right"),
    DENSE.replace(causal="top-left", dtype="bf16", heads_kv=1),
    DENSE.replace(causal="bottom-right", dtype="fp16", seqlen_q=90, seqlen_k=31, sinks=True),
    DENSE.replace(seqlen_q=3, seqlen_k=5, head_dim_v=12),  # some ranks own nothing
    DENSE.replace(seqlen_q=1, bias="normal", bias_shape="bhqk"),
    DENSE.replace(seqlen_q=0),
    DENSE.replace(window=(9, 4), alibi=True, softcap=0.75, bias="normal", bias_shape="b11k"),
    DENSE.replace(mask="random", bias="normal", bias_shape="1hqk", dtype="bf16", sinks=True),
    DENSE.replace(key_lengths=(75, 40), causal="bottom-right", dropout=0.3),
    Problem(packed=((3, 0), (0, 4), (40, 37), (5, 60)), heads_q=2, head_dim=8, causal="top-left"),
]


@pytest.fixture(scope="module", autouse=True)
def _end_the_teams() -> Iterator[None]:
    yield
    ring_processes._close()


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.id)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_conforms_forward_and_backward(problem: Problem, ranks: int) -> None:
    assert_conforms(problem, ranks)


@pytest.mark.skipif(GPUS < 2, reason=f"NCCL needs two GPUs or more; here are {GPUS}")
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.id)
def test_conforms_over_nccl(
    problem: Problem, gpu_team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring_processes, "team", lambda ranks: gpu_team)
    assert_conforms(problem, gpu_team.ranks)


@pytest.fixture(scope="module")
def gpu_team() -> Iterator[Team]:
    """Ranks that compute on a GPU each, and talk over NCCL."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        started = Team(GPUS, "nccl_rank:compute")
    yield started
    started.close()


def assert_conforms(problem: Problem, ranks: int) -> None:
    """Forward and backward of the team of that many ranks, judged."""
    names = ["q", "k", "v"]
    names += [name for name in ("bias", "sinks") if getattr(problem, name)]
    problem = problem.replace(gradients=tuple(names), lse_gradient=True)
    inputs = make_inputs(problem)
    if problem.dropout:
        inputs.keep_mask = make_keep_mask(problem)
    leaves = {n: getattr(inputs, n).clone().requires_grad_() for n in names}
    backend = replace(ring_gloo, ranks=ranks)
    found = backend.attention(replace(inputs, **leaves), problem)
    taken = torch.autograd.grad(
        [found.out, found.lse], list(leaves.values()), [inputs.grad_out, inputs.grad_lse]
    )
    attention = Attention(
        out=found.out.detach(), lse=found.lse.detach(), keep_mask=inputs.keep_mask
    )
    result = CallResult(
        attention=attention, gradients=Gradients(**dict(zip(names, taken, strict=True)))
    )
    verdict = judge(problem, inputs, result, backend.precision("cpu"), backend.capabilities)
    assert verdict.status is Status.CONFORMS or 0 in (problem.seqlen_q, problem.keys), verdict


def test_pages_are_put_together_before_they_are_shared_out() -> None:
    problem = DENSE.replace(page_size=16, key_lengths=(75, 40), causal="bottom-right")
    inputs = make_inputs(problem)
    result = CallResult(attention=ring_gloo.attention(inputs, problem))
    verdict = judge(problem, inputs, result, ring_gloo.precision("cpu"), ring_gloo.capabilities)
    assert verdict.status is Status.CONFORMS, verdict


def test_no_thread_is_left_in_the_process_that_calls() -> None:
    before = threading.active_count(), len(os.listdir("/proc/self/task"))
    ring_gloo.attention(make_inputs(DENSE), DENSE)
    assert (threading.active_count(), len(os.listdir("/proc/self/task"))) == before


def shards(**changes: Any) -> list[dict[str, Any]]:
    """Jobs for three ranks; ``changes`` are made to that of rank 1."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 20, 4)
    jobs: list[dict[str, Any]] = []
    for rank in range(3):
        mine = positions(20, 3, rank)
        jobs.append({"options": {}, "wanted": []})
        jobs[-1] |= {"q": q[:, :, mine], "k": k[:, :, mine], "v": v[:, :, mine]}
    jobs[1] |= changes
    return jobs


Q = torch.zeros(1, 2, 7, 4)
REFUSED = {
    "no such placement": ({"options": {"placement": "spiral"}}, "placement='spiral'"),
    "blocks of none": ({"options": {"block_k": 0}}, "block_k=0"),
    "other options": ({"options": {"causal": "top-left"}}, "different options"),
    "3 dimensions": ({"q": Q[0]}, r"q has shape \(2, 7, 4\)"),
    "integers": ({"q": Q.int(), "k": Q.int(), "v": Q.int()}, "q has dtype torch.int32"),
    "another dtype": ({"q": Q.half(), "k": Q.half(), "v": Q.half()}, "different dtype"),
    "k in another dtype": ({"k": Q.half()}, "k has dtype torch.float16"),
    "another head_dim": ({"k": Q[..., :2], "v": Q}, "k has shape"),
    "fewer values": ({"v": Q[:, :, :2]}, "v has shape"),
    "a row too few": ({"q": Q[:, :, :5]}, "the ranks hold 7, 5, 7 queries: expected are 7, 6, 6"),
    "a head too few": ({"q": Q[:, :1, :6]}, "different heads of q, 2, 1, 2"),
    "sinks on one": ({"sinks": torch.zeros(2)}, "different options"),
    "gradients on one": ({"wanted": ["q"]}, "different options"),
    "no sense": ({"options": {"softcap": -1.0}}, "different options"),
}


ALONG = {
    "a column too few": ({"mask": torch.ones(1, 1, 1, 19, dtype=torch.bool)}, "mask has shape"),
    "bias in fp16": ({"bias": torch.zeros(1, 1, 1, 1).half()}, "bias has dtype"),
    "a sink too many": ({"sinks": torch.zeros(3)}, r"sinks has shape \(3,\): expected is \(2,\)"),
    "nothing kept": ({"options": {"dropout": 0.5}}, "keep_mask is missing"),
    "all dropped": ({"options": {"dropout": 1.5}}, "dropout=1.5"),
    "packed otherwise": ({"options": {"packed": ((10, 10), (9, 10))}}, "hold 7, 6, 7 queries"),
}
WHAT_IT_SAYS = """
from online_softmax.ring_processes import compute

def work(**job):
    try:
        return compute(**job)
    except ValueError as error:
        return str(error)
"""


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """Three ranks that say what a ValueError says."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "says.py").write_text(WHAT_IT_SAYS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        team = Team(3, "says:work")
    yield team
    team.close()


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_fit_is_a_value_error_on_every_rank(three: Team, why: str) -> None:
    changes, said = REFUSED[why]
    answers = three.run(shards(**changes), seconds=30)
    assert re.search(said, answers[1])
    for answer in answers:  # the others are told, and do not wait for one that has given up
        assert answer in (answers[1], "what rank 1 was called with was refused there")
    assert all("out" in answer for answer in three.run(shards(), seconds=30))


@pytest.mark.parametrize("why", ALONG)
def test_what_goes_along_is_looked_at_too(three: Team, why: str) -> None:
    changes, said = ALONG[why]
    answers = three.run([job | changes for job in shards()], seconds=30)
    assert all(re.search(said, answer) for answer in answers)


REGROUPED = """
import torch
import torch.distributed as dist

def work(rank):
    one = torch.ones(1)
    dist.all_reduce(one, group=dist.new_group(backend="gloo"))
    return one.item()
"""


def test_ranks_can_make_further_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those do that talk over NCCL: they meet again in the store of the first group."""
    (tmp_path / "regrouped.py").write_text(REGROUPED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    team = Team(2, "regrouped:work")
    try:
        assert team.run([{"rank": rank} for rank in range(2)], seconds=60) == [2.0, 2.0]
    finally:
        team.close()


def test_without_a_process_group_it_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        ring_attention(Q, Q, Q)


FAULTY = """
import os, signal, time
import torch.distributed as dist

def work(fault, rank):
    if rank == 1:
        if fault == "raise":
            raise KeyError("planted")
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        while fault == "spin":
            pass
    dist.barrier()
    return rank
"""


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The entry of ranks that fail as they are told to."""
    (tmp_path / "faulty_rank.py").write_text(FAULTY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "faulty_rank:work"


def jobs(fault: str) -> list[dict[str, Any]]:
    return [{"fault": fault, "rank": rank} for rank in range(3)]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raise", "rank 1 raised KeyError: 'planted'"),
        ("die", "^rank 1 ended before it answered"),
        ("stop", "no answer of rank 0, 1, 2 within 2 s"),
    ],
)
def test_a_rank_that_fails_is_an_exception_and_no_hang(faulty: str, fault: str, said: str) -> None:
    team = Team(3, faulty)
    assert team.run(jobs("none")) == [0, 1, 2]
    start = time.monotonic()
    with pytest.raises(RankError, match=said):
        team.run(jobs(fault), seconds=2.0)
    assert time.monotonic() - start < 20
    assert not team.alive
    assert not any(map(running, team.pids))


def test_ranks_that_cannot_start_say_why() -> None:
    with pytest.raises(RankError, match="No module named 'no_such_module'"):
        Team(2, "no_such_module:work")


def test_a_team_that_failed_is_replaced() -> None:
    before = ring_processes.team(3)
    os.kill(before.pids[0], signal.SIGKILL)
    with pytest.raises(RankError, match="rank 0"):
        before.run(shards())
    after = ring_processes.team(3)
    assert after is not before
    after.run(shards())


STARTS_A_TEAM = """
import sys, time
from online_softmax.ring_processes import Team

team = Team(3, "faulty_rank:work")
print(team._process.pid, *team.pids, flush=True)
if sys.argv[1] == "idle":
    time.sleep(600)
team.run([{"fault": "spin", "rank": rank} for rank in range(3)])
"""


@pytest.mark.parametrize("while_they", ["idle", "work"])
def test_ranks_end_when_the_process_that_started_them_is_killed(
    faulty: str, while_they: str
) -> None:
    command = [sys.executable, "-c", STARTS_A_TEAM, while_they]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent, parent.stdout:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 4
        assert all(map(running, pids))
        time.sleep(0.2)  # for the jobs to arrive
        parent.kill()
    deadline = time.monotonic() + 20
    while any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(running, pids))


def running(pid: int) -> bool:
    """Whether there is such a process, and it has not ended: nobody may be there to reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_the_example_runs_under_torchrun() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(EXAMPLE)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["out", "lse", "dq", "dk", "dv"]
    assert all(float(line.split()[-1]) < 1e-5 for line in lines)
