"""Whatever a target does is found out, and costs one plan: each test ends with a good call of
the same runner, in a real process."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from attn_reference.inputs import Inputs
from attn_reference.problem import Problem
from attnproof.inputs.make import make_inputs
from attnproof.plan import Call, Outcome, Plan, Reply, Surroundings
from attnproof.targets import LoadError, TargetSpec
from attnproof.worker import nursery
from attnproof.worker.runners import IsolatedRunner

MISBEHAVING = Path(__file__).with_name("misbehaving.py")
PROBLEM = Problem(heads_q=2, seqlen_q=8, head_dim=16)
WITH_GRADIENTS = PROBLEM.replace(gradients=("q", "k", "v"))
TIMEOUT = 60.0


def expected(inputs: Inputs) -> torch.Tensor:
    q, k, v = (t.detach() for t in (inputs.q, inputs.k, inputs.v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def plan_of(problem: Problem = PROBLEM, *, seeds: tuple[int, ...] = (0,), **options) -> Plan:
    problems = [problem.replace(seed=seed) for seed in seeds]
    return Plan(calls=[Call(problem=p, inputs=make_inputs(p)) for p in problems], **options)


def assert_conforms(reply: Reply, plan: Plan) -> None:
    assert reply.outcome is Outcome.ANSWERED, reply.reason
    assert len(reply.results) == len(plan.calls)
    for call, result in zip(plan.calls, reply.results, strict=True):
        assert result.raised is None
        assert result.complaints == []
        torch.testing.assert_close(result.attention.out, expected(call.inputs))


class WaywardRunner(IsolatedRunner):
    """A runner for a target that misbehaves until it is told to compute attention."""

    def __init__(self, folder: Path, name: str) -> None:
        self._told = folder / "told"
        source = folder / f"{name}.py"
        source.write_text(
            "import sys; from pathlib import Path\n"
            f"sys.path.insert(0, {str(MISBEHAVING.parent)!r})\n"
            "import misbehaving\n"
            "def attention(q, k, v):\n"
            f"    told = Path({str(self._told)!r}).exists()\n"
            f"    return (misbehaving.attention if told else misbehaving.{name})(q, k, v)\n"
        )
        super().__init__(TargetSpec(f"{source}:attention"), "cpu")

    def reform(self) -> None:
        self._told.touch()


@pytest.fixture
def target(tmp_path):
    runners = []

    def make(name: str) -> WaywardRunner:
        runners.append(WaywardRunner(tmp_path, name))
        return runners[-1]

    yield make
    for runner in runners:
        runner.close()


def always(name: str) -> IsolatedRunner:
    return IsolatedRunner(TargetSpec(f"{MISBEHAVING}:{name}"), "cpu")


def assert_next_conforms(runner: WaywardRunner) -> None:
    runner.reform()
    plan = plan_of(seeds=(5,))
    assert_conforms(runner.run(plan, TIMEOUT), plan)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("segfault", "killed by SIGSEGV"),
        ("exits", "exited with status 0 before it answered\nleaving early"),
        ("kills_itself", "killed by SIGKILL, as the system does when memory runs out"),
        ("closes_every_file", "exited with status 1 before it answered"),
    ],
)
def test_a_process_that_ends_costs_its_plan(target, name, reason):
    runner = target(name)
    reply = runner.run(plan_of(), TIMEOUT)

    assert reply.outcome is Outcome.CRASHED
    assert reply.reason.startswith(reason)
    assert reply.results == []
    assert_next_conforms(runner)


def test_a_segfault_says_where(target):
    reply = target("segfault").run(plan_of(), TIMEOUT)

    assert "in segfault" in reply.reason
    assert "attnproof/calling.py" not in reply.reason


@pytest.mark.parametrize("name", ["hangs", "sleeps", "hangs_deaf", "stops_itself"])
def test_a_hang_ends_at_the_deadline(target, name):
    runner = target(name)
    runner.describe()
    reply = runner.run(plan_of(), 2)

    assert reply.outcome is Outcome.TIMED_OUT
    assert reply.reason.startswith("no answer within 2 s")
    assert_next_conforms(runner)


def test_a_hang_says_where(target):
    assert "in hangs" in target("hangs").run(plan_of(), 2).reason


def test_processes_that_a_hanging_target_started_end_with_it(target):
    reason = target("hangs_deaf").run(plan_of(), 2).reason
    grandchild = int(reason.split("grandchild ")[1].split()[0])

    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and is_running(grandchild):
        time.sleep(0.01)
    assert not is_running(grandchild)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_a_target_that_kills_the_process_it_was_started_from(target):
    runner = target("kills_its_parent")
    runner.run(plan_of(), TIMEOUT)
    runner.close()

    assert_next_conforms(runner)


@pytest.mark.parametrize("name", ["out_of_memory", "memory_error"])
def test_running_out_of_memory_is_an_outcome_of_its_own(target, name):
    runner = target(name)
    reply = runner.run(plan_of(), TIMEOUT)

    assert reply.outcome is Outcome.OUT_OF_MEMORY
    assert "emory" in reply.reason
    assert_next_conforms(runner)


@pytest.mark.parametrize(
    ("name", "raised"),
    [
        ("raises_value_error", "ValueError: head_dim 16 is not for me"),
        ("raises_system_exit", "SystemExit: 0"),
        ("raises_unprintable", "Unprintable: (its text cannot be had)"),
        ("raises_with_code_in_its_text", "Trap: (its text cannot be had)"),
        ("interrupts", "KeyboardInterrupt: "),
    ],
)
def test_an_exception_is_an_answer(target, name, raised):
    runner = target(name)
    (result,) = runner.run(plan_of(), TIMEOUT).results

    assert result.raised == raised
    assert f"in {name}" in result.traceback
    assert result.attention is None


def test_the_text_of_an_exception_is_cut(target):
    runner = target("raises_megabytes")
    (result,) = runner.run(plan_of(), TIMEOUT).results

    assert result.raised.startswith("ValueError: xxx")
    assert len(result.raised) <= 4000
    assert_next_conforms(runner)


def test_not_implemented_declines():
    runner = always("declines")
    (result,) = runner.run(plan_of(), TIMEOUT).results
    runner.close()

    assert (result.unsupported, result.raised) == ("odd lengths are not supported", None)


def test_calls_after_one_that_raised_are_made(target):
    results = target("raises_value_error").run(plan_of(seeds=(1, 2)), TIMEOUT).results

    assert [r.raised is not None for r in results] == [True, True]


def test_printing_megabytes_blocks_nothing(target):
    runner = target("prints_megabytes")
    plan = plan_of()

    assert_conforms(runner.run(plan, TIMEOUT), plan)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("leaves_a_thread", "left a thread running: straggler"),
        ("leaves_a_hidden_thread", "left a thread running: 1 outside Python code"),
        ("replaces_torch_empty", "replaced torch.empty"),
        ("replaces_the_clock", "replaced time.perf_counter"),
        ("replaces_clone", "replaced torch.Tensor.clone"),
        ("replaces_autograd", "replaced torch.autograd.grad"),
        ("changes_default_dtype", "changed the default dtype from torch.float32 to torch.float64"),
        ("turns_gradients_off", "changed grad mode from True to False"),
        ("changes_threads", "changed the number of threads from"),
        ("reseeds", "changed torch's random state"),
        ("flushes_subnormals", "changed the flushing of subnormal numbers"),
        ("sets_a_timer", "changed the timers that send signals from"),
        ("sets_a_trace_function", "changed the trace function"),
        ("sets_a_profile_function", "changed the profile function"),
        ("lowers_a_limit", "changed the limit RLIMIT_FSIZE from"),
        ("replaces_an_operator", "replaced the operator aten/softmax.int/CPU"),
        ("leaves_a_long_name", "left a thread running: nnn"),
        ("forks_for_good", "left a copy of its process running: process"),
    ],
)
def test_what_a_target_does_to_its_process_is_a_complaint(target, name, complaint):
    runner = target(name)
    (result,) = runner.run(plan_of(), TIMEOUT).results

    assert [c for c in result.complaints if c.startswith(complaint)] == result.complaints != []
    assert_next_conforms(runner)


@pytest.mark.parametrize("name", ["forks", "forks_and_the_copy_raises"])
def test_a_copy_of_its_process_does_not_answer(target, name):
    runner = target(name)
    plan = plan_of()
    assert_conforms(runner.run(plan, TIMEOUT), plan)
    child = runner._child
    time.sleep(0.2)

    assert child.channel.quiet()
    assert_next_conforms(runner)
    assert runner._child is child


@pytest.mark.parametrize("name", ["starts_a_program", "closes_what_it_prints_to"])
def test_what_harms_nobody_is_no_complaint(target, name):
    runner = target(name)
    plan = plan_of()
    assert_conforms(runner.run(plan, TIMEOUT), plan)
    assert_next_conforms(runner)


def test_a_target_that_stops_the_process_it_was_started_from(target, monkeypatch):
    monkeypatch.setattr(nursery, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(nursery, "CLOSE_SECONDS", 0.5)
    if nursery._current is not None:
        nursery.forget_nursery(nursery._current)  # one that was started with other limits
    runner = target("stops_its_parent")
    plan = plan_of()
    assert_conforms(runner.run(plan, TIMEOUT), plan)
    start = time.monotonic()
    runner.close()

    assert time.monotonic() - start < 20
    assert_next_conforms(runner)


def test_a_thread_that_has_ended_is_no_complaint():
    runner = always("uses_a_thread")
    plan = plan_of()
    assert_conforms(runner.run(plan, TIMEOUT), plan)
    runner.close()


def test_dropout_may_draw_random_numbers():
    runner = always("reseeds")
    plan = plan_of()
    plan.calls[0].problem = PROBLEM.replace(dropout=0.5)
    (result,) = runner.run(plan, TIMEOUT).results
    runner.close()

    assert result.complaints == []


def test_a_result_that_is_written_late_is_a_complaint(target):
    runner = target("writes_late")
    (result,) = runner.run(plan_of(), TIMEOUT).results

    late = "out of call 1 changed after it was returned", "left a thread running"
    assert result.complaints
    assert all(c.startswith(late) for c in result.complaints)
    assert result.attention.out.eq(0).all()
    assert_next_conforms(runner)


def test_a_process_that_dies_between_plans_costs_no_other_plan(target):
    runner = target("dies_later")
    (result,) = runner.run(plan_of(), TIMEOUT).results
    assert result.complaints == []
    time.sleep(1.5)

    assert_next_conforms(runner)


@pytest.mark.parametrize(
    ("name", "problem", "complaint"),
    [
        ("changes_q", PROBLEM, "changed its input q: 256 of 256 elements, first at (0, 0, 0, 0)"),
        ("changes_q", WITH_GRADIENTS, "changed its input q: 256 of 256 elements"),
        ("changes_one_element_of_k", PROBLEM, "changed its input k: 1 of 256 elements, first at"),
        ("changes_grad_out", WITH_GRADIENTS, "changed its input grad_out: 256 of 256 elements"),
    ],
)
def test_changed_inputs_are_seen_from_outside(target, name, problem, complaint):
    runner = target(name)
    (result,) = runner.run(plan_of(problem), TIMEOUT).results

    assert len(result.complaints) == 1
    assert result.complaints[0].startswith(complaint)


def test_inputs_of_one_plan_are_not_those_of_the_next():
    runner = always("changes_q")
    first = plan_of()
    before = first.calls[0].inputs.q.clone()
    runner.run(first, TIMEOUT)
    runner.close()

    assert torch.equal(first.calls[0].inputs.q, before)


def test_stale_results_are_answers_that_do_not_conform():
    runner = always("stale")
    plan = plan_of(seeds=(1, 2))
    first, second = runner.run(plan, TIMEOUT).results
    runner.close()

    assert torch.equal(first.attention.out, second.attention.out)
    assert not torch.allclose(second.attention.out, expected(plan.calls[1].inputs), atol=0.1)


def test_one_buffer_for_every_result_is_a_complaint():
    runner = always("same_buffer")
    first, second = runner.run(plan_of(seeds=(1, 2)), TIMEOUT).results
    runner.close()

    assert first.complaints == [
        "out of call 1 changed after call 2 returned: its memory is used again, or it is "
        "written late"
    ]
    assert second.complaints == [
        "out of call 2 shares memory with out of call 1, which is still in use"
    ]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("out_is_q", "out shares memory with q"),
        ("out_is_a_view_of_v", "out shares memory with v"),
        ("lazy", "out is a misbehaving.Lazy, not a torch.Tensor"),
        ("meta", "out is a tensor on meta, not on cpu"),
        ("nested", "out is a nested tensor, not a dense one"),
        ("without_storage", "out is a tensor that reaches beyond the end of its storage"),
        ("half_of_its_storage", "out is a tensor that reaches beyond the end of its storage"),
        ("of_a_strange_dtype", "out is a tensor of dtype torch.uint16"),
        ("parameter", "out is a torch.nn.parameter.Parameter, not a torch.Tensor"),
        ("returns_an_expanded_scalar", "out has shape (1125899906842624,), absurdly large"),
    ],
)
def test_what_is_no_tensor_of_its_own_is_a_complaint(target, name, complaint):
    runner = target(name)
    reply = runner.run(plan_of(), TIMEOUT)

    assert reply.outcome is Outcome.ANSWERED
    assert reply.results[0].complaints == [complaint]


@pytest.mark.parametrize("name", ["strided", "negated_lazily"])
def test_a_result_may_be_laid_out_in_any_way(target, name):
    runner = target(name)
    plan = plan_of()
    assert_conforms(runner.run(plan, TIMEOUT), plan)
    assert_next_conforms(runner)


def test_a_lazy_tensor_is_not_looked_at(target):
    runner = target("lazy")
    runner.run(plan_of(), TIMEOUT)
    child = runner._child
    runner.close()

    assert "looked at" not in child.last_lines()


def test_nothing_is_unpickled(target, monkeypatch):
    monkeypatch.delenv("ATTNPROOF_TEST_MARKER", raising=False)
    runner = target("bomb")
    (result,) = runner.run(plan_of(), TIMEOUT).results

    assert result.attention is None
    assert result.raised is not None
    assert os.getenv("ATTNPROOF_TEST_MARKER") is None


def test_the_expected_tensor_is_not_there_to_be_found(target):
    runner = target("seeks_the_answer")
    plan = plan_of()
    (result,) = runner.run(plan, TIMEOUT).results

    assert not torch.allclose(result.attention.out, expected(plan.calls[0].inputs), atol=0.01)
    assert_next_conforms(runner)


def test_not_even_one_that_knows_the_answer_finds_it(target):
    (result,) = target("recognises_the_answer").run(plan_of(), TIMEOUT).results

    assert result.attention.out.eq(0).all()


def test_a_target_sees_the_environment_as_it_is_now(monkeypatch):
    told = []
    for value in ("1", "2"):
        monkeypatch.setenv("ATTNPROOF_TEST_MARKER", value)
        runner = always("tells_a_variable")
        (result,) = runner.run(plan_of(), TIMEOUT).results
        runner.close()
        told.append(result.attention.out.unique().tolist())

    assert told == [[1.0], [2.0]]


def test_an_interrupt_ends_the_process_and_is_passed_on(target):
    runner = target("hangs")
    runner.describe()
    pid = runner._child.pid
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            runner.run(plan_of(), TIMEOUT)
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)

    assert not is_running(pid)
    assert_next_conforms(runner)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("forges_a_huge_shape", "more bytes than any answer has"),
        ("forges_an_impossible_shape", "out of shape"),
        ("forges_a_dtype", "out of dtype 'load'"),
        ("forges_nesting", "a header that is not JSON"),
        ("forges_an_endless_line", "a header of over"),
    ],
)
def test_forged_headers_are_refused(target, name, why):
    runner = target(name)
    reply = runner.run(plan_of(), TIMEOUT)

    assert reply.outcome is Outcome.CRASHED
    assert why in reply.reason
    assert_next_conforms(runner)


def test_too_few_bytes_are_no_answer(target):
    runner = target("forges_too_few_bytes")
    reply = runner.run(plan_of(), TIMEOUT)

    assert reply.outcome is Outcome.CRASHED
    assert reply.results == []
    assert_next_conforms(runner)


def test_a_true_answer_behind_a_forged_one_costs_no_other_plan(target):
    runner = target("forges_and_answers")
    (result,) = runner.run(plan_of(), TIMEOUT).results
    time.sleep(0.2)

    assert result.attention.out.shape == ()
    assert_next_conforms(runner)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("writes_past_k", "wrote 4 bytes outside its inputs, the nearest of them 0 bytes behind k"),
        (
            "writes_before_v",
            "wrote 4 bytes outside its inputs, the nearest of them 0 bytes before v",
        ),
        ("writes_into_gaps_of_q", "wrote 4 bytes into the gaps between the rows of q"),
    ],
)
def test_writes_beside_an_input_are_seen(target, name, complaint):
    runner = target(name)
    problem = PROBLEM.replace(layouts=(("q", "bhsd+gap"),))
    (result,) = runner.run(plan_of(problem), TIMEOUT).results

    assert result.complaints == [complaint]
    assert_next_conforms(runner)


@pytest.mark.parametrize(
    ("name", "surroundings", "side"),
    [
        ("reads_past_k", Surroundings.GUARD_AFTER, "behind"),
        ("writes_past_k", Surroundings.GUARD_AFTER, "behind"),
        ("reads_before_q", Surroundings.GUARD_BEFORE, "before"),
        ("writes_before_v", Surroundings.GUARD_BEFORE, "before"),
    ],
)
def test_a_guard_page_stops_reads_and_writes(target, name, surroundings, side):
    runner = target(name)
    reply = runner.run(plan_of(surroundings=surroundings), TIMEOUT)

    assert reply.outcome is Outcome.CRASHED
    assert reply.reason.startswith(("killed by SIGSEGV", "killed by SIGBUS"))
    assert f"memory right {side} each input was inaccessible" in reply.reason
    assert_next_conforms(runner)


@pytest.mark.parametrize("surroundings", list(Surroundings))
def test_a_good_target_notices_no_surroundings(surroundings):
    runner = always("attention")
    plan = plan_of(WITH_GRADIENTS, surroundings=surroundings)
    assert_conforms(runner.run(plan, TIMEOUT), plan)
    runner.close()


def test_what_is_read_beside_an_input_is_nan(target):
    (result,) = target("uses_what_lies_past_k").run(plan_of(), TIMEOUT).results

    assert result.attention.out.isnan().all()


def test_memory_that_is_never_written_is_garbage():
    for dtype in ("fp32", "fp16", "bf16"):
        for length in (3, 300):
            runner = always("never_writes_the_last_row")
            problem = PROBLEM.replace(dtype=dtype, seqlen_q=length, seqlen_k=length)
            (result,) = runner.run(plan_of(problem), TIMEOUT).results
            runner.close()
            row = result.attention.out[:, :, -1].float()
            assert (row.isnan() | (row.abs() > 1e30)).all()


def test_a_target_that_cannot_be_loaded_says_why_in_one_line(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import ctypes; ctypes.string_at(0)\n")
    for text, why in [
        ("nowhere.py:f", "does not exist"),
        (f"{bad}:f", "its process killed by SIGSEGV"),
    ]:
        runner = IsolatedRunner(TargetSpec(text), "cpu")
        with pytest.raises(LoadError, match=why) as error:
            runner.describe()
        assert "\n" not in str(error.value)
        runner.close()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('x' * 6_000_000)", "xxx"),
        (
            "def attention(q, k, v): ...\n"
            "attention.attnproof_precision = {'name': 'x' * 6_000_000}",
            "cannot be loaded, its process sent a header of over",
        ),
    ],
)
def test_a_target_that_says_too_much_when_it_is_loaded(tmp_path, source, said):
    (tmp_path / "long.py").write_text(source)
    runner = IsolatedRunner(TargetSpec(f"{tmp_path}/long.py:attention"), "cpu")
    with pytest.raises(LoadError, match=said) as caught:
        runner.describe()
    assert len(str(caught.value)) < 10_000
    runner.close()


def test_a_target_that_can_no_longer_be_loaded_is_a_crash(tmp_path):
    source = tmp_path / "fleeting.py"
    source.write_text(MISBEHAVING.read_text())
    runner = IsolatedRunner(TargetSpec(f"{source}:exits"), "cpu")
    runner.run(plan_of(), TIMEOUT)
    source.unlink()
    reply = runner.run(plan_of(), TIMEOUT)

    assert reply.outcome is Outcome.CRASHED
    assert "does not exist" in reply.reason


def test_two_targets_run_side_by_side():
    plan = plan_of()
    one, other = always("attention"), always("prints_where_it_runs")
    assert_conforms(one.run(plan, TIMEOUT), plan)
    where = other.run(plan, TIMEOUT).results[0].attention.out.flatten()[0]
    assert_conforms(one.run(plan, TIMEOUT), plan)
    one.close()
    again = other.run(plan, TIMEOUT).results[0].attention.out.flatten()[0]
    other.close()

    assert where == again
