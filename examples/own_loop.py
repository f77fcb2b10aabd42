"""oomless's pieces in a training loop of your own: packed attention and the loss without logits.

python own_loop.py MODEL TEXT
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import oomless


def main(model_name: str, text_path: str, steps: int = 20) -> list[float]:
    """Train on one text, packed from its paragraphs, and return the losses."""
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name)
    oomless.use_packed_attention(model)

    # Paragraphs end to end; position ids restart and no paragraph sees another.
    documents = [tokenizer(text)["input_ids"][:64] for text in Path(text_path).read_text().split("\n\n")]
    documents = [ids for ids in documents if len(ids) > 1][:16]
    inputs = torch.tensor([[token for ids in documents for token in ids[:-1]]])
    labels = torch.tensor([[token for ids in documents for token in ids[1:]]])
    lengths = tuple(len(ids) - 1 for ids in documents)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = oomless.causal_lm_loss(
            model,
            inputs,
            labels,
            position_ids=positions,
            document_lengths=(lengths,),
            scale=1 / labels.numel(),
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
