"""The oracle against loops that share nothing with it, in Python floats and in 50 digits."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import mpmath
import pytest
import torch

from attn_reference import FEATURES, Inputs, Problem, attention, gradients
from attn_reference.inputs import output_shape


def at(tensor: torch.Tensor, *index: int) -> float:
    """One element; dimensions of size 1 broadcast."""
    place = tuple(0 if n == 1 else i for i, n in zip(index, tensor.shape, strict=True))
    return tensor[place].item()


def rows_of(problem: Problem) -> list[SimpleNamespace]:
    """Each query row: where it is in q, its position, and where the keys of its sequence are."""
    rows = []
    start_q = start_k = 0
    for n in range(problem.batch):
        if problem.packed is not None:
            len_q, len_k = problem.packed[n]
            entry = 0
        else:
            len_q, entry = problem.seqlen_q, n
            len_k = problem.keys if problem.key_lengths is None else problem.key_lengths[n]
            start_q = start_k = 0
        offset = 0 if problem.causal == "top-left" else len_k - len_q
        for i in range(len_q):
            columns = [(j, start_k + j) for j in range(len_k)]
            diagonal = i + offset
            rows.append(
                SimpleNamespace(entry=entry, row=start_q + i, diagonal=diagonal, columns=columns)
            )
        start_q, start_k = start_q + len_q, start_k + len_k
    return rows


def key_index(inputs: Inputs, problem: Problem, entry: int, column: int) -> tuple[int, int]:
    """Where key ``column`` of a batch entry lies in k: (first index, index in the sequence)."""
    if problem.page_size is None:
        return entry, column
    page = inputs.page_table[entry, column // problem.page_size].item()
    return page, column % problem.page_size


def visible(
    problem: Problem, inputs: Inputs, head: int, r: SimpleNamespace, j: int, c: int
) -> bool:
    if problem.causal != "none" and j > r.diagonal:
        return False
    if problem.window is not None:
        left, right = problem.window
        if left is not None and j < r.diagonal - left:
            return False
        if right is not None and j > r.diagonal + right:
            return False
    if inputs.mask is not None and not at(inputs.mask, r.entry, head, r.row, c):
        return False
    return inputs.bias is None or at(inputs.bias, r.entry, head, r.row, c) != float("-inf")


def brute_force(inputs: Inputs, problem: Problem, m=mpmath.fp) -> tuple[dict, dict]:
    """out and lse by loops over rows, heads and keys in the arithmetic ``m``; {index: value}."""
    out, lse = {}, {}
    scale = m.mpf(problem.softmax_scale)
    for r in rows_of(problem):
        for head in range(problem.heads_q):
            kv_head = head // (problem.heads_q // problem.heads_kv)
            query = [m.mpf(x) for x in inputs.q[r.entry, head, r.row].tolist()]
            weights, values = [], []
            for j, c in r.columns:
                if not visible(problem, inputs, head, r, j, c):
                    continue
                first, place = key_index(inputs, problem, r.entry, c)
                key = inputs.k[first, kv_head, place].tolist()
                score = scale * sum(a * m.mpf(b) for a, b in zip(query, key, strict=True))
                if problem.softcap:
                    score = problem.softcap * m.tanh(score / problem.softcap)
                if inputs.bias is not None:
                    score += m.mpf(at(inputs.bias, r.entry, head, r.row, c))
                if problem.alibi:
                    score -= m.mpf(inputs.alibi_slopes[head].item()) * abs(r.diagonal - j)
                weight = m.exp(score)
                weights.append(weight)
                kept = inputs.keep_mask is None or at(inputs.keep_mask, r.entry, head, r.row, c)
                factor = weight / (1 - m.mpf(problem.dropout)) if kept else m.mpf(0)
                values.append([factor * x for x in inputs.v[first, kv_head, place].tolist()])
            if problem.sinks:
                weights.append(m.exp(m.mpf(inputs.sinks[head].item())))
            total = m.fsum(weights)
            place = (r.entry, head, r.row)
            lse[place] = m.log(total) if weights else -m.inf
            for e in range(problem.head_dim_v):
                column = m.fsum([value[e] for value in values])
                out[(*place, e)] = column / total if weights else m.mpf(0)
    return out, lse


def dense(values: dict, shape: tuple[int, ...]) -> torch.Tensor:
    """The values of brute_force as fp64; every element must be there."""
    assert len(values) == torch.Size(shape).numel()
    result = torch.empty(shape, dtype=torch.float64)
    for index, value in values.items():
        result[index] = float(value)
    return result


def test_problems_use_every_feature(every_feature):
    used = {feature for problem in every_feature for feature in problem.features}
    assert used == set(FEATURES) - {"gradients", "lse gradient"}


def test_equals_loops(problem, random_inputs, device):
    inputs = random_inputs(problem)
    out, lse = brute_force(inputs, problem)
    found = attention(random_inputs(problem, device), problem)
    shape = output_shape(problem)
    assert found.out.dtype == found.lse.dtype == torch.float64
    assert found.out.device.type == device
    torch.testing.assert_close(found.out.cpu(), dense(out, shape), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.lse.cpu(), dense(lse, shape[:3]), rtol=1e-12, atol=1e-13)


def test_equals_fifty_digits(problem, random_inputs):
    inputs = random_inputs(problem)
    with mpmath.mp.workdps(50):
        out, lse = brute_force(inputs, problem, mpmath.mp)
    found = attention(inputs, problem)
    shape = output_shape(problem)
    # A dozen roundings of 2^-53 on values of order one.
    torch.testing.assert_close(found.out, dense(out, shape), rtol=0, atol=4e-15)
    torch.testing.assert_close(found.lse, dense(lse, shape[:3]), rtol=0, atol=4e-15)


@pytest.mark.parametrize("spread", [1e-3, 30.0, 1e4])
def test_equals_fifty_digits_for_flat_and_peaked_rows(spread, random_inputs):
    problem = Problem(heads_q=2, seqlen_q=4, seqlen_k=9, head_dim=4, dtype="fp32", sinks=True)
    inputs = random_inputs(problem)
    inputs.q *= spread
    inputs.sinks *= spread
    with mpmath.mp.workdps(50):
        out, lse = brute_force(inputs, problem, mpmath.mp)
    found = attention(inputs, problem)
    # exp turns the absolute error of a score into a relative error of P.
    tolerance = 1e-15 * (4 + spread * 20)
    torch.testing.assert_close(found.out, dense(out, output_shape(problem)), rtol=0, atol=tolerance)
    torch.testing.assert_close(found.lse, dense(lse, found.lse.shape), rtol=1e-15, atol=tolerance)


def test_loops_notice_a_wrong_answer(random_inputs):
    """The comparison above can fail: a window off by one is far outside its tolerance."""
    problem = Problem(seqlen_q=6, head_dim=3, window=(2, 0))
    inputs = random_inputs(problem)
    out, _ = brute_force(inputs, problem)
    wrong = attention(inputs, problem.replace(window=(1, 0))).out
    assert (wrong - dense(out, wrong.shape)).abs().max() > 0.1


SIZE = {"heads_q": 2, "heads_kv": 1, "seqlen_q": 3, "seqlen_k": 4, "head_dim": 2, "dtype": "fp64"}


@pytest.mark.parametrize(
    "problem",
    [
        Problem(**SIZE, causal="bottom-right", sinks=True, head_dim_v=1, dropout=0.3),
        Problem(**SIZE, window=(1, 0), softcap=0.75, bias="hiding", bias_shape="1hq1"),
        Problem(**SIZE, softcap=2.0, alibi=True, sinks=True, bias="random", mask="random"),
        Problem(packed=((2, 3), (1, 2)), head_dim=2, dtype="fp64", dropout=0.5, scale=-1.5),
    ],
    ids=lambda p: p.id,
)
def test_gradients_equal_differences_in_fifty_digits(problem, random_inputs):
    """Differences of the loops, five points, in 50 digits: right to 1e-13."""
    optional = [n for n in ("bias", "sinks") if getattr(problem, n)]
    problem = problem.replace(gradients=("q", "k", "v", *optional), lse_gradient=True)
    inputs = random_inputs(problem)

    def value(name: str, place: int, by: float) -> mpmath.mpf:
        changed = getattr(inputs, name).clone()
        changed.view(-1)[place] += by
        out, lse = brute_force(replace(inputs, **{name: changed}), problem, mpmath.mp)
        total = sum(x * at(inputs.grad_out, *index) for index, x in out.items())
        finite = {index: x for index, x in lse.items() if x != -mpmath.mp.inf}
        return total + sum(x * at(inputs.grad_lse, *index) for index, x in finite.items())

    step = 2.0**-12
    with mpmath.mp.workdps(50):
        for name in problem.gradients:
            # Coarse enough for a step to be exact in fp64.
            getattr(inputs, name).mul_(2.0**20).round_().div_(2.0**20)
        found = gradients(inputs, problem).tensors()
        for name, gradient in found.items():
            for place, mine in enumerate(gradient.flatten().tolist()):
                if getattr(inputs, name).flatten()[place] == -torch.inf:
                    assert mine == 0
                    continue
                near = value(name, place, step) - value(name, place, -step)
                far = value(name, place, 2 * step) - value(name, place, -2 * step)
                assert mine == pytest.approx(float((8 * near - far) / (12 * step)), abs=1e-12)
