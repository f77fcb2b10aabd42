"""Whole steps measured on a Tesla T4 by others, beside the same program rehearsed: transformers, peft and bitsandbytes as installed.

python bench/public_memory.py T4_QLORA.CSV

Each row of the file names a model, how its base is stored, LoRA's rank, batch, length and attention, and what was measured: the
allocated bytes before the first step, the peaks allocated and reserved of the second, and of the third the peaks of its
forward and of its optimizer step. The program is written anew here from the settings that its author states (scripts/measure.py
of github.com/Anassbzdd/fitcheck): a 16-bit model is loaded to the host and moved, a 4-bit one is loaded on the GPU and prepared
by peft; with SDPA key and value heads are repeated before the call.
"""

from __future__ import annotations

import csv
import gc
import statistics
import sys
from pathlib import Path
from typing import Any

import oomless
from oomless.errors import OomlessError
from provenance import RESULTS, provenance

MIB = 1 << 20
MEASURES = ("resident_mib", "peak_alloc_mib", "peak_reserved_mib", "peak_forward_mib", "peak_optimizer_mib")


def rehearse(row: dict[str, str]) -> dict[str, float]:
    """Return what the rehearsal of ``row`` has for each of ``MEASURES``."""
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

    def allocated() -> float:
        return torch.cuda.max_memory_allocated() / MIB

    found: dict[str, float] = {}
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
            found["resident_mib"] = torch.cuda.memory_allocated() / MIB
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
            tokens = torch.randint(0, 1000, (int(row["batch"]), int(row["seq"])), device="cuda")

            def step(phases: bool) -> None:
                optimizer.zero_grad(set_to_none=True)
                torch.cuda.reset_peak_memory_stats()
                out = model(input_ids=tokens, labels=tokens)
                if phases:
                    found["peak_forward_mib"] = allocated()
                out.loss.backward()
                if phases:
                    torch.cuda.reset_peak_memory_stats()
                optimizer.step()
                if phases:
                    found["peak_optimizer_mib"] = allocated()

            step(phases=False)
            step(phases=False)
            found["peak_alloc_mib"] = allocated()
            found["peak_reserved_mib"] = torch.cuda.max_memory_reserved() / MIB
            step(phases=True)
        finally:
            F.scaled_dot_product_attention = attend
    return found


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    with open(sys.argv[1], encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    lines = [
        f"| model | base | batch x length | attention | {' | '.join(name.removesuffix('_mib') for name in MEASURES)} |",
        "|" + "---|" * (4 + len(MEASURES)),
    ]
    errors: dict[str, list[float]] = {name: [] for name in MEASURES}
    for row in rows:
        try:
            found = rehearse(row)
        except OomlessError as error:
            print(f"left out: {row['model']}: {error}", flush=True)
            continue
        cells = []
        for name in MEASURES:
            measured = float(row[name])
            error = (found[name] - measured) / measured
            errors[name].append(abs(error))
            cells.append(f"{found[name]:,.3f} / {measured:,.3f} ({error:+.2%})")
        about = f"| {row['model']} | {row['base']} | {row['batch']} x {row['seq']} | {row['attn']} |"
        lines.append(f"{about} {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        gc.collect()
    summary = [
        f"- {name.removesuffix('_mib')}: median {statistics.median(values):.3%}, worst {max(values):.3%}"
        for name, values in errors.items()
    ]
    made = provenance()
    text = "\n".join(
        [
            "# Steps on a Tesla T4, rehearsed and measured",
            "",
            f"{len(errors['resident_mib'])} of {len(rows)} rows; MiB, rehearsed / measured. Made by `bench/public_memory.py` "
            f"on {made['date']} at {made['commit']} with {', '.join(f'{k} {v}' for k, v in made['versions'].items())}.",
            "Measured by the author of github.com/Anassbzdd/fitcheck (MIT), data/measurements, with torch 2.10 and 2.14,",
            "transformers 5.0 and 5.17, peft 0.19 and 0.20.",
            "",
            *summary,
            "",
            *lines,
            "",
        ]
    )
    Path(RESULTS, "public_memory.md").write_text(text, encoding="utf-8")
    print("\n".join(summary))


if __name__ == "__main__":
    main()
