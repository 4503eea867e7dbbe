"""What every engine's result is held against before it is timed: the same in fp64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emo_kernels.measure import cache
from emo_kernels.measure.case import Work
from emo_kernels.measure.engines import OURS, Engines, short
from emo_kernels.measure.files import write_atomically
from emo_kernels.measure.pairs import compare

_PEERS_WITHIN = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
# A batch norm in front of another has a gradient that is zero but for its eps: fp32 has nothing of
# it. Where plain eager's relative error is larger than this, a gradient is not compared.
_LOST_BY_EAGER = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
_ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

Verdict = dict[str, float | str | bool]
Result = dict[str, Tensor]  # "result": the output or the loss; in training each gradient by name


def exact(work: Work) -> Result:
    """The result in fp64; kept on disk, for a step of batch 32 takes half a minute."""
    path = cache.directory() / f"oracle-{cache.code()}-{work.digest()}.pt"
    if path.is_file():
        found: Result = torch.load(path, weights_only=True)
        return found
    found = compute(work.copy(torch.float64), work, work.x.double())
    write_atomically(path, lambda file: torch.save(found, file))
    return found


def compute(module: nn.Module, work: Work, x: Tensor) -> Result:
    """The output, or the loss and every gradient."""
    if not work.case.trains:
        with torch.no_grad():
            return {"result": module(x)}
    loss = work.loss(module(x))
    loss.backward()
    return {"result": loss.detach(), **gradients(module)}


def gradients(module: nn.Module) -> Result:
    """Of every parameter that has one, by name."""
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def judge(work: Work, engines: Engines) -> dict[str, Verdict]:
    """How far each engine is from the oracle, and whether that is near enough.

    A peer that fails here is dropped from ``engines``.

    In inference ours must keep the tolerance rule against plain eager; in training the relative
    error of the loss and of each gradient may be four times eager's, plus 1e-5 in fp32 and
    two roundings in 16 bit. Peers only have to compute the same thing: relative error of the output
    up to 1e-4 in fp32 and 0.1 in bf16, of the loss and each gradient ten times eager's plus 1e-3.

    Returns:
        engine -> ``error`` of the output or the loss (relative L2), in training also
        ``gradient_error``, the largest over the parameters, and ``gradient``, whose it is;
        ``match``.
    """
    want = exact(work)
    usual_module = work.copy()
    usual = compute(usual_module, work, work.x.contiguous())
    verdicts: dict[str, Verdict] = {}
    for name, engine in list(engines.run.items()):
        try:
            out = engine.call().cpu()
        except Exception as error:  # a peer that fails is reported, not fatal
            if name == OURS:
                raise
            engines.drop(name, short(error))
            continue
        got = {"result": out}
        if work.case.trains:
            assert engine.module is not None
            got |= gradients(engine.module)
            verdicts[name] = _judge_step(got, usual, want, name == OURS)
        else:
            verdicts[name] = _judge_output(out, usual["result"], want["result"], name == OURS)
    return verdicts


def in_words(verdict: Verdict) -> str:
    """How far off it is."""
    words = f"error {verdict['error']:.1e}"
    if "allowed" in verdict:
        words += f", {verdict['allowed']:.1e} is the tolerance rule's"
    if "gradient" in verdict:
        words += f", {verdict.get('gradient_error', float('inf')):.1e} in the gradient of "
        words += str(verdict["gradient"])
    return words


def _judge_output(got: Tensor, usual: Tensor, want: Tensor, ours: bool) -> Verdict:
    usual, want = usual.cpu(), want.cpu()
    agreement = compare(got.to(usual.dtype), usual, want)
    within = agreement.ok if ours else agreement.error <= _PEERS_WITHIN[usual.dtype]
    return {"error": agreement.error, "allowed": agreement.allowed, "match": bool(within)}


def _judge_step(got: Result, usual: Result, want: Result, ours: bool) -> Verdict:
    missing = sorted(set(want) - set(got))
    if missing:
        return {"error": float("inf"), "gradient": missing[0], "match": False}
    eager = {name: _distance(usual[name], want[name]) for name in want}
    dtype = usual["result"].dtype
    names = [n for n in want if n != "result" and eager[n] < _LOST_BY_EAGER[dtype]]
    errors = {name: _distance(got[name], want[name]) for name in ("result", *names)}
    factor, floor = (4, _ROUNDING[dtype]) if ours else (10, max(1e-3, _ROUNDING[dtype]))
    within = all(errors[name] <= factor * eager[name] + floor for name in errors)
    error = errors.pop("result")
    worst = max(errors, key=lambda name: errors[name])
    verdict: Verdict = {"error": error, "gradient_error": errors[worst], "gradient": worst}
    return verdict | {"match": within}


def _distance(got: Tensor, want: Tensor) -> float:
    return float((got.double().cpu() - want.cpu()).norm() / (want.norm() or 1.0))
