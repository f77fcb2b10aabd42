"""Whole steps measured on a Tesla T4 by others, written anew from what they state: LoRA and QLoRA of transformers, peft and bitsandbytes.

Each row of the file names a model, how its base is stored, LoRA's rank, batch, length and attention, and what was measured: the
allocated bytes before the first step, the peaks allocated and reserved of the second, and of the third the peaks of its
forward and of its optimizer step. The program is written anew here from the settings that its author states (scripts/measure.py
of github.com/Anassbzdd/fitcheck): a 16-bit model is loaded to the host and moved, a 4-bit one is loaded on the GPU and prepared
by peft; with SDPA key and value heads are repeated before the call.
"""

from __future__ import annotations

from typing import Any

import oomless


def rehearse(row: dict[str, str]) -> dict[str, int]:
    """Return the bytes that the rehearsal of ``row`` has for each column of it that names some."""
    import torch
    import torch.nn.functional as F
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    attend = F.scaled_dot_product_attention

    def with_repeated_heads(query: Any, key: Any, value: Any, *args: Any, **how: Any) -> Any:
        groups = query.size(-3) // key.size(-3)
        if groups > 1:
            key, value = (states.repeat_interleave(groups, dim=-3) for states in (key, value))
            how.pop("enable_gqa", None)
        return attend(query, key, value, *args, **how)

    found: dict[str, int] = {}
    rank = int(row["lora_r"])
    with oomless.rehearsal("T4"):
        if row["attn"] == "sdpa":
            F.scaled_dot_product_attention = with_repeated_heads
        try:
            how: dict[str, Any] = {"dtype": torch.float16, "attn_implementation": row["attn"]}
            if row["base"] == "nf4":
                how["quantization_config"] = BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16
                )
                how["device_map"] = {"": 0}
            model = AutoModelForCausalLM.from_pretrained(row["model"], **how)
            model = prepare_model_for_kbit_training(model) if row["base"] == "nf4" else model.cuda()
            model.config.use_cache = False
            targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
            model = get_peft_model(
                model, LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM", target_modules=targets)
            )
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
            model.train()
            found["resident"] = torch.cuda.memory_allocated()
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
            tokens = torch.randint(0, 1000, (int(row["batch"]), int(row["seq"])), device="cuda")

            def step(phases: bool) -> None:
                optimizer.zero_grad(set_to_none=True)
                torch.cuda.reset_peak_memory_stats()
                out = model(input_ids=tokens, labels=tokens)
                if phases:
                    found["forward"] = torch.cuda.max_memory_allocated()
                out.loss.backward()
                if phases:
                    torch.cuda.reset_peak_memory_stats()
                optimizer.step()
                if phases:
                    found["optimizer"] = torch.cuda.max_memory_allocated()

            step(phases=False)
            step(phases=False)
            found["allocated"] = torch.cuda.max_memory_allocated()
            found["reserved"] = torch.cuda.max_memory_reserved()
            step(phases=True)
        finally:
            F.scaled_dot_product_attention = attend
    return found
