"""Operators whose peak others measured, written anew from what they state: set up, then run until the peak repeats.

Each program below names its operator as the data do. It gets the settings of one figure, makes what is alive while it is measured
(that which other providers of the same benchmark hold there too), and returns what is measured. The figures are of
github.com/linkedin/Liger-Kernel (BSD 2-clause), benchmark/data/all_benchmark_data.csv, for PyTorch's own operators and
transformers' own modules, and one of github.com/apple/ml-cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oomless

GPUS = {
    "NVIDIA A100-SXM4-80GB": "A100-80GB",
    "NVIDIA H100 PCIe": "H100-PCIe",
    "NVIDIA H100 80GB HBM3": "H100-SXM",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA B200": "B200",
}
REPEATS = 3

Measured = Callable[[], object]


def rehearse(settings: dict[str, Any]) -> dict[str, int]:
    """Return the peak allocated bytes of the operator that ``settings`` describe, in a repeat that is like the one before it."""
    sizes = {**settings["config"], settings["x_name"]: settings["x"], "how": settings["mode"], "of": settings["liger"]}
    with oomless.rehearsal(GPUS[settings["gpu"]]):
        with torch.device("cuda"):
            run = PROGRAMS[settings["kernel"]](**sizes)
        for _ in range(REPEATS):
            torch.cuda.reset_peak_memory_stats()
            run()
        return {"allocated": torch.cuda.max_memory_allocated()}


def rehearse_loss(settings: dict[str, Any]) -> dict[str, int]:
    """Return what the backward of a head with its capped loss takes beside what its forward left (apple/ml-cross-entropy)."""
    tokens, words, width, cap = (settings[name] for name in ("tokens", "vocabulary", "width", "softcap"))
    with oomless.rehearsal("A100-80GB"), torch.device("cuda"):
        hidden = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
        head = torch.randn(words, width, dtype=torch.bfloat16, requires_grad=True)
        target = torch.randint(words, (tokens,))
        for _ in range(REPEATS):
            hidden.grad = head.grad = None
            loss = F.cross_entropy((cap * torch.tanh(hidden @ head.T / cap)).float(), target)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss.backward()
        return {"allocated": torch.cuda.max_memory_allocated() - before}


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name.removeprefix("torch."))
    return found


def _backward(
    forward: Callable[[], Tensor], gradient: Callable[[Tensor], Tensor | None], keep: bool = True
) -> Measured:
    def full() -> None:
        result = forward()
        result.backward(gradient(result), retain_graph=keep)

    return full


def _like(result: Tensor) -> Tensor:
    return torch.randn_like(result)


def _none(result: Tensor) -> None: ...


def cross_entropy(*, B: int, T: int, V: int, **_: Any) -> Measured:
    logits, target = torch.randn(B * T, V, requires_grad=True), torch.randint(V, (B * T,))
    return _backward(lambda: F.cross_entropy(logits, target), _none, keep=False)


def fused_linear_cross_entropy(*, BT: int, H: int, V: int, dtype: str, **_: Any) -> Measured:
    head, others = (nn.Linear(H, V, bias=False, dtype=_dtype(dtype)) for _ in range(2))
    hidden, target = torch.randn(BT, H, requires_grad=True, dtype=_dtype(dtype)), torch.randint(V, (BT,))

    def forward(others: nn.Module = others) -> Tensor:
        return F.cross_entropy(head(hidden), target)

    return _backward(forward, _none, keep=False)


def mlp(
    *, T: int, hidden_size: int, intermediate_size: int, hidden_act: str, dtype: str, how: str, **rest: Any
) -> Measured:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = LlamaConfig(hidden_size=hidden_size, intermediate_size=intermediate_size, hidden_act=hidden_act)
    batch = rest["B"] if "B" in rest else rest["bsz"]
    x = torch.randn(batch, T, hidden_size, dtype=_dtype(dtype), requires_grad=True)
    layer = LlamaMLP(config).to(_dtype(dtype))
    full = _backward(lambda: layer(x), _like)
    if how == "full":
        return full
    if how == "forward":
        full()  # measured before in the same process, which holds two of cuBLAS's workspaces since
        layer.zero_grad(), setattr(x, "grad", None)
        return lambda: layer(x)
    gradient, result = torch.randn_like(x), layer(x)
    return lambda: result.backward(gradient, retain_graph=True)


def layer_norm(*, M: int, N: int, dtype: str, eps: float, **_: Any) -> Measured:
    norm, others = (nn.LayerNorm(N, eps=eps) for _ in range(2))
    x = torch.randn(M, N, dtype=_dtype(dtype))
    gradient = torch.randn_like(x)
    x.requires_grad_()

    def forward(others: nn.Module = others) -> Tensor:
        found: Tensor = norm(x)
        return found

    return _backward(forward, lambda _: gradient)


def _by_hand(hidden: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMS norm as transformers' Llama has it."""
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
    return weight * hidden.to(dtype)


