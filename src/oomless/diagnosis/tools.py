"""The same change in the tools that people come from, in each tool's own words.

``{accumulation}``, ``{length}``, ``{generations}``, ``{share}`` and ``{half}`` stand for numbers of the run. A change that a tool has no setting
for is absent.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

_ZERO_JSON = '"zero_optimization": {"stage": 3} in the DeepSpeed config'
_EVERYWHERE = {
    "expandable": "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, set before Python starts (from torch 2.9: PYTORCH_ALLOC_CONF)",
    "load_half": "from_pretrained(..., dtype=torch.bfloat16)  (before transformers 5: torch_dtype=)",
    "load_one_gpu": 'torch.cuda.set_device(int(os.environ["LOCAL_RANK"])) before anything is loaded',
    "map_location": 'torch.load(..., map_location="cpu")',
    "last_logits": "transformers 4.45 or newer, whose generate() asks for no others",
    "fewer_prompts": "one prompt in a call of generate(), with fewer tokens; a smaller max_new_tokens",
    "vision": "a processor with max_pixels=512*28*28 (Qwen), or smaller pictures",
    "teacher": "the teacher's from_pretrained(..., dtype=torch.bfloat16), or with BitsAndBytesConfig(load_in_4bit=True)",
    "merge_on_cpu": 'load the base model with device_map="cpu", then PeftModel.from_pretrained(...).merge_and_unload()',
}
_SHARDED = {
    "zero3": f"deepspeed with {_ZERO_JSON}; or FSDP with full_shard",
    "offload_optimizer": '"offload_optimizer": {"device": "cpu"} under "zero_optimization"',
    "offload_param": '"offload_param": {"device": "cpu"} under "zero_optimization" (stage 3)',
    "fsdp_offload": 'fsdp="full_shard auto_wrap offload", or fsdp_offload_params: true in the accelerate config',
    "live_parameters": '"stage3_max_live_parameters": 1e8, "stage3_prefetch_bucket_size": 5e6 under "zero_optimization"',
    "save_sharded": 'FSDP: fsdp_state_dict_type: SHARDED_STATE_DICT; ZeRO-3: "stage3_gather_16bit_weights_on_model_save": false',
}
_TRAINER = {
    **_EVERYWHERE,
    **_SHARDED,
    "logits": "use_liger_kernel=True",
    "checkpointing": "gradient_checkpointing=True",
    "batch": "per_device_train_batch_size=1, gradient_accumulation_steps={accumulation}",
    "adamw_8bit": 'optim="adamw_8bit"',
    "paged": 'optim="paged_adamw_8bit"',
    "adafactor": 'optim="adafactor"',
    "half": "from_pretrained(..., dtype={half})",
    "attention": 'from_pretrained(..., attn_implementation="sdpa")  (or "flash_attention_2")',
    "shorter": "tokenizer(..., truncation=True, max_length={length})",
    "eval_batch": "per_device_eval_batch_size=1",
    "eval_accumulation": "eval_accumulation_steps=1",
    "eval_loss_only": "prediction_loss_only=True, or preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1)",
    "lora": 'get_peft_model(model, LoraConfig(target_modules="all-linear"))',
    "nf4": 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)',
    "lm_head": "model.requires_grad_(False); model.lm_head.requires_grad_(True)",
    "zero3": 'deepspeed="ds_zero3.json", or fsdp="full_shard auto_wrap"',
}
_RL = {
    "generations": "num_generations={generations}",
    "completion": "max_completion_length={length}",
    "teacher": 'teacher_model_init_kwargs={"dtype": "bfloat16"}, where the teacher is given by name; else its from_pretrained(..., dtype=torch.bfloat16)',
    "vllm_share": "vllm_gpu_memory_utilization={share} (colocate mode; vllm_enable_sleep_mode=True), or a vLLM server on a GPU of its own",
    "reference": "train LoRA: the reference is then the same weights without the adapter; or precompute_ref_log_probs=True, or beta=0 (GRPO)",
}
_PLAIN = {
    **_TRAINER,
    "logits": "LigerFusedLinearCrossEntropyLoss of liger-kernel, in place of model(...).logits and cross_entropy",
    "checkpointing": "model.gradient_checkpointing_enable()",
    "batch": "batches of 1, an optimizer step after every {accumulation}",
    "adamw_8bit": "bitsandbytes.optim.AdamW8bit",
    "paged": "bitsandbytes.optim.PagedAdamW8bit",
    "adafactor": "transformers.Adafactor",
    "shorter": "blocks of {length} tokens",
    "eval_batch": "an evaluation batch of 1, under torch.no_grad()",
    "eval_accumulation": "move logits to the CPU after each batch, or keep the loss alone",
    "eval_loss_only": "keep loss.item() alone, not the logits",
    "zero3": "torch.distributed.fsdp.fully_shard, or DeepSpeed ZeRO-3",
}
_DEEPSPEED = {
    **_PLAIN,
    "batch": '"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": {accumulation}',
    "zero3": _ZERO_JSON,
}
_WORDS: Mapping[str, Mapping[str, str]] = {
    "trainer": _TRAINER,
    "trl": {
        **_TRAINER,
        **_RL,
        "logits": "use_liger_kernel=True (TRL 1.16 computes its loss in chunks without being told)",
        "shorter": "max_length={length}",
    },
    "unsloth": {
        **{name: words for name, words in {**_TRAINER, **_RL}.items() if name not in ("logits", "attention", "zero3", "lm_head")},
        "checkpointing": 'use_gradient_checkpointing="unsloth"',
        "lora": "FastLanguageModel.get_peft_model(model)",
        "nf4": "FastLanguageModel.from_pretrained(..., load_in_4bit=True)",
        "vllm_share": "FastLanguageModel.from_pretrained(..., fast_inference=True, gpu_memory_utilization={share})",
        "shorter": "max_seq_length={length}",
        "merge_on_cpu": 'model.save_pretrained_merged(..., maximum_memory_usage=0.5), or save the adapter alone (save_method="lora")',
    },
    "axolotl": {
        **_EVERYWHERE,
        **_SHARDED,
        "logits": "plugins: [axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin]",
        "checkpointing": "gradient_checkpointing: true",
        "batch": "micro_batch_size: 1, gradient_accumulation_steps: {accumulation}",
        "adamw_8bit": "optimizer: adamw_bnb_8bit",
        "paged": "optimizer: paged_adamw_8bit",
        "adafactor": "optimizer: adafactor",
        "half": "bf16: true (fp16: true before Ampere)",
        "attention": "flash_attention: true, or sdp_attention: true",
        "lora": "adapter: lora, lora_target_linear: true",
        "nf4": "adapter: qlora, load_in_4bit: true",
        "shorter": "sequence_len: {length}",
        "eval_batch": "eval_batch_size: 1, eval_sample_packing: false",
        "vision": "image_size: 512",
        "zero3": "deepspeed: deepspeed_configs/zero3_bf16.json (or fsdp_version: 2 with fsdp_config)",
    },
    "llamafactory": {
        **_EVERYWHERE,
        **_SHARDED,
        **_RL,
        "logits": "enable_liger_kernel: true",
        "checkpointing": "disable_gradient_checkpointing: false",
        "batch": "per_device_train_batch_size: 1, gradient_accumulation_steps: {accumulation}",
        "adamw_8bit": "optim: adamw_8bit",
        "paged": "optim: paged_adamw_8bit",
        "adafactor": "optim: adafactor",
        "half": "bf16: true, pure_bf16: true",
        "attention": "flash_attn: fa2 (or sdpa)",
        "lora": "finetuning_type: lora, lora_target: all",
        "nf4": "quantization_bit: 4, quantization_method: bnb (with finetuning_type: lora)",
        "shorter": "cutoff_len: {length}",
        "eval_batch": "per_device_eval_batch_size: 1",
        "eval_accumulation": "eval_accumulation_steps: 1",
        "zero3": "deepspeed: examples/deepspeed/ds_z3_config.json, started with FORCE_TORCHRUN=1",
        "offload_optimizer": "deepspeed: examples/deepspeed/ds_z3_offload_config.json (ds_z2_offload_config.json with ZeRO-2)",
        "offload_param": "deepspeed: examples/deepspeed/ds_z3_offload_config.json",
        "load_half": "bf16: true (fp16: true before Ampere)",
        "merge_on_cpu": "llamafactory-cli export with export_device: cpu",
        "vision": "image_max_pixels: 262144 (videos: video_max_pixels, video_maxlen)",
        "reference": "finetuning_type: lora: the reference is then the same weights without the adapter",
    },
    "ms-swift": {
        **_EVERYWHERE,
        **_SHARDED,
        "logits": "--use_liger_kernel true",
        "checkpointing": "--gradient_checkpointing true",
        "batch": "--per_device_train_batch_size 1 --gradient_accumulation_steps {accumulation}",
        "adamw_8bit": "--optim adamw_8bit",
        "paged": "--optim paged_adamw_8bit",
        "adafactor": "--optim adafactor",
        "half": "--torch_dtype bfloat16",
        "attention": "--attn_impl flash_attn",
        "lora": "--tuner_type lora (before 4.0: --train_type lora)",
        "nf4": "--quant_method bnb --quant_bits 4",
        "shorter": "--max_length {length}",
        "eval_batch": "--per_device_eval_batch_size 1",
        "eval_accumulation": "--eval_accumulation_steps 1",
        "zero3": "--deepspeed zero3",
        "offload_optimizer": "--deepspeed zero3_offload (or zero2_offload)",
        "offload_param": "--deepspeed zero3_offload",
        "load_half": "--torch_dtype bfloat16",
        "merge_on_cpu": "swift export --merge_lora true --device_map cpu",
        "generations": "--num_generations {generations}",
        "completion": "--max_completion_length {length}",
        "vllm_share": "--vllm_gpu_memory_utilization {share} --sleep_level 1 --offload_optimizer true --offload_model true (vllm_mode colocate)",
        "reference": "--tuner_type lora: the reference is then the same weights without the adapter; or --beta 0 (GRPO)",
        "vision": "MAX_PIXELS=602112 (or less) in front of the command; for videos VIDEO_MAX_PIXELS and FPS_MAX_FRAMES",
    },
    "torchtune": {
        **_EVERYWHERE,
        "logits": "loss._component_=torchtune.modules.loss.LinearCrossEntropyLoss",
        "checkpointing": "enable_activation_checkpointing=True (and enable_activation_offloading=True)",
        "batch": "batch_size=1 gradient_accumulation_steps={accumulation}",
        "adamw_8bit": "optimizer._component_=bitsandbytes.optim.AdamW8bit",
        "paged": "optimizer._component_=bitsandbytes.optim.PagedAdamW8bit",
        "in_backward": "optimizer_in_bwd=True (gradient_accumulation_steps=1, no gradient clipping)",
        "half": "dtype=bf16",
        "lora": "tune run lora_finetune_single_device (or lora_finetune_distributed)",
        "nf4": "the QLoRA config of the model (*/qlora_single_device)",
        "shorter": "tokenizer.max_seq_len={length}",
        "zero3": "tune run --nproc_per_node N full_finetune_distributed (FSDP2)",
        "offload_optimizer": "fsdp_cpu_offload=True",
    },
    "verl": {
        **_EVERYWHERE,
        "batch": "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1 actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
        "checkpointing": "actor_rollout_ref.model.enable_gradient_checkpointing=True",
        "logits": "actor_rollout_ref.model.use_fused_kernels=True, or actor_rollout_ref.actor.entropy_from_logits_with_chunking=True",
        "shorter": "data.max_response_length={length}, or actor_rollout_ref.actor.ulysses_sequence_parallel_size=2",
        "completion": "data.max_response_length={length}",
        "offload_optimizer": "actor_rollout_ref.actor.fsdp_config.optimizer_offload=True",
        "offload_param": "actor_rollout_ref.actor.fsdp_config.param_offload=True actor_rollout_ref.ref.fsdp_config.param_offload=True",
        "vllm_share": "actor_rollout_ref.rollout.gpu_memory_utilization={share} actor_rollout_ref.rollout.free_cache_engine=True",
        "generations": "actor_rollout_ref.rollout.n={generations}",
        "lora": "actor_rollout_ref.model.lora_rank=32 actor_rollout_ref.model.lora_alpha=32",
    },
    "deepspeed": _DEEPSPEED,
    "nemo": {
        **_EVERYWHERE,
        "batch": "model.micro_batch_size=1 (NeMo 2: data.micro_batch_size=1)",
        "checkpointing": "model.activations_checkpoint_granularity=full model.activations_checkpoint_method=uniform model.activations_checkpoint_num_layers=1",
        "shorter": "model.data.train_ds.max_seq_length={length} (NeMo 2: data.seq_length={length})",
        "lora": "model.peft.peft_scheme=lora (NeMo 2: peft='lora')",
        "half": "trainer.precision=bf16",
        "zero3": "model.tensor_model_parallel_size=2 (or more), model.optim.name=distributed_fused_adam",
    },
    "litgpt": {
        **_EVERYWHERE,
        "batch": "--train.micro_batch_size 1",
        "shorter": "--train.max_seq_length {length}",
        "lora": "litgpt finetune_lora",
        "nf4": "litgpt finetune_lora --quantize bnb.nf4",
        "half": "--precision bf16-true",
        "zero3": "--devices N (FSDP)",
    },
    "peft": {**_PLAIN, **_RL},
    "accelerate": {**_PLAIN, **_RL, "zero3": "accelerate config: FSDP or DeepSpeed ZeRO-3"},
    "torch": {**_PLAIN, **_RL},
}  # fmt: skip
_LENGTHS = ("half_length", "quarter_length")
WORDS: Mapping[str, Mapping[str, str]] = {
    tool: {**words, **dict.fromkeys(_LENGTHS, words["shorter"])} for tool, words in _WORDS.items()
}
"""By tool and change. ``in_backward`` elsewhere and ``correction`` are oomless' own."""

