"""Every tensor that a model and settings can ask memory for, with its shape, size, and where in a step it arises.

The shapes of weights are read from the model itself, built on the meta device. Those of activations follow from its
config: tokens times width, vocabulary or heads. ``None`` for the tokens leaves them open, to be solved for.

N tokens of a micro-batch (B blocks of T), V vocabulary, H hidden size, I width of the MLP, A heads, D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oomless.memory.device import Phase
    from oomless.models.spec import ModelSpec

DEEPSPEED = "DeepSpeed"
"""What tensors are of that its own code makes."""

TOGETHER = "mlp.gate and up together"
"""One matrix for both, which few models have."""

CAST_COPY = "copy of a weight in 16 bits (automatic casting)"
TRL_TOKENS, TRL_WORDS = 4096, 32768
"""What TRL's loss computes at once."""

DTYPES = {4: "fp32", 2: "16 bits", 1: "8 bits"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """One kind of tensor; ``count`` elements, or ``of_tokens`` elements where it depends on the length T."""

    kind: str
    """What it is: logits in fp32, gradient of a weight ..."""

    of: str
    """The module or matrix."""

    shape: str
    """In words: 2,048 tokens x 128,256."""

    item_bytes: int
    phases: frozenset[Phase]
    modules: frozenset[str] = frozenset()
    hints: tuple[str, ...] = ()
    """Pieces of code that make it."""

    operations: tuple[str, ...] = ()
    """Pieces of the names of operators that make it."""

    prior: float = 0.0
    """How often it is what asks last, for a tie."""

    count: int = 0
    of_tokens: Callable[[int], int] | None = None

    def size_bytes(self, tokens: int = 0) -> int:
        """Return the size, where each block has ``tokens`` tokens."""
        return (self.count if self.of_tokens is None else self.of_tokens(tokens)) * self.item_bytes

    def describe(self, tokens: int | None = None) -> str:
        """Return shape and dtype in words, for blocks of ``tokens``."""
        shape = self.shape if tokens is None else self.shape.replace("T tokens", f"{tokens:,} tokens")
        return f"{shape} x {self.item_bytes} B"


@dataclass(frozen=True, kw_only=True, slots=True)
class Dimensions:
    """The numbers of a model's config that shapes are made of."""

    vocabulary: int
    hidden: int
    mlp: int
    heads: int
    key_heads: int
    head_width: int
    positions: int | None

    layers: int = 0
    tied: bool = False
    experts: int | None = None
    experts_each: int = 1
    """Experts that each token is sent to."""

    expert_width: int = 0
    shared_width: int = 0
    """Width of the expert that every token is sent to."""

    dense_layers: int = 0
    """Layers in front that have a plain MLP in place of experts."""

    value_width: int = 0
    """Width of a head's values."""

    latent: int = 0
    """Width of what keys and values are made of, in multi-head latent attention."""

    plain_width: int = 0
    """Of a head's keys there, what does not rotate."""

    query_latent: int = 0
    """The same for queries; 0 where these are made at once."""

    @classmethod
    def of_config(cls, config: Any) -> Dimensions | None:
        """Read them from a transformers config; ``None`` where it has no such numbers."""
        return cls.of_mapping({**config.to_dict(), "text_config": config.get_text_config().to_dict()})

    @classmethod
    def of_mapping(cls, config: Mapping[str, Any]) -> Dimensions | None:
        """Read them from a ``config.json``; ``None`` where it has no such numbers."""
        text = config.get("text_config") or config.get("llm_config") or config

        def number(*names: str) -> int | None:
            for name in names:
                value = text.get(name)
                value = next(iter(value), None) if isinstance(value, list | tuple) else value
                if isinstance(value, int) and value > 0:
                    return value
            return None

        hidden, vocabulary = number("hidden_size", "n_embd", "d_model"), number("vocab_size")
        heads = number("num_attention_heads", "n_head", "n_heads")
        if not hidden or not vocabulary or not heads:
            return None
        latent = number("kv_lora_rank") or 0
        width = number("head_dim") or hidden // heads
        if latent:
            width = (number("qk_nope_head_dim") or 0) + (number("qk_rope_head_dim") or 0)
        expert_width = number("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size") or 0
        return cls(
            vocabulary=vocabulary,
            hidden=hidden,
            mlp=number("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * hidden,
            heads=heads,
            key_heads=number("num_key_value_heads") or heads,
            head_width=width,
            positions=number("max_position_embeddings", "n_positions"),
            layers=number("num_hidden_layers", "n_layer") or 0,
            tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
            experts=number("num_local_experts", "num_experts", "n_routed_experts"),
            experts_each=number("num_experts_per_tok", "moe_topk", "moe_k") or 1,
            expert_width=expert_width,
            shared_width=number("shared_expert_intermediate_size") or expert_width * (number("n_shared_experts") or 0),
            dense_layers=number("first_k_dense_replace") or 0,
            value_width=(number("v_head_dim") if latent else None) or width,
            latent=latent,
            plain_width=number("qk_nope_head_dim") or 0,
            query_latent=number("q_lora_rank") or 0,
        )

    def cut(self, parts: int) -> Dimensions:
        """Return what each GPU has of a model that is tensor parallel over ``parts``."""
        names = ("vocabulary", "mlp", "heads", "key_heads", "expert_width")
        return replace(self, **{name: -(-getattr(self, name) // parts) for name in names})

    def matrices(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return the weights that any model of these numbers has, the largest first."""
        queries, hidden = self.heads * self.head_width, self.hidden
        found: dict[str, tuple[int, ...]] = {
            ("embed_tokens (also lm_head)" if self.tied else "embed_tokens or lm_head"): (self.vocabulary, hidden)
        }
        if not self.experts or self.dense_layers:
            found["mlp.gate_proj or up_proj"] = (self.mlp, hidden)
        if not self.experts:
            found[TOGETHER] = (2 * self.mlp, hidden)
        else:
            found["mlp.experts.gate_up_proj"] = (self.experts, 2 * self.expert_width, hidden)
            found["mlp.experts.down_proj"] = (self.experts, hidden, self.expert_width)
            found["mlp.experts.gate_proj or up_proj of one"] = (self.expert_width, hidden)
        if self.shared_width:
            found["mlp.shared_experts.gate_proj or up_proj"] = (self.shared_width, hidden)
        if not self.latent:
            found["self_attn.q_proj or o_proj"] = (queries, hidden)
            found["self_attn.k_proj or v_proj"] = (self.key_heads * self.head_width, hidden)
            return _largest_first(found)
        found["self_attn.o_proj"] = (hidden, self.heads * self.value_width)
        found["self_attn.q_b_proj" if self.query_latent else "self_attn.q_proj"] = (
            queries,
            self.query_latent or hidden,
        )
        # The part of a head that rotates is one for all heads, and no part of kv_b_proj.
        found["self_attn.kv_b_proj"] = (self.heads * (self.plain_width + self.value_width), self.latent)
        return _largest_first(found)


def _largest_first(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, tuple[int, ...]]]:
    return sorted(shapes.items(), key=lambda item: -math.prod(item[1]))


def matrices(spec: ModelSpec) -> list[tuple[str, tuple[int, ...]]]:
    """Return the distinct kinds of weights of a model and their shapes, layers taken together, the largest first."""
    from oomless.models.make import ties, without_memory

    config = spec.config
    model = without_memory(config, trust_remote_code=spec.trust_remote_code)
    found: dict[tuple[str, tuple[int, ...]], int] = {}
    for full, parameter in model.named_parameters():
        pieces = [
            p for p in full.removesuffix(".weight").split(".") if not p.isdigit() and p not in ("model", "layers")
        ]
        name = ".".join(pieces)
        if full.startswith("model.embed_tokens") and ties(config):
            name = "embed_tokens (also lm_head)"
        found[name, tuple(parameter.shape)] = parameter.numel()
    return sorted(found, key=lambda key: -found[key])


def phases(*names: Phase) -> frozenset[Phase]:
    """Return the phases of these ``names``."""
    return frozenset(names)


def of_weights(
    weights: list[tuple[str, tuple[int, ...]]], *, trained: bool, cast: bool, packed: bool, halves: bool
) -> Iterator[Tensor]:
    """Yield what exists for each kind of weight.

    Gradients and optimizer state exist only where they are ``trained``, copies in 16 bits only where arithmetic may be ``cast``.
    Where weights are ``packed`` in 4 or 8 bits, all but embeddings and head are whole only before that and where they are used.
    Where they are ``halves``, of 16 bits, their gradients are too; a loss in chunks sums the head's in fp32 even so.
    """
    for tensor in _of_weights(weights):
        if not (trained or tensor.kind.startswith(("weights", "copy"))) or (tensor.kind == CAST_COPY and not cast):
            continue
        if tensor.of == TOGETHER:
            tensor = replace(tensor, prior=tensor.prior - 0.3)
        at_an_end = "embed" in tensor.of or "lm_head" in tensor.of
        if halves and not at_an_end and tensor.kind == f"gradient of a weight in {DTYPES[4]}":
            continue
        if not packed or at_an_end:
            yield tensor
        elif tensor.kind.startswith("weights"):
            yield replace(tensor, kind=f"{tensor.kind}, before they are packed", phases=phases("load"))
            if tensor.item_bytes == 2:
                used = phases("forward", "backward", "evaluation", "save")
                hints = ("dequantize", ".to(A.dtype)")
                yield replace(
                    tensor, kind="weight in 4 bits", item_bytes=1, count=tensor.count // 2, shape=f"{tensor.shape} / 2"
                )
                yield replace(tensor, kind="weight unpacked to 16 bits", phases=used, hints=hints, prior=0.5)


def _of_weights(weights: list[tuple[str, tuple[int, ...]]]) -> Iterator[Tensor]:
    for name, shape in weights:
        count, text = math.prod(shape), " x ".join(f"{n:,}" for n in shape)
        module = name.split(".")[0].split(" ")[0]
        modules = frozenset({module, *(["lm_head"] if "lm_head" in name else [])})
        common: dict[str, Any] = {"of": name, "shape": text, "count": count}
        for size in (2, 4):
            yield Tensor(
                kind=f"weights in {DTYPES[size]}", item_bytes=size, phases=phases("load", "save"), prior=0.4, **common
            )
            yield Tensor(
                kind=f"gradient of a weight in {DTYPES[size]}",
                item_bytes=size,
                phases=phases("backward"),
                modules=modules,
                operations=("aten.mm", "aten.embedding_dense_backward", "aten.add", "aten.addmm"),
                prior=0.65 if shape == weights[0][1] else 0.4,
                **common,
            )
            yield Tensor(
                kind=f"optimizer state in {DTYPES[size]}",
                item_bytes=size,
                phases=phases("optimizer"),
                hints=("zeros_like", "init_state", "momentum_buffer =", "state["),
                operations=("aten.zeros_like", "aten.empty_like", "aten.zeros", "aten.full_like"),
                prior=0.5,
                **common,
            )
            yield Tensor(
                kind=f"temporary of the optimizer in {DTYPES[size]}",
                item_bytes=size,
                phases=phases("optimizer"),
                hints=("_foreach", "sqrt", "addcdiv", "denom", "grad.float()", "clip_grad"),
                operations=("aten._foreach", "aten.sqrt", "aten.div", "aten.mul", "aten.add"),
                prior=0.4,
                **common,
            )
        yield Tensor(
            kind="optimizer state in 8 bits",
            item_bytes=1,
            phases=phases("optimizer"),
            hints=("init_state", "state1", "state2"),
            prior=0.3,
            **common,
        )
        yield Tensor(
            kind="copy of a weight in fp32",
            item_bytes=4,
            phases=phases("load", "optimizer"),
            hints=(".float()", "fp32", "torch.float32"),
            operations=("aten._to_copy", "aten.clone"),
            prior=0.3,
            **common,
        )
        yield Tensor(
            kind=CAST_COPY,
            item_bytes=2,
            phases=phases("forward", "evaluation"),
            modules=modules,
            hints=("F.linear(",),
            operations=("aten._to_copy",),
            prior=0.25,
            **common,
        )


def of_activations(dimensions: Dimensions, blocks: int, item_bytes: int) -> Iterator[Tensor]:
    """Yield what depends on the tokens of a micro-batch of ``blocks``, computed with ``item_bytes`` each."""
    d = dimensions

    def rows(width: int) -> Callable[[int], int]:
        return lambda tokens: blocks * tokens * width

    batch = f"{blocks:,} x " if blocks > 1 else ""
    sizes = (item_bytes,) if item_bytes == 4 else (item_bytes, 4)
    logits: dict[str, Any] = {
        "of": "lm_head",
        "shape": f"{batch}T tokens x {d.vocabulary:,}",
        "of_tokens": rows(d.vocabulary),
    }
    backward_of_loss = ("aten._log_softmax_backward", "aten.nll_loss_backward")
    yield Tensor(
        kind="logits",
        item_bytes=item_bytes,
        phases=phases("forward", "evaluation"),
        modules=frozenset({"lm_head"}),
        hints=("lm_head(", "F.linear("),
        operations=("aten.mm", "aten.addmm", "aten._unsafe_view"),
        prior=0.5,
        **logits,
    )
    if item_bytes != 4:
        yield Tensor(
            kind="logits in fp32",
            item_bytes=4,
            phases=phases("loss", "forward", "evaluation"),
            hints=("logits.float()", ".to(torch.float32)", "upcast", "convert_to_fp32", "logits.to("),
            operations=("aten._to_copy",),
            prior=0.7,
            **logits,
        )
        yield Tensor(
            kind="gradient of the logits in 16 bits",
            item_bytes=item_bytes,
            phases=phases("backward"),
            operations=("aten._to_copy",),
            prior=0.3,
            **logits,
        )
    yield Tensor(
        kind="shifted copy of the logits",
        of="lm_head",
        shape=f"{batch}(T tokens - 1) x {d.vocabulary:,}",
        of_tokens=lambda tokens: blocks * (tokens - 1) * d.vocabulary,
        item_bytes=4,
        phases=phases("loss", "forward"),
        hints=("shift_logits", "contiguous()"),
        operations=("aten.clone",),
        prior=0.1,
    )
    yield Tensor(
        kind="log-probabilities of the loss",
        item_bytes=4,
        phases=phases("loss", "evaluation"),
        hints=("cross_entropy", "log_softmax", "loss_fct("),
        operations=("aten._log_softmax.default",),
        prior=0.6,
        **logits,
    )
    yield Tensor(
        kind="gradient of the logits",
        item_bytes=4,
        phases=phases("backward"),
        operations=backward_of_loss,
        prior=0.7,
        **logits,
    )
    plain: tuple[tuple[str, str, int, str, float], ...] = (
        ("MLP activations", "mlp", d.mlp, f"{d.mlp:,}", 0.3),
        ("MLP activations, gate and up together", "mlp", 2 * d.mlp, f"2 x {d.mlp:,}", 0.2),
        ("hidden states", "layers", d.hidden, f"{d.hidden:,}", 0.2),
        ("queries", "self_attn", d.heads * d.head_width, f"{d.heads} heads x {d.head_width}", 0.15),
        ("keys or values", "self_attn", d.key_heads * d.head_width, f"{d.key_heads} heads x {d.head_width}", 0.1),
    )
    if d.latent:
        both = d.plain_width + d.value_width
        plain += (("keys and values of all heads", "self_attn", d.heads * both, f"{d.heads} heads x {both}", 0.1),)
    if d.experts:
        each, wide = d.experts_each, d.expert_width
        plain = tuple(row for row in plain if row[1] != "mlp" or d.dense_layers)
        plain += (
            ("activations of the experts", "mlp", each * wide, f"{each} experts x {wide:,}", 0.3),
            ("activations of the experts, gate and up together", "mlp", each * 2 * wide, f"{each} experts x 2 x {wide:,}", 0.35),
            ("hidden states sent to the experts", "mlp", each * d.hidden, f"{each} experts x {d.hidden:,}", 0.25),
        )  # fmt: skip
    for size in sizes:
        for kind, module, width, text, prior in plain:
            in_dtype = " in fp32" if size == 4 and item_bytes != 4 else ""
            modules = {module, *(["embed_tokens", "norm", "mlp", "self_attn"] if module == "layers" else [])}
            if "together" not in kind and "experts" not in kind:
                modules.add("lora")
            common: dict[str, Any] = {
                "of": module,
                "shape": f"{batch}T tokens x {text}",
                "of_tokens": rows(width),
                "item_bytes": size,
                "modules": frozenset(modules),
                "hints": ("F.linear(",) if size == item_bytes else (),
            }
            yield Tensor(kind=f"{kind}{in_dtype}", phases=phases("forward", "evaluation"), prior=prior, **common)
            yield Tensor(kind=f"gradient of the {kind}{in_dtype}", phases=phases("backward"), prior=prior, **common)
    # All blocks in one row where documents are packed, else one square for each.
    for squares, of_all in ((blocks, 1), (1, blocks)) if blocks > 1 else ((1, 1),):
        for size in (1, item_bytes):
            yield Tensor(
                kind="attention mask",
                of="the model",
                shape=f"{squares:,} x ({of_all:,} x T tokens)^2" if blocks > 1 else "T tokens x T tokens",
                of_tokens=lambda tokens, n=squares, each=of_all: n * (each * tokens) ** 2,  # type: ignore[misc]
                item_bytes=size,
                phases=phases("forward", "evaluation"),
                modules=frozenset({"mask"}),
                hints=("mask",),
                operations=("aten.eq", "aten.bitwise_and", "aten.where", "aten.expand", "aten.clone"),
                prior=0.1,
            )
    yield from _of_a_chunked_loss(d, blocks, batch, item_bytes)
    for size in sizes:
        in_dtype = " in fp32" if size == 4 and item_bytes != 4 else ""
        scores: dict[str, Any] = {
            "of": "self_attn",
            "shape": f"{batch}{d.heads} heads x T tokens x T tokens",
            "of_tokens": lambda tokens: blocks * d.heads * tokens * tokens,
            "item_bytes": size,
            "modules": frozenset({"self_attn"}),
        }
        yield Tensor(
            kind=f"attention scores{in_dtype}",
            phases=phases("forward", "evaluation"),
            hints=("attn_weights", "matmul(quer", "attention_mask", "functional.softmax("),
            operations=("aten.bmm", "aten._softmax", "aten.add", "aten.mul", "aten._to_copy"),
            prior=0.4,
            **scores,
        )
        yield Tensor(
            kind=f"gradient of the attention scores{in_dtype}",
            phases=phases("backward"),
            operations=("aten.bmm", "aten._softmax_backward", "aten.mul", "aten._to_copy"),
            prior=0.4,
            **scores,
        )


def _of_a_chunked_loss(d: Dimensions, blocks: int, batch: str, item_bytes: int) -> Iterator[Tensor]:
    """Yield what the loss of TRL (1.16: trl/kernels/chunked_logprob.py) holds in place of all logits."""
    words = min(TRL_WORDS, d.vocabulary)
    for size in (item_bytes, 4):
        yield Tensor(
            kind="chunk of the logits",
            of="lm_head",
            shape=f"{batch}(T tokens - 1), {TRL_TOKENS:,} at most, x {words:,} of {d.vocabulary:,}",
            of_tokens=lambda tokens: min(blocks * (tokens - 1), TRL_TOKENS) * words,
            item_bytes=size,
            phases=phases("forward", "loss", "backward"),
            modules=frozenset({"lm_head"}),
            hints=("mm_buf = torch.empty",),
        )
        yield Tensor(
            kind="chunk of lm_head",
            of="lm_head",
            shape=f"{words:,} x {d.hidden:,}",
            count=words * d.hidden,
            item_bytes=size,
            phases=phases("forward", "loss", "backward"),
            modules=frozenset({"lm_head"}),
            hints=("w_chunk = weight[start:end]", "weight[start:end].to(compute_dtype)"),
        )
