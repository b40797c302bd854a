"""bf16 where the processor has it, by the plain way elsewhere."""

import os
import subprocess
import sys

import pytest
import torch

import model.lean
import model.precision
from model.lean import multiply
from model.precision import emulation_note, has_bf16, onednn_has_bf16, resolve_precision
from tests.shared_data import ROOT

CPU = torch.device("cpu")


def test_onednn_is_asked_and_says_the_truth() -> None:
    """The operator takes bf16 where the capability says so, and fails where it does not: an internal of PyTorch's."""
    x = torch.rand(4, 8, dtype=torch.bfloat16)
    if onednn_has_bf16():
        assert torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], "none").dtype == torch.bfloat16
    else:
        with pytest.raises(RuntimeError, match="could not create a primitive descriptor"):
            torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], "none")


def test_products_in_bf16_do_not_ask_onednn_for_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.lean, "onednn_has_bf16", lambda: False)
    x, weight, bias = torch.rand(2, 5, 8), torch.rand(6, 8), torch.rand(6)
    out = multiply(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), "gelu")
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), multiply(x, weight, bias, "gelu"), rtol=0.02, atol=0.02)


def test_auto_takes_bf16_where_it_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    for onednn, flags, expected in (
        (True, {"avx512_bf16": True}, "bf16"),
        (True, {"amx_bf16": True, "avx512_bf16": False}, "bf16"),
        (True, {"avx512_f": True, "avx512_bf16": False}, "fp32"),  # oneDNN takes bf16 there, and emulates it
        (False, {"avx512_bf16": True}, "fp32"),  # masked
        (False, {}, "fp32"),
    ):
        monkeypatch.setattr(model.precision, "onednn_has_bf16", lambda onednn=onednn: onednn)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags)
        assert resolve_precision("auto", CPU) == expected
        assert resolve_precision("fp32", CPU) == "fp32"
        assert resolve_precision("bf16", CPU) == "bf16"
        assert (emulation_note("bf16", CPU) is None) == (expected == "bf16")
        assert emulation_note("auto", CPU) is None


@pytest.mark.parametrize("mask", ["AVX2", "avx512_core"])
def test_masked_features_are_not_used(mask: str) -> None:
    """As a process that starts with the mask sees it; oneDNN reads it once."""
    code = "import torch, model.precision as p; print(p.resolve_precision('auto', torch.device('cpu')), "
    code += "p.onednn_has_bf16())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": mask},
        capture_output=True,
        text=True,
        check=True,
    )
    precision, takes_bf16 = done.stdout.split()
    assert precision == "fp32"
    assert takes_bf16 == "False" or mask != "AVX2"


def test_this_processor_is_one_or_the_other() -> None:
    assert resolve_precision("auto", CPU) == ("bf16" if has_bf16(CPU) else "fp32")
    assert not (has_bf16(CPU) and not onednn_has_bf16())