def rms_norm(*, M: int, H: int, dtype: str, eps: float, **_: Any) -> Measured:
    weight, others = (nn.Parameter(torch.ones(H)) for _ in range(2))
    x = torch.randn(M, H, dtype=_dtype(dtype))
    gradient = torch.randn_like(x)
    x.requires_grad_()

    def forward(others: Tensor = others) -> Tensor:
        return _by_hand(x.to(torch.float32), weight, eps, x.dtype)

    return _backward(forward, lambda _: gradient)


def rope(*, dtype: str, num_q_heads: int, num_kv_heads: int, **rest: Any) -> Measured:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    length = rest["seq_len"] if "seq_len" in rest else rest["T"]
    width = (rest["hidden_size"] if "hidden_size" in rest else rest["H"]) // num_q_heads
    kind = _dtype(dtype)
    frequencies, positions = 1.0 / (10000 ** (torch.arange(0, width, 2) / width)), torch.arange(length).unsqueeze(0)
    q = torch.randn((1, length, num_q_heads, width), requires_grad=True, dtype=kind).transpose(1, 2)
    k = torch.randn((1, length, num_kv_heads, width), requires_grad=True, dtype=kind).transpose(1, 2)
    gradients = torch.randn_like(q), torch.randn_like(k)
    # A matrix product, as transformers 4 took for the angles: cuBLAS's workspace is what it leaves.
    angles = (frequencies[None, :, None] @ positions[:, None, :].float()).transpose(1, 2)
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos().to(kind), angles.sin().to(kind)
    del angles

    def full(held: object = (frequencies, positions)) -> None:
        turned = apply_rotary_pos_emb(q, k, cos, sin)
        torch.autograd.grad(turned, (q, k), gradients, allow_unused=True, retain_graph=True)

    return full


def kl_div(*, B: int, T: int, V: int, **_: Any) -> Measured:
    x = torch.randn(B * T, V, requires_grad=True).log_softmax(dim=-1)
    target = torch.randn(B * T, V).softmax(dim=-1)
    return _backward(lambda: F.kl_div(x, target, reduction="batchmean"), _none)


def tvd(*, B: int, T: int, V: int, **_: Any) -> Measured:
    p = torch.randn(B * T, V, requires_grad=True).softmax(dim=-1)
    q = torch.randn(B * T, V).softmax(dim=-1)
    return _backward(lambda: (torch.abs(p - q) / 2.0).sum() / p.size(0), _none)


def jsd(*, of: str, **sizes: Any) -> Measured:
    tokens = sizes["BT"] if "BT" in sizes else sizes["B"] * sizes["T"]
    words = sizes["vocab_size"] if "vocab_size" in sizes else sizes["V"]
    x = torch.randn(tokens, words, requires_grad=True).log_softmax(dim=-1)
    target = torch.randn(tokens, words).log_softmax(dim=-1)
    if of == "0.3.1":
        return _backward(lambda: _divergence_of_the_first(x, target), _none)
    return _backward(lambda: _divergence(x, target), _like)


