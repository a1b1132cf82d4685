"""Measuring in rounds: what is no measurement is none, and costs its own column alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from attn_reference.problem import Problem
from attnproof.benchmark import rounds, session
from attnproof.benchmark.ceilings import Ceilings
from attnproof.benchmark.measurement import Ended, Measurement
from attnproof.benchmark.peer import OutOfTime, Peer
from attnproof.benchmark.rounds import Bench, for_capabilities
from attnproof.benchmark.session import BenchOptions
from attnproof.benchmark.storage import read
from attnproof.benchmark.suites import Cell
from attnproof.targets import TargetSpec

PLANTED = Path(__file__).parent / "planted" / "benchmarked.py"
FORWARD = Cell(
    suite="test", direction="forward", problem=Problem(heads_q=2, seqlen_q=32, head_dim=16)
)
BACKWARD = Cell(
    suite="test",
    direction="backward",
    problem=FORWARD.problem.replace(gradients=("q", "k", "v")),
)
LONGER = Cell(
    suite="test", direction="forward", problem=FORWARD.problem.replace(seqlen_q=64, seqlen_k=64)
)
SKY = Ceilings(matmul=math.inf, memory=math.inf)
LOOK_FAST = {
    "zeros": Ended.DEVIATES,
    "wrong_scale": Ended.DEVIATES,
    "cached": Ended.DEVIATES,
    "cached_by_address": Ended.DEVIATES,
    "half_a_result": Ended.DEVIATES,
}
BREAK = {
    "raises": Ended.CRASHED,
    "refuses": Ended.UNSUPPORTED,
    "exits_later": Ended.CRASHED,
}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def peers(request: pytest.FixtureRequest) -> Iterator[list[Peer]]:
    """Targets of the planted file, loaded side by side."""
    made = [Peer(TargetSpec(f"{PLANTED}:{name}", "sdpa"), "cpu") for name in request.param]
    with ThreadPoolExecutor() as pool:
        list(pool.map(Peer.describe, made))
    yield made
    for peer in made:
        peer.close()


def bench(peers: list[Peer], **more: object) -> Bench:
    return Bench(peers=peers, device="cpu", **{"rounds": 2, "ceilings": SKY, **more})  # type: ignore[arg-type]


def by_function(found: list[Measurement]) -> dict[str, Measurement]:
    return {one.target.rpartition(":")[2]: one for one in found}


@pytest.mark.parametrize("peers", [("honest", *LOOK_FAST)], indirect=True)
def test_a_timed_call_that_is_not_attention_is_no_measurement(peers: list[Peer]) -> None:
    found = by_function(bench(peers).measure(FORWARD))
    assert {name: found[name].ended for name in LOOK_FAST} == LOOK_FAST
    assert not any(found[name].seconds for name in LOOK_FAST)
    assert "beyond the error budget" in found["zeros"].reason
    assert "shape" in found["half_a_result"].reason
    honest = found["honest"]
    assert honest.ended is Ended.MEASURED
    assert len(honest.seconds) == 2 * rounds.CALLS
    assert honest.judged == 2
    assert honest.sample == "all of it"
    assert set(honest.startup) == {"import", "first", "total"}


@pytest.mark.parametrize("peers", [("honest", *BREAK)], indirect=True)
def test_what_breaks_costs_its_own_column(peers: list[Peer]) -> None:
    measuring = bench(peers)
    found = by_function(measuring.measure(FORWARD))
    assert {name: found[name].ended for name in BREAK} == BREAK
    assert found["honest"].ended is Ended.MEASURED
    assert found["raises"].reason == "raised ValueError: not today"
    assert found["refuses"].reason == "queries of an even number"
    assert "exit status 7" in found["exits_later"].reason
    assert "leaving early" in found["exits_later"].reason
    # What a target declares not to support is not asked of it.
    causal = Cell(suite="test", direction="forward", problem=FORWARD.problem.replace(softcap=5.0))
    again = by_function(measuring.measure(causal))
    assert again["honest"].ended is Ended.UNSUPPORTED
    assert "softcap is not supported" in again["honest"].reason


@pytest.mark.parametrize("peers", [("honest", "wrong_gradient")], indirect=True)
def test_gradients_are_judged(peers: list[Peer]) -> None:
    found = by_function(bench(peers).measure(BACKWARD))
    assert found["honest"].ended is Ended.MEASURED
    assert found["wrong_gradient"].ended is Ended.DEVIATES
    assert "elements of dk" in found["wrong_gradient"].reason


@pytest.mark.parametrize("peers", [("hangs",)], indirect=True)
def test_what_hangs_is_ended_and_not_asked_for_more(peers: list[Peer]) -> None:
    measuring = bench(peers, timeout=1.0)
    (first,) = measuring.measure(FORWARD)
    assert first.ended is Ended.TIMED_OUT
    (second,) = measuring.measure(LONGER)
    assert second.ended is Ended.SKIPPED
    assert "timed out on b1 d16 S32 full" in second.reason


@pytest.mark.parametrize("peers", [("hangs_on_64", "honest")], indirect=True)
def test_what_hangs_while_all_compile_costs_its_own_column(
    peers: list[Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "registered", lambda: [peer.name for peer in peers])
    measuring = bench(peers, timeout=2.0)
    measuring.measure(FORWARD)
    assert len(measuring._startup) == 2  # from now on both compile at the same time
    found = by_function(measuring.measure(LONGER))
    assert found["hangs_on_64"].ended is Ended.TIMED_OUT
    assert found["honest"].ended is Ended.MEASURED


class Silent:
    """A run that nobody follows."""

    def tell(self, text: str) -> None: ...

    def done(self, cell: Cell, found: object) -> None: ...


@pytest.mark.parametrize("peers", [("honest", "hangs_on_64")], indirect=True)
def test_time_that_runs_out_leaves_what_was_measured(
    peers: list[Peer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where a target hangs; and a run goes on from there."""
    monkeypatch.setattr(session, "measure_ceilings", lambda device, dtype: SKY)
    path = tmp_path / "run.json"

    def run(end: float, timeout: float, *, resume: bool = False) -> session.BenchSession:
        options = BenchOptions(
            targets=tuple(peer.name for peer in peers),
            signature="sdpa",
            cells=(FORWARD, LONGER),
            device="cpu",
            rounds=1,
            seed=0,
            timeout=timeout,
            end=end,
            json=path,
            resume=resume,
        )
        for peer in peers:
            peer.end = end
        return session.run(options, peers, Silent())

    begun = time.monotonic()
    found = run(begun + 4.0, timeout=100.0)
    assert time.monotonic() - begun < 20.0
    assert found.left == 1
    assert [one.cell for one in found.measurements] == [FORWARD] * 2
    assert len(read(path)[1]) == 2
    found = run(math.inf, timeout=1.0, resume=True)
    assert (found.left, found.taken_over) == (0, 2)
    assert [one.ended for one in found.measurements[2:]] == [Ended.MEASURED, Ended.TIMED_OUT]


