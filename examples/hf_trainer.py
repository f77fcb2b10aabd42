"""oomless's loss inside the Hugging Face Trainer: no logits, exact accumulation.

python hf_trainer.py MODEL TEXT OUTPUT_DIR
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import oomless


class LeanTrainer(Trainer):
    """A Trainer whose loss never holds all logits."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss over the tokens of the whole optimizer step."""
        labels = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
        tokens = num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum()
        return oomless.causal_lm_loss(model, inputs["input_ids"], labels, scale=1 / tokens)


def main(model_name: str, text_path: str, output_dir: str, steps: int = 10) -> float:
    """Train for a few steps and return the last loss."""
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    ids = tokenizer(Path(text_path).read_text())["input_ids"]
    blocks = [{"input_ids": ids[i : i + 64], "labels": ids[i : i + 64]} for i in range(0, len(ids) - 64, 64)]
    trainer = LeanTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_name),
        args=TrainingArguments(
            output_dir=output_dir,
            max_steps=steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=blocks,
    )
    return trainer.train().training_loss


if __name__ == "__main__":
    print(f"training loss {main(*sys.argv[1:]):.3f}")