def _divergence_of_the_first(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_mean = torch.log(0.5 * (torch.exp(log_p) + torch.exp(log_q)))
    kept = {"reduction": "batchmean", "log_target": True}
    return 0.5 * (F.kl_div(log_mean, log_p, **kept) + F.kl_div(log_mean, log_q, **kept))


def _divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Jensen and Shannon's divergence in fp32, its mean's logarithm taken once for each side, summed over words, then rows."""
    log_p, log_q = log_p.float(), log_q.float()
    mean = torch.lerp(torch.exp(log_q), torch.exp(log_p), 0.5)
    kept = {"reduction": "none", "log_target": True}
    loss = 0.5 * F.kl_div(torch.log(mean), log_p, **kept).sum(-1) + 0.5 * F.kl_div(torch.log(mean), log_q, **kept).sum(
        -1
    )
    return (loss / log_q.shape[0]).sum()


def fused_linear_jsd(*, BT: int, H: int, V: int, dtype: str, **_: Any) -> Measured:
    kind = _dtype(dtype)
    student, teacher = (nn.Linear(H, V, bias=False, dtype=kind) for _ in range(2))
    x, of_teacher = torch.rand(BT, H, requires_grad=True, dtype=kind), torch.rand(BT, H, dtype=kind)

    def forward() -> Tensor:
        of_student, of_other = student(x), teacher(of_teacher)
        log_q = torch.log_softmax(of_student / 1.0, dim=-1)
        log_p = torch.log_softmax(of_other / 1.0, dim=-1)
        return _divergence(log_q, log_p).to(kind)

    return _backward(forward, _none, keep=False)


def fused_add_rms_norm(*, M: int, H: int, dtype: str, eps: float, **_: Any) -> Measured:
    weight, *others = (nn.Parameter(torch.ones(H)) for _ in range(4))
    x, residual = (torch.randn(M, H, dtype=_dtype(dtype)) for _ in range(2))
    gradients = torch.randn_like(x), torch.randn_like(residual)
    x.requires_grad_(), residual.requires_grad_()

    def forward() -> tuple[Tensor, Tensor]:
        added = x.float() + residual.float()
        return _by_hand(added, weight, eps, x.dtype), added.to(x.dtype)

    def full(others: object = others) -> None:
        results = forward()
        torch.autograd.backward(results, gradients)

    return full


def megatron_rms_norm(*, S: int, B: int, H: int, **_: Any) -> Measured:
    layer = nn.RMSNorm(H, eps=1e-6).to(torch.bfloat16)
    x = torch.randn(S, B, H, dtype=torch.bfloat16, requires_grad=True)

    def full() -> None:
        result = layer(x)
        result.sum().backward()

    return full


def megatron_swiglu(*, S: int, B: int, ffn_local: int, **_: Any) -> Measured:
    x = torch.randn(S, B, 2 * ffn_local, dtype=torch.bfloat16, requires_grad=True)

    def forward() -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    def full() -> None:
        x.grad = None
        result = forward()
        result.sum().backward()

    return full


PROGRAMS: dict[str, Callable[..., Measured]] = {
    "cross_entropy": cross_entropy,
    "fused_linear_cross_entropy": fused_linear_cross_entropy,
    "geglu": mlp,
    "swiglu": mlp,
    "tiled_geglu": mlp,
    "tiled_swiglu": mlp,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "rope": rope,
    "kl_div": kl_div,
    "jsd": jsd,
    "fused_linear_jsd": fused_linear_jsd,
    "tvd": tvd,
    "fused_add_rms_norm": fused_add_rms_norm,
    "megatron_rms_norm": megatron_rms_norm,
    "megatron_swiglu": megatron_swiglu,
}