TOOLS = (*WORDS, "oomless")
_OWN = {"in_backward": "updates inside the backward pass", "correction": "8 bits of correction"}


def recognise(name: str) -> str | None:
    """Return the tool that ``name`` means, as people write it."""
    folded = name.lower().replace("_", "").replace("-", "").replace(" ", "")
    known = {tool.replace("-", ""): tool for tool in TOOLS}
    known |= {
        "swift": "ms-swift",
        "transformers": "trainer",
        "hf": "trainer",
        "huggingface": "trainer",
        "pytorch": "torch",
    }
    known |= {"lightning": "torch", "megatron": "nemo", "llamafactorycli": "llamafactory", "sfttrainer": "trl"}
    near = difflib.get_close_matches(folded, known, n=1, cutoff=0.8)
    return known[near[0]] if near else None


def word(tool: str | None, change: str, values: Mapping[str, Any]) -> str | None:
    """Return one change in the words of ``tool``, or of plain PyTorch where none is known; ``None`` if it has none."""
    words = WORDS.get(tool or "torch")
    return None if words is None or change not in words else _filled(words[change], values)


def change_in(tool: str | None, changes: Iterable[str], values: Mapping[str, Any]) -> str | None:
    """Return ``changes`` in the words of ``tool``; ``None`` where it has none of them, or no tool is known."""
    words = WORDS.get(tool or "")
    if words is None:
        return None
    changes = list(changes)
    said = list(dict.fromkeys(_filled(words[name], values) for name in changes if name in words))
    missing = [_OWN.get(name, name.replace("_", " ")) for name in changes if name not in words]
    if not said:
        return None
    return ", ".join(said) + (f"; it has no {' and no '.join(missing)}" if missing else "")


def _filled(words: str, values: Mapping[str, Any]) -> str:
    numbers = {
        "accumulation": values.get("gradient_accumulation_steps", 1),
        "length": values.get("max_seq_length", "N"),
        "generations": max(2, values.get("num_generations", 8) // 2),
        "share": _smaller_share(values.get("gpu_memory_utilization")),
        "half": "torch.float16" if "fp16" in (values.get("dtype"), values.get("half")) else "torch.bfloat16",
    }
    for name, value in numbers.items():
        words = words.replace(f"{{{name}}}", str(value))
    return words


def _smaller_share(now: float | None) -> float:
    """Return a share of the GPU for an engine that is smaller than what it has ``now``, where that is known."""
    return 0.3 if now is None or now > 0.4 else round(now / 2, 2)
