"""s4d against scipy's state spaces, as a matrix in both directions, over pieces, and its fit."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from agreement import Agreement
from mixer_sites import BOTH_WAYS, make_site
from safetensors.torch import load_file
from torch import Tensor

from rewriter.backends.reference import long_conv
from rewriter.backends.registry import resolve
from rewriter.ir.long_conv import LongConv
from rewriter.mixers.ssm.s4d import S4d, S4dOptions
from rewriter.mixers.tokens import Tokens
from rewriter.passes.verify.cores import check_core, sample

VECTORS = load_file(Path(__file__).parent / "vectors" / "scipy.safetensors")
CAUSAL_SITE = make_site(heads=(4, 2, 8), hidden_dim=12)
BOTH_SITE = make_site(BOTH_WAYS, heads=(4, 2, 8), hidden_dim=12)


def near(got: Tensor, wanted: Tensor, bound: float = 1e-5) -> None:
    with torch.no_grad():
        assert float((got - wanted).abs().max() / wanted.abs().max()) <= bound


def moved(bidirectional: bool = False, **options: object) -> S4d:
    """A mixer whose parameters are away from their start."""
    site = BOTH_SITE if bidirectional else CAUSAL_SITE
    mixer = S4d(site, S4dOptions(modes=5, **options), layer=0)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    for parameter in mixer.parameters():
        parameter.data += 0.4 * torch.randn(parameter.shape, generator=generator)
    return mixer.eval()


def test_the_filter_is_that_of_scipy(agree: Agreement) -> None:
    """Outputs of `dlsim`, and gradients through the transposed impulse response of `dimpulse`."""
    given = VECTORS
    mixer = S4d(CAUSAL_SITE, S4dOptions(modes=5))
    with torch.no_grad():
        mixer.log_rate.copy_(given["log_rate"])
        mixer.frequency.copy_(given["frequency"] - math.pi * torch.arange(5))
        start = torch.linspace(math.log(1e-3), math.log(1e-1), 8)
        mixer.log_step.copy_(given["log_step"] - start)
        mixer.read.copy_(given["read"][None])
        mixer.skip.copy_(given["skip"])
    v = given["v"].clone().requires_grad_()
    n = v.shape[2]
    x = Tokens(torch.zeros(2, 4, n, 8), torch.zeros(2, 2, n, 8), v, torch.zeros(2, n, 12))
    out, _ = mixer.mix(x)
    agree.outputs("s4d", out, given["out"])
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((out * weight).sum(), v)
    lag = torch.arange(n)[:, None] - torch.arange(n)
    matrix = given["impulse"][..., lag.clamp_min(0)] * (lag >= 0)  # (H, Dv, n, n)
    wanted = torch.einsum("hdij,bhid->bhjd", matrix, weight.double())
    agree.gradient("s4d", gradient, wanted.unflatten(1, (2, 2)).sum(2))


def test_both_directions_are_their_matrix(agree: Agreement) -> None:
    """One kernel over the past and the own token, another over what comes later, in float64."""
    mixer = moved(bidirectional=True)
    n = 19
    x = sample(BOTH_SITE, n)
    x.v.requires_grad_()
    step, pole = (t.detach() for t in mixer._system())
    a = (step * pole).to(torch.complex128)
    written = (a.exp() - 1) / pole
    both = torch.view_as_complex(mixer.read.detach().double())
    out = torch.zeros(2, 4, n, 8, dtype=torch.float64)
    for h in range(4):
        kernels = [
            2 * torch.stack([(c[h] * written[h // 2] * (lag * a[h // 2]).exp()).sum(-1).real
                             for lag in range(n)])
            for c in both
        ]  # fmt: skip
        for i in range(n):
            out[:, h, i] = mixer.skip[h].detach() * x.v[:, h // 2, i]
            for j in range(n):
                weight = kernels[0][i - j] if j <= i else kernels[1][j - i - 1]
                out[:, h, i] += weight * x.v[:, h // 2, j]
    agree.both("s4d", mixer.mix(x)[0], out * mixer.gate(x.stream), (x.v,))


def test_bidirectional_contracts() -> None:
    results = list(check_core(moved(bidirectional=True), "s4d"))
    assert {r.check: r.detail for r in results if r.outcome == "fail"} == {}


@pytest.mark.parametrize("padded", [False, True])
def test_pieces_and_steps_equal_one_transform(
    padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer = moved()
    x = sample(CAUSAL_SITE, 60)
    if padded:
        valid = torch.rand(2, 60, generator=torch.Generator().manual_seed(5)) > 0.3
        x = replace(x, valid=valid)
    with torch.no_grad():
        whole, none = mixer.mix(x)
        assert none is None
        monkeypatch.setattr(long_conv, "PIECE", 7)
        near(mixer.mix(x)[0], whole)
        empty = mixer.state_spec(CAUSAL_SITE, mixer.options)
        state = empty.new(CAUSAL_SITE, 2, torch.float32, torch.device("cpu"))
        outs = []
        for at in (0, 1, 2, 30, 31):
            stop = {0: 1, 1: 2, 2: 30, 30: 31, 31: 60}[at]
            out, after = mixer.mix(replace(x.cut(at, stop), state=state))
            assert after is not None and after["modes"].dtype == torch.float32
            state = after
            outs.append(out)
        near(torch.cat(outs, 2), whole)


def test_a_long_text_decays_and_keeps_its_phase() -> None:
    """Thousands of turns in: the impulse response at the far end, in float64."""
    spec = LongConv(2)
    decay = torch.full((1, 1, 2), -1e-4)
    angle = torch.tensor([[[2.9, 0.3]]])
    read = torch.tensor([1.0, -0.5]).expand(1, 1, 2, 2)
    v = torch.zeros(1, 1, 3000, 1)
    v[:, :, 0] = 1.0
    out, _ = resolve(spec, "cpu", torch.float32).run(v, decay, angle, read)
    lag = torch.arange(3000, dtype=torch.float64)
    poles = torch.complex(decay.double(), angle.double())[0, 0]
    weight = torch.complex(torch.tensor(1.0), torch.tensor(-0.5)).to(torch.complex128)
    wanted = 2 * (weight * (lag[:, None] * poles).exp()).sum(-1).real
    assert float((out[0, 0, :, 0] - wanted).abs().max()) <= 1e-5


def test_the_neutral_start_is_the_token_itself() -> None:
    x = sample(CAUSAL_SITE, 9)
    out, _ = S4d(CAUSAL_SITE, S4dOptions()).mix(x)
    near(out, x.v.repeat_interleave(2, 1))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_fit_finds_a_filter_again(bidirectional: bool) -> None:
    """What another s4d made of the tokens is learned to the size of the ridge."""
    teacher, mixer = moved(bidirectional), moved(bidirectional)
    with torch.no_grad():
        for m in (teacher, mixer):
            m.gate.linear.weight.zero_()
            m.gate.linear.bias.fill_(1.27846454)
        mixer.read.zero_()
        x = sample(teacher.site, 80)
        x = replace(x, valid=torch.arange(80).expand(2, -1) >= torch.tensor([[0], [30]]))
        target = teacher.mix(x)[0]
        mixer.fit(x, target)
        near(mixer.mix(x)[0], target, 0.02)


@pytest.mark.usefixtures("generated_kernels")
def test_no_generated_kernel_is_claimed() -> None:
    kernel = resolve(LongConv(4), "cpu", torch.float32)
    assert kernel.backend == "reference"
    assert ("cpu", "long convolutions have no generated kernel") in kernel.declined
