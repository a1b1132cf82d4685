"""Judging attention inside a model: the fp64 model, the verdicts, the command line."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attnproof.cli import check as command
from attnproof.integrations.transformers import register
from attnproof.models import llama, running, session
from attnproof.models.judging import CHECKS, judge, truth
from attnproof.models.scenario import PADDINGS, PROMPTS, STEPS, Scenario
from attnproof.signatures import adapt
from attnproof.verdict import Status

pytest.importorskip("transformers", reason="judges models of transformers")

PLANTED = Path(__file__).parent / "planted" / "in_a_model.py"
PLANTED_NAMES = runpy.run_path(str(PLANTED))
# Which checks of which padding show a fault, in whatever dtype.
EVERYTHING = {f"{check} {padding}" for check in CHECKS for padding in PADDINGS}
DECODING = {f"decoding {padding}" for padding in PADDINGS}
GRADIENTS = {f"gradients {padding}" for padding in PADDINGS}
FORWARD = {f"forward {padding}" for padding in PADDINGS}
SHOWN_BY = {
    "padding_ignored": {"forward left", "decoding left", "decoding right", "gradients left"},
    "top_left_in_decoding": {"decoding none"},
    "scale_two_percent_off": FORWARD | DECODING | GRADIENTS,
    "heads_by_modulo": EVERYTHING,
    "rotated_one_further_beside_left_padding": {"decoding left"},
    "newest_key_not_in_the_cache": DECODING,
    "cache_of_the_first_sequence": DECODING,
    "padding_gives_nan": {"forward left", "decoding left", "greedy tokens left", "gradients left"},
    "probabilities_in_eight_bits": FORWARD | DECODING | GRADIENTS,
    "keys_without_gradient": GRADIENTS,
    "gradient_of_one_head_of_a_group": GRADIENTS,
}


def attnproof(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from attnproof.cli.main import main; main()", *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=os.environ | environment
    )


def judged(target: str, scenario: Scenario) -> dict[str, Status]:
    """The verdicts on a planted function, in this process."""
    (name,) = register(adapt(PLANTED_NAMES[target], target, "attnproof"))
    answer = running.run(scenario, name, "cpu")
    verdicts = judge(scenario, answer, running.run(scenario, "eager", "cpu"))
    return {check: verdict.status for check, verdict in verdicts.items()}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("model", list(llama.MODELS))
def test_the_model_in_fp64_is_that_of_transformers(model: str, padding: str) -> None:
    """Which computes norms, rotations and softmax in fp32 whatever the dtype: 2^-24 and some."""
    scenario = Scenario(model=model, dtype="fp64", padding=padding)
    # In fp64, queries that are padding get NaN from eager attention: the mask of the smallest
    # fp64 is -inf to a softmax in fp32. The NaN reaches every token of the next layer.
    implementation = "eager" if padding != "left" else register("reference")[0]
    answer, true = running.run(scenario, implementation, "cpu"), truth(scenario)
    _, real = scenario.padded(scenario.sequences())
    found = {"forward": answer["forward"][real], "decoding": answer["decoding"].flatten(0, 1)}
    for check, right in true.logits.items():
        torch.testing.assert_close(found[check], right, rtol=0, atol=3e-5)
        assert right.square().mean() > 1
    for name, gradient in true.gradients.items():
        size = float(gradient.square().mean().sqrt())
        torch.testing.assert_close(answer[name], gradient, rtol=0, atol=1e-4 * size)


def test_a_scenario_says_all_there_is_to_say() -> None:
    scenario = Scenario(model="llama-tiny", dtype="bf16", padding="left", seed=3)
    again = Scenario.from_dict(json.loads(json.dumps(scenario.as_dict())))
    assert again == scenario
    for name, weight in scenario.weights().items():
        assert torch.equal(weight, again.weights()[name])
        assert torch.equal(weight, weight.bfloat16().float())
    for one, other in zip(scenario.sequences(), again.sequences(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_is_where_it_should_be_and_has_tokens(padding: str) -> None:
    scenario = Scenario(model="llama-tiny", dtype="fp32", padding=padding)
    tokens, real = scenario.padded(scenario.sequences())
    for n, (prompt, sequence) in enumerate(zip(PROMPTS, scenario.sequences(), strict=True)):
        assert torch.equal(tokens[n][real[n]], sequence)
        assert len(sequence) == prompt + STEPS
    shortest = PROMPTS.index(min(PROMPTS))
    side = slice(None, 3) if padding == "left" else slice(-3, None)
    assert not real[shortest, side].any()
    assert tokens[~real].unique().numel() > 5


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_attention_in_torch_conforms(dtype: str, padding: str) -> None:
    scenario = Scenario(model="llama-tiny", dtype=dtype, padding=padding)
    assert judged("correct", scenario) == dict.fromkeys(CHECKS, Status.CONFORMS)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("fault", PLANTED_NAMES["FAULTS"])
def test_every_planted_fault_shows_where_it_is(fault: str, dtype: str) -> None:
    shown = set()
    for padding in PADDINGS:
        found = judged(fault, Scenario(model="llama-tiny", dtype=dtype, padding=padding))
        shown |= {f"{check} {padding}" for check, s in found.items() if s is Status.DEVIATES}
    expected = SHOWN_BY[fault]
    # Tokens are decided by large gaps alone: not every fault turns one over.
    tokens = {f"greedy tokens {padding}" for padding in PADDINGS}
    assert expected <= shown
    assert shown - tokens <= expected


def test_tokens_that_nothing_decides_are_vacuous() -> None:
    scenario = Scenario(model="llama-tiny", dtype="bf16", padding="none")
    eager = running.run(scenario, "eager", "cpu")
    coarse = eager | {"decoding": eager["decoding"] + 100}
    verdict = judge(scenario, coarse, coarse)["greedy tokens"]
    assert verdict.status is Status.VACUOUS
    assert "too few tokens of 0 decided" in verdict.reason


def test_the_command_line_judges_a_backend(tmp_path: Path) -> None:
    results = tmp_path / "model.json"
    ran = attnproof("check", "sdpa-math", "--model", "llama-tiny", "--json", str(results))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "conforms: 36 cases" in ran.stdout
    found = json.loads(results.read_text())
    assert found["run"]["model"] == "llama-tiny"
    assert {case["chapter"] for case in found["cases"]} == {"model"}
    assert {case["feature"] for case in found["cases"]} == set(CHECKS)
    ids = [case["id"] for case in found["cases"]]
    assert "model/greedy_tokens/llama-tiny_bf16_pad-left_seed0" in ids
    assert all(0 < case["worst"] < 1 for case in found["cases"] if "tokens" not in case["id"])


@pytest.mark.slow
def test_the_command_line_judges_triton_v2() -> None:
    ran = attnproof("check", "triton-v2", "--model", "llama-tiny", "--device", "cpu")
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_command_line_fails_a_planted_fault() -> None:
    target = f"{PLANTED}:rotated_one_further_beside_left_padding"
    ran = attnproof("check", target, "--model", "llama-tiny", "--dtype", "bf16")
    assert ran.returncode == 1
    assert "decoding (1 of 3)" in ran.stdout.splitlines()[-1]
    assert "the rms error of all logits is" in ran.stdout
    assert f"attnproof check {target} --model llama-tiny" in ran.stdout
    assert "attnproof replay" not in ran.stdout


def test_a_target_in_this_process_is_judged_the_same() -> None:
    words = ("--model", "llama-tiny", "--dtype", "fp32", "--in-process")
    assert attnproof("check", "eager", *words).returncode == 0
    assert attnproof("check", f"{PLANTED}:heads_by_modulo", *words).returncode == 1


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("raise NotImplementedError('not on a Friday')", 3, "not on a Friday"),
        ("raise ValueError('no such luck')", 1, "raised ValueError: no such luck"),
        ("os._exit(7)", 1, "exited with status 7"),
        ("time.sleep(60)", 1, "no answer within 2 s"),
        ("torch.nn.functional.silu = torch.relu; return q * 0", 1, "replaced"),
    ],
)
def test_what_a_target_does_costs_its_cases_alone(
    tmp_path: Path, body: str, status: int, said: str
) -> None:
    target = tmp_path / "target.py"
    target.write_text(
        "import os, time, torch\n"
        f"def attend(q, k, v, *, scale, causal='none', mask=None):\n    {body}\n"
    )
    results = tmp_path / "model.json"
    # Only who sleeps is to meet its limit, however busy the machine.
    timeout = "0.5" if "sleep" in body else "30"
    words = ["--model", "llama-tiny", "--dtype", "fp32", "--timeout", timeout]
    words += ["--json", str(results)]
    ran = attnproof("check", f"{target}:attend", *words)
    assert ran.returncode == status, ran.stdout + ran.stderr
    cases = json.loads(results.read_text())["cases"]
    assert len(cases) == 12
    assert said in ran.stdout + "".join(case["reason"] for case in cases)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "gpt-7"), "--model gpt-7: unknown; accepted are llama-tiny, llama-tiny-d128"),
        (("--model", "llama-tiny", "--chapter", "exact"), "--chapter: is for the chapters"),
        (("--model", "llama-tiny", "--workers", "2"), "--workers: is for the chapters"),
        (("--model", "llama-tiny", "--precision", "eager"), "--precision: is for the chapters"),
    ],
)
def test_what_makes_no_sense_is_one_line(words: tuple[str, ...], said: str) -> None:
    ran = attnproof("check", "eager", *words)
    assert ran.returncode == 2
    assert len(ran.stderr.splitlines()) == 1
    assert said in ran.stderr


def test_an_unknown_target_is_one_line() -> None:
    ran = attnproof("check", "nonsense", "--model", "llama-tiny")
    assert ran.returncode == 2
    assert "nonsense: unknown backend" in ran.stderr


@pytest.mark.parametrize(
    ("found", "release", "said"),
    [
        (None, "", "transformers is not installed: pip install 'attnproof[transformers]'"),
        (object(), "4.57.1", "transformers 4.57.1 is older than 5.17"),
    ],
)
def test_without_transformers_nothing_is_judged(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    found: Any,
    release: str,
    said: str,
) -> None:
    import typer

    monkeypatch.setattr(session.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(session, "version", lambda name: release)
    with pytest.raises(typer.Exit) as ended:
        command.check("eager", model="llama-tiny")
    assert ended.value.exit_code == 3
    assert said in capsys.readouterr().err
