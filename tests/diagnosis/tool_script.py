"""A user's training script, as `test_real_tools.py` lets it run out of memory: `tool_script.py KIND MODEL OUTPUT CHANGES`."""

import json
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

BATCH, LENGTH, EVAL_BATCH, ANSWER = 2, 2048, 8, 1536
kind, model_name, output, changes = sys.argv[1:5]
tool, *options = kind.split()
HALF = "bf16" if "bf16" in options else None


def adapters(task="CAUSAL_LM"):
    from peft import LoraConfig

    return LoraConfig(r=16, target_modules="all-linear", task_type=task)


def tokenizer():
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, "<unk>": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def model(**how):
    dtype = torch.bfloat16 if "half" in options else torch.float32
    return AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype, **how)


ids = list(range(5, LENGTH + 5))
rows = Dataset.from_dict({"input_ids": [ids] * 64, "labels": [ids] * 64})
common = dict(per_device_train_batch_size=BATCH, max_steps=20, report_to="none", bf16=HALF == "bf16", logging_steps=1)
common["gradient_checkpointing"] = "checkpointing" in options
if "evaluation" in options:
    common |= dict(eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=EVAL_BATCH)

common |= dict(fsdp=True) if "fsdp" in options else {}
common |= json.loads(changes)

if tool == "transformers":
    from transformers import Trainer, TrainingArguments

    trained = model(attn_implementation="eager" if "eager" in options else "sdpa")
    if "lora" in options:
        from peft import get_peft_model

        if "checkpointing" in options:
            trained.enable_input_require_grads()
        trained = get_peft_model(trained, adapters())

    def collate(batch):
        return {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}

    trainer = Trainer(
        trained,
        TrainingArguments(output, **common),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collate,
    )
    trainer.train()
elif tool == "accelerate":
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision=HALF, gradient_accumulation_steps=2)
    loader = torch.utils.data.DataLoader(rows.with_format("torch"), batch_size=BATCH)
    trained = model().train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4, fused=True)
    trained, optimizer, loader = accelerator.prepare(trained, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(trained):
            loss = trained(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
elif tool == "sft":
    from trl import SFTConfig, SFTTrainer

    text = Dataset.from_dict({"text": ["a b a b " * (LENGTH // 4)] * 64})
    trainer = SFTTrainer(
        model(),
        args=SFTConfig(output, max_length=LENGTH, packing="packing" in options, **common),
        train_dataset=text,
        eval_dataset=text,
        processing_class=tokenizer(),
        peft_config=adapters() if "lora" in options else None,
    )
    trainer.train()
elif tool == "dpo":
    from trl import DPOConfig, DPOTrainer

    pairs = Dataset.from_dict(
        {"prompt": ["a b"] * 64, "chosen": ["a a " * LENGTH] * 64, "rejected": ["b b " * LENGTH] * 64}
    )
    trainer = DPOTrainer(
        model(),
        args=DPOConfig(output, max_length=LENGTH, **common),
        train_dataset=pairs,
        processing_class=tokenizer(),
        peft_config=adapters() if "lora" in options else None,
    )
    trainer.train()
elif tool == "kto":
    from trl import KTOConfig, KTOTrainer

    judged = Dataset.from_dict(
        {"prompt": ["a b"] * 64, "completion": ["a a " * LENGTH] * 64, "label": [True, False] * 32}
    )
    trainer = KTOTrainer(
        model(),
        args=KTOConfig(output, max_length=LENGTH, **common),
        train_dataset=judged,
        processing_class=tokenizer(),
        peft_config=adapters() if "lora" in options else None,
    )
    trainer.train()
elif tool == "gkd":
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def collate(batch):
        held = {key: torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels")}
        return held | {"attention_mask": torch.ones_like(held["input_ids"])}

    trainer = GKDTrainer(
        model(),
        model(),
        args=GKDConfig(output, max_length=LENGTH, lmbda=0.0, **common),
        train_dataset=rows,
        data_collator=collate,
        processing_class=tokenizer(),
        peft_config=adapters() if "lora" in options else None,
    )
    trainer.train()
elif tool == "reward":
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    dtype = torch.bfloat16 if "half" in options else torch.float32
    scorer = AutoModelForSequenceClassification.from_pretrained(model_name, num_labels=1, dtype=dtype)
    scorer.config.pad_token_id = 0
    answers = {"chosen_ids": [ids] * 64, "rejected_ids": [ids] * 64}
    trainer = RewardTrainer(
        scorer,
        args=RewardConfig(output, max_length=LENGTH, **common),
        train_dataset=Dataset.from_dict(answers),
        processing_class=tokenizer(),
        peft_config=adapters("SEQ_CLS") if "lora" in options else None,
    )
    trainer.train()
elif tool == "grpo":
    from trl import GRPOConfig, GRPOTrainer

    class Answered(GRPOTrainer):
        """Takes answers as they are; what generates them is not asked."""

        def _generate_and_score_completions(self, inputs):
            device, rows = self.accelerator.device, len(inputs)
            prompts = torch.ones(rows, LENGTH - ANSWER, dtype=torch.int64, device=device)
            answers = torch.ones(rows, ANSWER, dtype=torch.int64, device=device)
            return {
                "prompt_ids": prompts,
                "prompt_mask": torch.ones_like(prompts),
                "completion_ids": answers,
                "completion_mask": torch.ones_like(answers),
                "advantages": torch.ones(rows, device=device),
                "num_items_in_batch": torch.tensor(answers.numel(), device=device),
            }

    trainer = Answered(
        model(),
        args=GRPOConfig(output, max_completion_length=ANSWER, num_generations=BATCH, **common),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_dict({"prompt": ["a b"] * 64}),
        processing_class=tokenizer(),
        peft_config=adapters() if "lora" in options else None,
    )
    trainer.train()
