"""Peak host memory and time of a merge: `oomless export` beside peft's `merge_and_unload` and `save_pretrained`.

    python bench/export_memory.py FOLDER [GB] [gguf]

makes a Llama of so many GB (default 4) in bf16 with a LoRA of rank 16 on every linear layer in FOLDER, and merges it with both, each in a
process of its own; or with gguf writes it as GGUF, in bf16 and in few bits. What is counted is the process's largest resident memory (VmHWM), of which pages of mapped files are a part.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from oomless.memory.device import Device
from oomless.models import save
from oomless.models.layout import LateTensor
from provenance import write

RANK = 16

OURS = """
import json, sys, time
began = time.perf_counter()
from pathlib import Path
from oomless.export.plan import make_plan
from oomless.export.run import export
adapter, output, verify, *quantize = sys.argv[1:]
to = "gguf" if quantize else "safetensors"
export(make_plan(Path(adapter), to, output=Path(output), verify=verify, quantize=(quantize or [None])[0] or None))
"""
THEIRS = """
import sys, time, torch
began = time.perf_counter()
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[3], dtype="auto")
PeftModel.from_pretrained(model, sys.argv[1]).merge_and_unload().save_pretrained(sys.argv[2])
AutoTokenizer.from_pretrained(sys.argv[3]).save_pretrained(sys.argv[2])
"""
MEASURED = """
import re
status = open("/proc/self/status").read()
print("MEASURED", int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) << 10, time.perf_counter() - began)
"""


def make(folder: Path, size_bytes: int) -> int:
    """Make base and adapter in ``folder``; return the bytes of the largest tensor."""
    width, inner, vocabulary = 3072, 8192, 64_000
    layers = max(1, round((size_bytes / 2 - 2 * vocabulary * width) / (4 * width**2 + 3 * width * inner)))
    config = AutoConfig.for_model(
        "llama",
        **dict(vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers),
        **dict(num_attention_heads=24, num_key_value_heads=24, tie_word_embeddings=False, dtype="bfloat16"),
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    drawn: dict[Any, torch.Tensor] = {}

    def values(shape: Any) -> torch.Tensor:
        if shape not in drawn:
            drawn[shape] = (torch.randn(shape) * 0.02).to(torch.bfloat16)
        return drawn[shape]

    def late(tensor: torch.Tensor) -> LateTensor:
        return LateTensor(tuple(tensor.shape), torch.bfloat16, lambda: values(tuple(tensor.shape)))

    base = folder / "base"
    base.mkdir(parents=True, exist_ok=True)
    save.save_model(model, base, {name: late(t) for name, t in model.state_dict().items()}, Device())
    tokenizer(base)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, module.in_features) * 0.02
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(module.out_features, RANK) * 0.02
    adapter = folder / "adapter"
    adapter.mkdir(exist_ok=True)
    save_file(tensors, adapter / "adapter_model.safetensors")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = LoraConfig(r=RANK, lora_alpha=32, target_modules=names, task_type="CAUSAL_LM", inference_mode=True)
    settings.base_model_name_or_path = str(base)
    settings.save_pretrained(adapter)
    return max(t.numel() * 2 for t in model.state_dict().values())


def tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes to ``folder``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {text: number for number, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_alone = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytes_alone).save_pretrained(folder)


def measured(program: str, adapter: str, output: Path, *arguments: str) -> dict[str, float]:
    """Run ``program``, forget what it wrote, and return its peak memory and its time."""
    command = [sys.executable, "-c", program + MEASURED, adapter, str(output), *arguments]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(output)
    found = re.search(r"MEASURED (\d+) (\S+)", ended.stdout)
    assert found is not None
    return {"peak_bytes": int(found[1]), "seconds": float(found[2])}


def compare(folder: Path, size_bytes: int, *, gguf: bool = False, theirs: bool = True) -> dict[str, Any]:
    """Return what both take, or what GGUF does."""
    largest = make(folder, size_bytes)
    base, adapter, output = str(folder / "base"), str(folder / "adapter"), folder / "out"
    result: dict[str, Any] = {
        "model_bytes": sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
    }
    result["largest_tensor_bytes"] = largest
    if gguf:
        forms = {"gguf, bf16": "", "gguf, q8_0": "q8_0", "gguf, q4_k_m": "q4_k_m"}
        return result | {name: measured(OURS, adapter, output, "none", form) for name, form in forms.items()}
    for verify in ("none", "sample"):
        result[f"ours, verify {verify}"] = measured(OURS, adapter, output, verify)
    if theirs:
        result["peft"] = measured(THEIRS, adapter, output, base)
    return result


if __name__ == "__main__":
    began = time.perf_counter()
    place, *size = (argument for argument in sys.argv[1:] if argument != "gguf")
    of_gguf = "gguf" in sys.argv
    answer = compare(Path(place), round(float((size or ["4"])[0]) * 1e9), gguf=of_gguf)
    write("export_memory_gguf" if of_gguf else "export_memory", answer)
    print(json.dumps(answer, indent=2), f"\n{time.perf_counter() - began:.0f} s in all")