def test_time_runs_while_a_target_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(1000)\n", "utf-8")
    loading = Peer(TargetSpec(f"{tmp_path}/slow.py:f", "sdpa"), "cpu", time.monotonic() + 1.0)
    with pytest.raises(OutOfTime):
        loading.describe()
    loading.close()


@pytest.mark.parametrize("peers", [("honest",)], indirect=True)
def test_faster_than_the_device_can_be_is_no_measurement(peers: list[Peer]) -> None:
    slow = Ceilings(matmul=1e3, memory=1e12)
    (found,) = bench(peers, ceilings=slow, rounds=1).measure(FORWARD)
    assert found.ended is Ended.TOO_FAST
    assert not found.seconds
    assert "at the ceilings of this device" in found.reason
    overhead = Cell(suite="test", direction="both", problem=BACKWARD.problem, clock="wall")
    (wall,) = bench(peers, ceilings=slow, rounds=1).measure(overhead)
    assert wall.ended is Ended.MEASURED  # no device is at work most of that time
    assert wall.iterations > 1


@pytest.mark.parametrize("peers", [("honest",)], indirect=True)
def test_a_square_causal_problem_is_given_in_the_alignment_that_is_supported(
    peers: list[Peer],
) -> None:
    capabilities = peers[0].describe().capabilities
    turned = Cell(
        suite="test", direction="forward", problem=FORWARD.problem.replace(causal="bottom-right")
    )
    assert for_capabilities(turned, capabilities).problem.causal == "top-left"
    (found,) = bench(peers, rounds=1).measure(turned)
    assert found.ended is Ended.MEASURED
    oblong = Cell(
        suite="test",
        direction="forward",
        problem=FORWARD.problem.replace(causal="bottom-right", seqlen_k=64),
    )
    assert for_capabilities(oblong, capabilities) == oblong
