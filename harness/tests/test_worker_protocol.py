"""The lines and bytes between the processes, and what the parent believes of them."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
from contextlib import suppress

import pytest
import torch

from attn_reference.inputs import Attention, Gradients, Inputs
from attn_reference.problem import Problem
from attnproof.inputs.make import make_inputs
from attnproof.plan import Call, CallResult, Outcome, Plan, Surroundings
from attnproof.worker.messages import (
    plan_header,
    plan_of,
    read_outcome,
    read_results,
    results_header,
)
from attnproof.worker.protocol import HEADER_LIMIT, Channel, Closed, ProtocolError, clean

PROBLEM = Problem(heads_q=2, seqlen_q=3, head_dim=4, gradients=("q",), softcap=2.5)
PLAN = Plan(calls=[Call(problem=PROBLEM, inputs=make_inputs(PROBLEM))])


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    theirs.settimeout(10)
    with ours, theirs:
        yield ours, theirs


def test_headers_arrive_one_by_one_with_their_bytes(pair):
    sender, receiver = Channel(pair[0]), Channel(pair[1])
    sender.send({"first": 1}, [memoryview(b"abc"), memoryview(b"\ndef")])
    sender.send({"second": "ü"})

    assert receiver.receive() == {"first": 1}
    room = bytearray(7)
    receiver.receive_into(memoryview(room))
    assert bytes(room) == b"abc\ndef"
    assert receiver.receive() == {"second": "ü"}


def test_more_bytes_than_a_socket_holds(pair):
    sent = os.urandom(1 << 22)
    sender, receiver = Channel(pair[0]), Channel(pair[1])
    thread = threading.Thread(target=sender.send, args=({"n": len(sent)}, [memoryview(sent)]))
    thread.start()
    room = bytearray(receiver.receive()["n"])
    receiver.receive_into(memoryview(room))
    thread.join()

    assert room == sent


def test_open_files_arrive_where_they_are_expected(pair):
    sender, receiver = Channel(pair[0]), Channel(pair[1], takes_files=True)
    with tempfile.TemporaryFile() as one, tempfile.TemporaryFile() as two:
        one.write(b"one")
        one.flush()
        sender.send({}, descriptors=[one.fileno(), two.fileno()])
    receiver.receive()
    first, second = receiver.take_descriptor(), receiver.take_descriptor()
    assert os.pread(first, 9, 0) == b"one"
    os.close(first)
    os.close(second)
    with pytest.raises(ProtocolError, match="without the open file"):
        receiver.take_descriptor()


def test_open_files_are_dropped_where_they_are_not(pair):
    before = len(os.listdir("/proc/self/fd"))
    with tempfile.TemporaryFile() as file:
        Channel(pair[0]).send({"a": 1}, descriptors=[file.fileno()])
    receiver = Channel(pair[1])

    assert receiver.receive() == {"a": 1}
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_end_of_the_stream_is_told_apart(pair):
    receiver = Channel(pair[1])
    assert receiver.quiet()
    pair[0].close()
    assert not receiver.quiet()
    with pytest.raises(Closed):
        receiver.receive()
    with pytest.raises(Closed):
        receiver.receive_into(memoryview(bytearray(1)))


def test_what_nobody_asked_for_is_not_quiet(pair):
    receiver = Channel(pair[1])
    pair[0].sendall(b"{}\n{}\n")
    assert not receiver.quiet()
    receiver.receive()
    assert not receiver.quiet()
    receiver.receive()
    assert receiver.quiet()


@pytest.mark.parametrize(
    "line", [b"x\n", b"[]\n", b"3\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n", b'{"a":\n']
)
def test_a_line_that_is_no_json_object_is_refused(pair, line):
    pair[0].sendall(line)
    with pytest.raises(ProtocolError, match="a header that is no"):
        Channel(pair[1]).receive()


def test_an_endless_line_is_refused(pair):
    def send():
        with suppress(OSError):
            pair[0].sendall(b"x" * (2 * HEADER_LIMIT))

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(ProtocolError, match="a header of over"):
        Channel(pair[1]).receive()
    pair[1].close()
    thread.join()


def test_a_plan_survives_the_way():
    plan = Plan(
        calls=[Call(problem=PROBLEM, inputs=PLAN.calls[0].inputs, side_stream=True)],
        surroundings=Surroundings.GUARD_AFTER,
        canary_allocations=True,
        invalid=True,
        threads=3,
    )
    inputs = [call.inputs for call in plan.calls]

    assert plan_of(json.loads(json.dumps(plan_header(plan))), inputs) == plan


def arrived(headers, payload: bytes, plan: Plan = PLAN):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(10)
        ours.sendall(payload)
        ours.close()
        return read_results(json.loads(json.dumps(headers)), plan, Channel(theirs))


def test_results_survive_the_way():
    result = CallResult(
        attention=Attention(
            out=torch.randn(1, 2, 3, 4).to(torch.bfloat16),
            lse=torch.randn(1, 2, 3),
            keep_mask=torch.rand(1, 2, 3, 3) > 0.5,
        ),
        gradients=Gradients(q=torch.randn(1, 2, 3, 4, dtype=torch.float64)),
        traceback="Traceback\n  here",
        complaints=["left a thread running"],
        out_strides=(24, 12, 4, 1),
        seconds=0.25,
    )
    headers, payload = results_header([result])
    (back,) = arrived(headers, b"".join(payload))

    for one, other in (
        (back.attention.out, result.attention.out),
        (back.attention.lse, result.attention.lse),
        (back.attention.keep_mask, result.attention.keep_mask),
        (back.gradients.q, result.gradients.q),
    ):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert back.gradients.k is None
    for name in ("traceback", "complaints", "out_strides", "seconds", "raised", "unsupported"):
        assert getattr(back, name) == getattr(result, name)


@pytest.mark.parametrize("shape", [(), (0,), (1, 2, 0, 4)])
def test_scalars_and_empty_tensors_survive(shape):
    headers, payload = results_header([CallResult(attention=Attention(out=torch.ones(shape)))])
    (back,) = arrived(headers, b"".join(payload))

    assert back.attention.out.shape == shape
    assert back.attention.out.eq(1).all()


def test_a_bool_holds_nothing_but_zero_and_one():
    headers, _ = results_header([CallResult(attention=Attention(out=torch.ones(3).bool()))])
    (back,) = arrived(headers, bytes([0, 255, 1]))

    assert back.attention.out.view(torch.uint8).tolist() == [0, 1, 1]


GOOD = {
    "unsupported": None,
    "raised": None,
    "traceback": "",
    "complaints": [],
    "out_strides": None,
    "seconds": 0.0,
    "tensors": [],
}
TENSOR = {"role": "out", "dtype": "float32", "shape": [1]}


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        (None, "no list of at most 1"),
        ([GOOD, GOOD], "no list of at most 1"),
        ([3], "holds something else than dict"),
        ([{**GOOD, "raised": 3}], "raised is no text"),
        ([{**GOOD, "seconds": None}], "seconds that are no number"),
        ([{**GOOD, "complaints": [1]}], "complaints holds something else"),
        ([{**GOOD, "complaints": ["x"] * 1000}], "no list of at most 200"),
        ([{**GOOD, "out_strides": [True]}], "out_strides holds something else than int"),
        ([{**GOOD, "tensors": {}}], "tensors is no list"),
        ([{**GOOD, "tensors": [TENSOR, TENSOR]}], "two tensors called out"),
        ([{**GOOD, "tensors": [{**TENSOR, "role": "weights"}]}], "a tensor called 'weights'"),
        ([{**GOOD, "tensors": [{**TENSOR, "role": ["out"]}]}], "a tensor called"),
        ([{**GOOD, "tensors": [{**TENSOR, "dtype": "object"}]}], "out of dtype 'object'"),
        ([{**GOOD, "tensors": [{**TENSOR, "dtype": ["x"]}]}], "out of dtype"),
        ([{**GOOD, "tensors": [{**TENSOR, "shape": [-1]}]}], "out of shape"),
        ([{**GOOD, "tensors": [{**TENSOR, "shape": [1.0]}]}], "out of shape"),
        ([{**GOOD, "tensors": [{**TENSOR, "shape": [True]}]}], "out of shape"),
        ([{**GOOD, "tensors": [{**TENSOR, "shape": "44"}]}], "out of shape"),
        ([{**GOOD, "tensors": [{**TENSOR, "shape": [1] * 9}]}], "out of shape"),
        ([{**GOOD, "tensors": [{**TENSOR, "shape": [1 << 40]}]}], "more bytes than any answer"),
        ([{**GOOD, "tensors": [{**TENSOR, "shape": [0, 1 << 62, 4]}]}], "out of shape"),
    ],
)
def test_results_that_do_not_fit_are_refused(headers, why):
    with pytest.raises(ProtocolError, match=why):
        arrived(headers, b"\0" * 64)


def test_missing_bytes_are_the_end_of_the_stream():
    with pytest.raises(Closed):
        arrived([{**GOOD, "tensors": [{**TENSOR, "shape": [4]}]}], b"123")


@pytest.mark.parametrize("said", [None, "timed out", "conforms", 3, ["answered"]])
def test_an_outcome_that_a_process_cannot_have_is_refused(said):
    with pytest.raises(ProtocolError, match="outcome"):
        read_outcome({"outcome": said, "reason": ""})


def test_outcomes_are_read():
    assert read_outcome({"outcome": "answered"}) == (Outcome.ANSWERED, "")
    assert read_outcome({"outcome": "crashed", "reason": "lost"}) == (Outcome.CRASHED, "lost")


def test_text_of_a_target_drives_no_terminal():
    hidden = "\N{REPLACEMENT CHARACTER}"
    assert clean("a\x1b[31mb\u202e\n\tc") == f"a{hidden}[31mb{hidden}\n\tc"
    assert clean("x" * 50, 10) == "x" * 9 + "…"


def test_inputs_are_not_part_of_the_header():
    header = json.dumps(plan_header(PLAN))
    assert isinstance(PLAN.calls[0].inputs, Inputs)
    assert len(header) < 300
