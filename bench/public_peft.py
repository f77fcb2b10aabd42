"""PEFT's comparison of its methods on an L40S, written anew from what it states: Llama 3.2 3B, whole runs on MetaMathQA.

The program is that of github.com/huggingface/peft (Apache 2.0), method_comparison/MetaMathQA at commit 5d602fdb, as far as it
decides memory: the base model's loss on texts of 768 tokens without gradients, then steps of four samples padded on the right,
gradients clipped, AdamW, the outputs of a step alive until those of the next are there, and the cache emptied every ten steps.
A run of 5,000 steps is played as five: steps of the average length, after which what is allocated is measured, a short one that
ends with the emptied cache, and the longest, which comes first after it. How long the longest was is not published: ``LONGEST`` is
the one number that is fitted, once for all methods.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F

import oomless

MODEL = "meta-llama/Llama-3.2-3B"
LONGEST = 688
AVERAGE = 224
SHORT = 120
EVALUATED = 768

QV = ["q_proj", "v_proj"]
MLP = ["up_proj", "gate_proj", "down_proj"]
BLOCKS = {"target_modules_bd_a": ["o_proj", "down_proj"], "nblocks": 2}
BLOCKS["target_modules_bd_b"] = ["q_proj", "v_proj", "k_proj", "up_proj", "gate_proj"]
LORA = {"target_modules": QV, "task_type": "CAUSAL_LM"}
PSOFT = {"psoft_alpha": 256, "psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 10, "use_cayley_neumann": True}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "beft--llama-3.2-3B-target-v_proj": ("BEFT", {"target_modules": ["v_proj"]}),
    "deft--llama-3.2-3B-rank32-para": ("DEFT", {"r": 32, "para": True, "decomposition_method": "qr", **LORA}),
    "delora--llama-3.2-3B-rank32": ("DELORA", {"r": 32, "delora_lambda": 15, **LORA}),
    "fourierft--llama-3.2-3B-n_frequency-5000": (
        "FOURIERFT",
        {"n_frequency": 5000, "scaling": 300, "target_modules": QV},
    ),
    "glora--llama-3.2-3B-default": (
        "GLORA",
        {"r": 8, "config_A_B": "lora", "config_C": "lora", "config_D_E": "constant", "target_modules": QV},
    ),
    "gralora--llama-3.2-3B-rank32": ("GRALORA", {"r": 32, "alpha": 64, "gralora_k": 2, "target_modules": QV}),
    "ia3--llama-3.2-3B-all-attn-5k-lr0.005": (
        "IA3",
        {"target_modules": [*QV, "k_proj", "o_proj", *MLP], "feedforward_modules": MLP},
    ),
    "ia3--llama-3.2-3B-lr_0.001": (
        "IA3",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "lily--llama-3.2-3B-rank896-a2-b2-s2.0": (
        "LILY",
        {"r": 896, "stride_A": 14, "num_B": 2, "scaling": 2.0, "target_modules": QV},
    ),
    "lora--llama-3.2-3B-rank14-target-mlp-bdlora": (
        "LORA",
        {"r": 14, "lora_alpha": 28, **LORA, "target_modules": MLP, "use_bdlora": BLOCKS},
    ),
    "lora--llama-3.2-3B-rank32-lorafa": ("LORA", {"r": 32, "lora_alpha": 64, **LORA}),
    "lora--llama-3.2-3B-rank32": ("LORA", {"r": 32, "lora_alpha": 64, **LORA}),
    "lora--llama-3.2-3B-rank64": ("LORA", {"r": 64, "lora_alpha": 128, **LORA}),
    "miss--llama-3.2-3B-default": ("MISS", {"r": 64, "mini_r": 1, "target_modules": QV}),
    "oft--llama-3.2-3B-rank32": (
        "OFT",
        {"r": 32, "oft_block_size": 0, "use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "target_modules": QV},
    ),
    "peanut--llama-3.2-3B-rank32-relu-depth0-s2.0": (
        "PEANUT",
        {"r": 32, "act_fn": "relu", "scaling": 2.0, "depth": 0, "target_modules": QV},
    ),
    "psoft--llama-3.2-3B-fast": ("PSOFT", {"r": 256, **PSOFT, "target_modules": QV}),
    "pvera--llama-3.2-3B-rank64": ("PVERA", {"r": 64, "target_modules": QV}),
    "road--llama-3.2-3B-lr_0.001": ("ROAD", {"variant": "road_2", "group_size": 64, "target_modules": QV}),
    "tinylora--llama-3.2-3B-weight-tying": ("TINYLORA", {"r": 2, "u": 64, "weight_tying": 1.0, "target_modules": QV}),
    "vera--llama-3.2-3B-default": ("VERA", {"r": 256, "target_modules": QV}),
    "full-finetuning--llama-3.2-3B-lr_0.00001": ("", {}),
}


def rehearse(method: str, longest: int = LONGEST) -> dict[str, int]:
    """Return what is ``allocated`` after a step of the average length, and the most that a run has ``reserved``."""
    from transformers import AutoModelForCausalLM

    found: dict[str, int] = {}
    kind, settings = METHODS[method]
    with oomless.rehearsal("L40S"):
        model = AutoModelForCausalLM.from_pretrained(MODEL, device_map="cuda", dtype=torch.bfloat16)
        if kind:
            from peft import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_model

            model = get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[kind](**settings))
        optimizer = _optimizer(method, model)
        model.eval()
        with model.disable_adapter() if kind else nullcontext():
            _evaluate(model)
        model.train()
        for length in (AVERAGE, AVERAGE, SHORT, longest):
            batch = _batch(length)
            optimizer.zero_grad()
            outputs = model(**batch, num_items_in_batch=batch["attention_mask"].sum().item())
            loss = outputs.loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if length == AVERAGE:
                found["allocated"] = torch.cuda.memory_allocated()
            if length == SHORT:
                torch.cuda.empty_cache()
        found["reserved"] = torch.cuda.max_memory_reserved()
    del model, optimizer, batch, outputs, loss
    gc.collect()
    return found


def _optimizer(method: str, model: Any) -> Any:
    if method.endswith("lorafa"):
        from peft.optimizers import create_lorafa_optimizer

        return create_lorafa_optimizer(model, r=32, lora_alpha=64, lr=1e-4, weight_decay=0.1)
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)


def _batch(length: int) -> dict[str, Any]:
    """Return four samples, one of which fills ``length``."""
    tokens, mask = torch.randint(0, 1000, (4, length)), torch.ones(4, length, dtype=torch.int64)
    mask[1:, -1] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    return {"input_ids": tokens.cuda(), "attention_mask": mask.cuda(), "labels": labels.cuda()}


@torch.inference_mode()
def _evaluate(model: Any) -> None:
    batch = _batch(EVALUATED)
    targets = batch.pop("labels")
    for logits, target in zip(model(**batch).logits, targets, strict=True):
        F.cross_entropy(logits[:-1], target[1:], reduction="none").tolist()
