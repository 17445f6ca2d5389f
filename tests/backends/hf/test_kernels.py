"""The kernels replace PyTorch's for a whole process, so each test runs them in one of its own."""

import subprocess
import sys
import textwrap

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


def run_in_process(code: str) -> str:
    prelude = """
        import torch
        from autopeft.backends.hf.kernels import install_onednn_products
        torch.manual_seed(0)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(code)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def test_forward_and_gradients_agree_with_pytorchs_own():
    run_in_process("""
        def products(rows, inner, columns):
            torch.manual_seed(1)
            x, w, b = (torch.randn(size, requires_grad=True) for size in ((rows, inner), (columns, inner), (columns,)))
            loss = torch.nn.functional.linear(x, w, b).square().sum() + (x @ w.t()).sum()
            return [loss.detach(), *torch.autograd.grad(loss, (x, w, b))]

        shapes = [(300, 96, 128), (3, 384, 1536), (5, 4, 3), (2000, 1, 2000), (1, 2048, 2048)]
        before = [products(*shape) for shape in shapes]
        install_onednn_products()
        install_onednn_products()
        for old, shape in zip(before, shapes):
            for a, b in zip(old, products(*shape)):
                assert torch.norm(a - b) <= 1e-5 * torch.norm(a), (shape, a, b)
    """)


def test_what_is_not_a_large_float32_product_is_left_to_pytorch():
    run_in_process("""
        a = torch.randn(400, 300)
        cases = {
            "bfloat16": lambda: a.bfloat16() @ a.bfloat16().t(),
            "float64": lambda: a.double() @ a.double().t(),
            "integers": lambda: (10 * a).long() @ (10 * a).long().t(),
            "scaled": lambda: torch.addmm(torch.ones(400, 400), a, a.t(), beta=0.5, alpha=2.0),
            "scaled, small": lambda: torch.addmm(torch.ones(3), a[:3], a[:3].t(), beta=0.5, alpha=2.0),
            "empty": lambda: a[:0] @ a.t(),
        }
        before = {name: case() for name, case in cases.items()}
        install_onednn_products()
        for name, case in cases.items():
            assert torch.equal(case(), before[name]), name
        try:
            torch.randn(2000, 700) @ torch.randn(600, 700)
        except RuntimeError as exc:
            assert "shape" in str(exc), exc
        else:
            raise AssertionError("shapes that do not fit were multiplied")
    """)


def test_parts_of_larger_matrices_are_multiplied_as_their_copies():
    run_in_process("""
        install_onednn_products()
        whole = torch.randn(800, 900)
        a = torch.randn(300, 400)
        parts = {
            "columns": whole[:400, :500],
            "rows and columns, transposed": whole[:600, 100:500].t(),
            "every other": whole[::2, ::2],
            "expanded": whole[:400, :1].expand(400, 256),
        }
        for name, part in parts.items():
            assert torch.equal(a @ part, a @ part.contiguous()), name
            assert torch.equal(torch.addmm(torch.zeros(part.shape[1]), a, part), a @ part.contiguous()), name
        assert torch.equal(whole[:300, :400] @ parts["columns"], whole[:300, :400].contiguous() @ parts["columns"])
    """)


def test_the_same_product_gives_the_same_bits_again():
    run_in_process("""
        install_onednn_products()
        a, b = torch.randn(480, 384), torch.randn(384, 1536)
        first = a @ b
        torch.randn(512, 384) @ b
        assert torch.equal(a @ b, first)
    """)
