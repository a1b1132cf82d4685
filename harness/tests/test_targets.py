"""From the text of a target to a backend, and every way in which that fails."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from attn_reference.precision import FLASH
from attn_reference.problem import Problem
from attnproof import registry
from attnproof.backend import Backend, Description
from attnproof.inputs.make import make_inputs
from attnproof.precision import (
    cpu_eager_precision,
    cpu_flash_precision,
    cuda_efficient_precision,
)
from attnproof.targets import LoadError, TargetSpec, describe, load, registered

SDPA = "torch.nn.functional:scaled_dot_product_attention"
WORKS = """
import torch

def attention(q, k, v, *, scale=None):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)

class Holder:
    attention = staticmethod(attention)

attention_in_16_bits = 16
"""


@pytest.fixture(autouse=True)
def _untouched_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "modules", sys.modules.copy())


@pytest.fixture
def works(tmp_path: Path) -> Path:
    path = tmp_path / "works.py"
    path.write_text(WORKS)
    return path


def load_error(text: str, signature: str | None = None) -> str:
    with pytest.raises(LoadError) as caught:
        load(TargetSpec(text, signature))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_registered_names_the_backends_without_importing_them() -> None:
    assert {"sdpa", "sdpa-flash", "sdpa-math", "eager", "reference"} <= set(registered())
    assert list(registered()) == sorted(registered())


@pytest.mark.parametrize("name", ["sdpa", "sdpa-flash", "sdpa-math", "eager", "reference"])
def test_a_registered_backend_is_loaded_by_name(name: str) -> None:
    backend = load(TargetSpec(name))
    assert isinstance(backend, Backend)
    assert backend.name == name


def test_a_description_travels_as_plain_values() -> None:
    description = describe(load(TargetSpec("eager")), "cpu")
    assert description.precision == cpu_eager_precision()
    assert description.unavailable is None
    assert Description.from_dict(description.as_dict()) == description


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_without_a_cuda_device_the_description_says_so(name: str) -> None:
    assert describe(load(TargetSpec(name)), "cuda").unavailable == (
        f"no CUDA device: torch.cuda.is_available() is False (torch {torch.__version__})"
    )


def test_a_device_that_is_not_declared_is_unavailable() -> None:
    assert describe(load(TargetSpec("eager")), "mps").unavailable == (
        "does not run on mps: it declares cpu, cuda"
    )


def test_a_builtin_function_of_a_module_under_a_named_signature() -> None:
    backend = load(TargetSpec(SDPA, "sdpa"))
    assert backend.name == SDPA
    assert backend.precision("cpu") == load(TargetSpec("sdpa")).precision("cpu")
    assert backend.precision("cpu") == cpu_flash_precision()
    assert backend.precision("cuda") == cuda_efficient_precision()
    problem = Problem(seqlen_q=3, head_dim=8)
    assert backend.attention(make_inputs(problem), problem).out.shape == (1, 1, 3, 8)


def test_a_function_of_a_file(works: Path) -> None:
    backend = load(TargetSpec(f"{works}:attention"))
    assert backend.precision("cpu") == FLASH
    assert backend.capabilities.devices == ("cpu", "cuda")
    assert "scale" in backend.capabilities.features


def test_an_attribute_may_be_dotted(works: Path) -> None:
    assert load(TargetSpec(f"{works}:Holder.attention")).name == f"{works}:Holder.attention"


def test_a_module_in_the_working_directory(works: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(works.parent)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(works.parent))])
    assert load(TargetSpec("works:attention")).name == "works:attention"


def test_a_file_may_import_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "sibling_of_target.py").write_text(WORKS)
    (tmp_path / "target.py").write_text("from sibling_of_target import attention\n")
    load(TargetSpec(f"{tmp_path / 'target.py'}:attention"))


def test_a_backend_object_is_a_target(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("from attnproof.backends.eager import eager as mine\n")
    assert load(TargetSpec(f"{path}:mine")).name == "eager"
    assert "is a Backend; --signature sdpa is for functions" in load_error(f"{path}:mine", "sdpa")


def test_an_unknown_backend_lists_the_known_ones() -> None:
    message = load_error("sdap")
    assert message.startswith("sdap: unknown backend; did you mean sdpa? registered are eager, ")
    assert "sdpa, sdpa-cudnn, sdpa-efficient, sdpa-flash, sdpa-math" in message
    assert "module:function" in message


def test_an_unknown_signature_lists_the_known_ones() -> None:
    assert load_error(SDPA, "torch") == (
        "--signature torch: unknown; known are sdpa, flash_attn, attnproof"
    )


def test_a_signature_is_not_for_registered_backends() -> None:
    assert "sdpa: is a registered backend" in load_error("sdpa", "sdpa")


@pytest.mark.parametrize("text", ["", ":", "torch:", ":attention"])
def test_a_text_that_is_no_target(text: str) -> None:
    assert "unknown backend" in load_error(text) or "is not a target" in load_error(text)


def test_a_module_that_is_not_found() -> None:
    assert load_error("no_such_module:f") == (
        "no_such_module:f: module 'no_such_module' is not found"
    )
    assert load_error("torch.no_such:f") == "torch.no_such:f: module 'torch.no_such' is not found"


def test_a_place_that_is_neither_module_nor_file() -> None:
    assert "'kernels/mine' is neither the name of a module nor a .py file" in load_error(
        "kernels/mine:f"
    )


def test_a_module_that_needs_another_that_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "needs.py").write_text("import no_such_module\n")
    message = load_error(f"{tmp_path / 'needs.py'}:f")
    assert message.endswith("needs module 'no_such_module': not found")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('two\\nlines')", "cannot be imported: RuntimeError: two lines"),
        ("def f(:", "cannot be imported: SyntaxError: invalid syntax"),
        ("import sys; sys.exit(3)", "cannot be imported: SystemExit: 3"),
        ("raise ValueError", "cannot be imported: ValueError"),
        ("from torch import no_such", "cannot be imported: ImportError: cannot import name"),
    ],
)
def test_a_file_that_cannot_be_imported(tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "fails.py").write_text(source)
    assert said in load_error(f"{tmp_path / 'fails.py'}:f")


def test_an_attribute_that_is_not_there(works: Path) -> None:
    message = load_error(f"{works}:atention")
    assert f"file '{works}' has no attribute 'atention'; did you mean attention" in message
    assert "'Holder' has no attribute 'x'" in load_error(f"{works}:Holder.x")


def test_an_attribute_that_is_not_callable(works: Path) -> None:
    message = load_error(f"{works}:attention_in_16_bits")
    assert message.endswith(
        "is of type int, neither callable nor a Backend; "
        "a target is a function that computes attention"
    )


def test_a_class_is_not_a_function(works: Path) -> None:
    assert "is a class" in load_error(f"{works}:Holder")


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    assert load_error("no/such.py:f") == "no/such.py:f: file no/such.py does not exist"
    (tmp_path / "folder.py").mkdir()
    assert load_error(f"{tmp_path}/folder.py:f").endswith("folder.py is a folder")


def test_a_file_without_a_function(works: Path) -> None:
    assert f"names no function; write {works}:FUNCTION" in load_error(str(works))


def test_a_builtin_needs_a_signature() -> None:
    message = load_error(SDPA)
    assert "shows no parameters" in message
    assert "--signature sdpa|flash_attn|attnproof" in message


def test_a_function_with_other_parameters() -> None:
    message = load_error("torch.nn.functional:softmax")
    assert "its parameters (input, dim, _stacklevel, dtype) match no signature" in message
    assert "sdpa: (query, key, value, attn_mask" in message


def test_a_module_without_the_functions_of_flash_attn() -> None:
    message = load_error("torch.nn.functional", "flash_attn")
    assert "offers no flash_attn_func" in message


def test_a_malformed_declaration_is_a_load_error(tmp_path: Path) -> None:
    path = tmp_path / "declares.py"
    path.write_text(f"{WORKS}\nattention.attnproof_capabilities = {{'dtype': ['fp32']}}\n")
    assert "attnproof_capabilities: unknown field 'dtype'" in load_error(f"{path}:attention")


def test_a_name_that_is_registered_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("twice", "attnproof.backends.eager:eager", registry.GROUP),
        EntryPoint("twice", "attnproof.backends.sdpa:sdpa", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    assert load_error("twice") == (
        "twice: is registered more than once: "
        "attnproof.backends.eager:eager and attnproof.backends.sdpa:sdpa"
    )


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("attnproof.backends.eager:attention", "is of type function, not a Backend"),
        ("attnproof.backends.eager:nothing", "cannot be imported: AttributeError"),
        ("no_such_package.backend:it", "needs module 'no_such_package': not found"),
    ],
)
def test_a_registered_backend_that_does_not_load(
    monkeypatch: pytest.MonkeyPatch, value: str, said: str
) -> None:
    point = EntryPoint("broken", value, registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    assert said in load_error("broken")
